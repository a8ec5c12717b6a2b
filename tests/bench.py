"""How fast: generation against transformers', and the drawing of a 7B's weights.

    python tests/bench.py sample          # generation against transformers' generate
    python tests/bench.py init            # seconds of one core to draw the weights of a 7B

`sample` runs both programs in this process, on the same weights, prompts and sampling options, in
turn, so that a busy machine slows both, and compares medians; --pairs=N takes N of each. It needs
transformers. Leaves nothing behind.
"""

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

from configs import USAGE, ModelConfig, Stop, load, run  # noqa: E402
from model import Transformer, class_of, draw, init_weights, tensor_classes  # noqa: E402

PROMPT, NEW, TOP_K = 32, 256, 50
SHAPES = [  # vocabulary, batch, type, the ratio that is asked for
    (32000, 1, torch.float32, 1.15), (32000, 1, torch.bfloat16, 1.25),
    (4096, 16, torch.float32, 1.25), (32000, 16, torch.float32, None),
]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sample_pair(V: int, B: int, dtype: torch.dtype, pairs: int) -> tuple[list[float], list[float]]:
    """Tokens a second of ours and of transformers, one of each per pair."""
    from transformers import AutoModelForCausalLM
    config = ModelConfig(n_layer=6, n_head=6, n_embd=384, n_inner=1024, vocab_size=V, seq_len=512)
    model = Transformer(config)
    init_weights(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    idx = torch.randint(V, (B, PROMPT), generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(idx)

    def us() -> torch.Tensor:
        return ours.generate(idx, NEW, top_k=TOP_K)

    def them() -> torch.Tensor:
        return theirs.generate(idx, attention_mask=there, max_new_tokens=NEW, do_sample=True,
                               top_k=TOP_K, eos_token_id=None, pad_token_id=0)

    assert us().shape == them().shape == (B, PROMPT + NEW)  # and both are warm
    times = [(seconds(us), seconds(them)) for _ in range(pairs)]
    return tuple([B * NEW / t for t in one] for one in zip(*times, strict=True))


def sample(pairs: int) -> None:
    print(f"d 384, 6 layers, prompt {PROMPT} + {NEW} new, top_k {TOP_K}, "
          f"{torch.get_num_threads()} threads, median of {pairs} alternating pairs")
    print(f"{'vocab':>6} {'batch':>5} {'type':>9} {'ours tok/s':>11} {'theirs':>8} {'ratio':>6}")
    for V, B, dtype, least in SHAPES:
        ours, theirs = sample_pair(V, B, dtype, pairs)
        ratio = statistics.median(ours) / statistics.median(theirs)
        wanted = "" if least is None else f"  (at least {least} wanted)"
        print(f"{V:>6} {B:>5} {str(dtype).removeprefix('torch.'):>9} "
              f"{statistics.median(ours):>11,.0f} {statistics.median(theirs):>8,.0f} "
              f"{ratio:>6.2f}{wanted}", flush=True)


def init(pairs: int) -> None:
    """Every draw of a 7B, each tensor let go after it: 27 GB need not fit."""
    torch.set_num_threads(1)
    for name in ("amber_7b", "crystalcoder_7b_stage1"):
        config = load([str(REPO / f"configs/{name}.py")])[0].model
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in Transformer(config).named_parameters()}
        classes, mup = tensor_classes(config), config.mup_base_width is not None
        took = 0.0
        for one, shape in shapes.items():
            if std := classes[class_of(one)].std:
                p, generator = torch.empty(shape), torch.Generator().manual_seed(0)
                began = time.process_time()  # of one thread: what a busy machine does not change
                draw(p, std, mup, generator)
                took += time.process_time() - began
        total = sum(shape.numel() for shape in shapes.values())
        print(f"{name}: {total:,} parameters in {took:.1f} s of one core")


def main(argv: list[str]) -> None:
    works = {"sample": sample, "init": init}
    pairs = re.fullmatch("--pairs=([1-9][0-9]*)", argv[1] if len(argv) == 2 else "--pairs=5")
    if len(argv) not in (1, 2) or argv[0] not in works or not pairs:
        raise Stop(USAGE, f"expected one of {', '.join(works)} and, if you like, --pairs=N")
    works[argv[0]](int(pairs[1]))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
