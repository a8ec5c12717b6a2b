"""Plants faults in train.py from outside: it knows nothing of them.

    python tests/fault.py --nan=5,6,7 -- configs/demo.py --run=x     # three losses in a row are NaN
    python tests/fault.py --chunk=2 --once -- configs/demo.py --on_nonfinite=defer
    torchrun --nproc_per_node=2 -- tests/fault.py --nan=5 --rank=1 -- configs/demo.py

What stands behind the lone -- is train.py's own command line, and its exit code is this one's;
--help lists the faults. Tests plant the same in their own process:

    with planted(Faults(nan="5")):
        train.main(["tiny.py"])
"""

import contextlib
import hashlib
import math
import os
import signal
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import train  # noqa: E402
from nano360.config import SECTIONS, USAGE, Stop, fill, key, run, split_words  # noqa: E402

LIST = "([0-9]+(,[0-9]+)*)?"
FACTOR = 5.0  # of a spike


@dataclass(frozen=True, kw_only=True)
class Faults:
    nan: str = key("steps at which the loss is NaN", "", pattern=LIST)
    chunk: str = key("chunks at every step of which it is", "", pattern=LIST)
    begin: int = key("of these chunks only the steps from this one of the visit on", 1, low=1)
    inf_gradient: str = key("steps with a finite loss and a gradient that is not", "", pattern=LIST)
    spike: str = key(f"steps with a loss and gradient {FACTOR:g} times as big", "", pattern=LIST)
    kill: str = key("steps before which the process is killed", "", pattern=LIST)
    kill_at: str = key("NAME:N: it is killed before the N-th call of this function of train.py", "",
                       pattern="([a-z_]+:[0-9]+)?")
    rank: int | None = key("the one rank that all this is for; none: all", None, low=0)
    once: bool = key("a step, and an epoch's chunk, fail only when they are reached first", False)
    hashes: str = key("file for the sha256 of the weights at the end; the rank is added", "")

    def at(self, step: int, plan: train.Plan) -> set[tuple]:
        """What happens at a step: (the fault, and what has it)."""
        if self.rank not in (None, my_rank()):
            return set()
        epoch, chunk = plan.queue[plan.visit_of(step)]
        found = {(kind, step) for kind in ("nan", "inf_gradient", "spike", "kill")
                 if str(step) in getattr(self, kind).split(",")}
        late = (step - 1) % plan.steps_per_visit + 1 >= self.begin
        fails = late and str(chunk) in self.chunk.split(",")
        return found | ({("nan", epoch, chunk)} if fails else set())


def my_rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def planted(faults: Faults) -> Iterator[None]:
    """Put wrappers around functions of train.py; a validation sees none of the faults."""
    name, _, number = faults.kill_at.partition(":")
    before, now, gone, calls, models = {}, set(), set(), [], []

    def batches(*args):
        for step, numbers, rows in before["batches"](*args):
            now.clear()
            now.update(faults.at(step, args[1]) - gone)
            gone.update(now if faults.once else ())
            if any(what == "kill" for what, *_ in now):
                os.kill(os.getpid(), signal.SIGKILL)
            yield step, numbers, rows

    def loss_of(model, rows, place):
        loss = before["loss_of"](model, rows, place)
        kinds = {what for what, *_ in now}
        if "inf_gradient" in kinds and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * (math.nan if "nan" in kinds else FACTOR if "spike" in kinds else 1.0)

    def validate(*args):
        now.clear()  # the step is over
        return before["validate"](*args)

    def start(*args):
        models[:] = [(found := before["start"](*args))[0]]
        return found

    def called(*args, **named):
        calls.append(name)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return before[name](*args, **named)
    wrappers = {"batches": batches, "loss_of": loss_of, "validate": validate, "start": start}
    try:
        for k, wrapper in (wrappers | ({name: called} if name else {})).items():
            before[k] = getattr(train, k)
            setattr(train, k, wrapper)
        yield
    finally:
        for k, function in before.items():
            setattr(train, k, function)
        if faults.hashes and models:
            weights = b"".join(t.cpu().numpy().tobytes() for t in models[0].state_dict().values())
            Path(f"{faults.hashes}.{my_rank()}").write_text(hashlib.sha256(weights).hexdigest())


def faulty(argv: list[str]) -> int:
    """Faults, --, and a command line of train.py -> its exit code."""
    mine = argv[:argv.index("--")] if "--" in argv else argv
    words, given = split_words(mine, typing.get_type_hints(Faults))
    if words or mine == argv:
        raise Stop(USAGE, "expected faults, a lone --, and the words for train.py (see --help)")
    with planted(fill([Faults], given)[0]):
        return run(train.main, train.__doc__, list(SECTIONS.values()), argv[len(mine) + 1:])


def main(argv: list[str]) -> None:
    sys.exit(faulty(argv))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [Faults]))
