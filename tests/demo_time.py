"""How long `make demo` will take on this machine: some steps of its training, timed.

    python tests/demo_time.py

Reads configs/demo.py, trains its model on noise and keeps nothing.
"""

import statistics
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from model import Transformer, init_weights, param_groups  # noqa: E402
from nano360.config import load, run, say  # noqa: E402
from nano360.place import Clock, choose_place  # noqa: E402
from train import forward_backward, parallelize  # noqa: E402

WARMUP, TIMED = 2, 8  # steps
# What is not training (preparation, sampling, scoring, the start of four programs) takes as long as
# so many steps: 45 s where a step takes 0.3 s.
BESIDE = 150


def seconds_of_a_step(config_file: str) -> tuple[float, int]:
    """Seconds of one step of a run, and how many steps its training takes, scores included."""
    config, _ = load([config_file])
    place = choose_place(config)
    with torch.device("meta"):
        model = Transformer(config.model)
    runner = parallelize(model, place, config)
    init_weights(model, config.data.seed)
    optimizer = torch.optim.AdamW(param_groups(model, config.optim.weight_decay), fused=True)
    B, rng = config.optim.batch_size, np.random.default_rng(0)
    shape = (B, config.model.seq_len + 1)
    times = []
    for _ in range(WARMUP + TIMED):
        rows = rng.integers(config.model.vocab_size, size=shape)
        began = time.perf_counter()
        forward_backward(runner, rows, B, place, Clock(place.device)).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    data = config.data
    steps = data.n_chunks * (data.rows_per_chunk // B)
    scored = data.n_chunks * len(data.sources) * data.valid_rows // B  # batches, forward only
    return statistics.median(times[WARMUP:]), steps + scored // 3


def main(argv: list[str]) -> None:
    step, steps = seconds_of_a_step(str(REPO / "configs/demo.py"))
    minutes = (steps + BESIDE) * step / 60
    say(f"make demo will take about {minutes:.1f} minutes here ({step:.2f} s a training step)")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
