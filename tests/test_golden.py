"""What must not change while the code moves, as it was at 3e72e77: golden.json.

    python tests/test_golden.py    # adds to golden.json what it lacks: the bits of this machine

What stands there is never replaced: what an issue changes on purpose is first deleted by hand.
Exact on every machine: the files of a data set and what its manifest says of them; which rows each
process reads at which step; learning rates and multipliers; incidents; the ids of questions; the
command lines' keys and defaults; greedy text. Losses, gradient norms and log-likelihoods are equal
to 1e-5 on every machine. On a kind of machine that golden.json knows, weights, moments and metrics
are equal to the bit; the end of the tests' output says whether it is known.

Nearly all goes through the stages' command lines and the files that they write: these stay.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
import runpy
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, as in conftest.py
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import evaluate  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
from model import Transformer  # noqa: E402
from nano360.analysis.provenance import documents_of  # noqa: E402
from nano360.place import Place  # noqa: E402
from nano360.rows import chunk_name, read_manifest  # noqa: E402
from nano360.tokenizers import load_tokenizer  # noqa: E402
from ranks import ended, forkserver, start, trains  # noqa: E402
from small import write_inputs  # noqa: E402

GOLDEN = HERE / "golden.json"
MODELS, WORLDS = ("llama", "crystal"), (1, 2)
STAGES = ("prepare", "train", "sample", "evaluate", "analyze")
OF_MANIFEST = ("format", "data_hash", "tokenizer", "seq_len", "dtype", "seed", "n_chunks",
               "rows_per_chunk")
OF_SOURCE = ("name", "origin", "revision", "licence", "weight", "documents", "bytes", "all_tokens",
             "tokens", "rows", "rows_per_chunk", "epochs", "valid_rows", "rows_left_out", "notes")
FILES = ("train_", "valid_", "provenance/", "tokenizer.model")  # those that a set had then
OF_CLOCK = re.compile("tok_per_s|mfu|memory|time_.*")  # keys of metrics that depend on speed
# Ids that no row of step 1 has. One row of step 2 has the first, so one of two ranks fails; two
# rows of step 2 have the second, and no row of the other chunk.
POISON = {"skip": 262, "defer": 263}


def kind() -> str:
    """What decides how this machine rounds."""
    cpu, info = platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(), re.M)
        cpu = ", ".join(f"{name} {value}" for name, value in sorted(set(lines))) or cpu
    limits = [f"{name}={os.environ[name]}" for name in
              ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ]
    return ", ".join([f"torch {torch.__version__}", cpu, torch.backends.cpu.get_cpu_capability(),
                      f"{torch.get_num_threads()} threads", *limits])


def digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def digest_of_tensors(folder: Path) -> str:
    """Of all tensors in a folder, whatever files they lie in."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return digest(*(part for name in sorted(tensors)
                    for part in (np.array(name), tensors[name].view(torch.uint8).numpy())))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- what is observed ----------------------------------------------------------------------------

def prepared(name: str) -> dict:
    """Prepare a recipe in this folder -> its files and the named fields of its manifest."""
    prepare.main([f"{name}.py"])
    folder = Path("data", name)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {file: facts for file, facts in manifest["files"].items() if file.startswith(FILES)}
    for file, facts in files.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == facts["sha256"], file
    return {k: manifest[k] for k in OF_MANIFEST} | {
        "files": files,
        "sources": [{k: source[k] for k in OF_SOURCE} for source in manifest["sources"]]}


def record_inputs() -> None:
    """In a rank, before it trains: write a digest of the ids of each training batch it reads."""
    path = Path(f"inputs.{os.environ.get('RANK', '0')}")
    path.write_text("")

    def note(module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, torch.nn.Embedding) and module.training:
            with path.open("a") as file:
                file.write(f"{digest(args[0].numpy())}\n")
    torch.nn.modules.module.register_module_forward_pre_hook(note)


def trained(server: ForkServerContext, world: int, *argv: str) -> list[list[str]]:
    """Train in this folder -> for each rank, the digests of its batches."""
    started = start(server, trains, list(argv), world, record_inputs)
    assert ended(started) == [0] * world, Path("err.0").read_text()
    return [Path(f"inputs.{rank}").read_text().split() for rank in range(world)]


def results_of(run: Path) -> dict[str, str]:
    """Digests of all that six steps ended in."""
    metrics = [{k: v for k, v in line.items() if not OF_CLOCK.fullmatch(k)}
               for line in read_lines(run / "metrics.jsonl")]
    return {"weights": digest_of_tensors(run / "ckpt_002"),
            "moments": digest_of_tensors(run / "ckpt_002" / "optimizer"),
            "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()[:16]}


def numbers_of(run: Path) -> list[float]:
    """Losses, norms and bits per byte, in order."""
    return [line[k] for line in read_lines(run / "metrics.jsonl")
            for k in ("loss", "grad_norm", "bits_per_byte") if k in line]


def schedule_of(run: Path) -> dict:
    """Visits, rows and rates of every step; multipliers and decay of every tensor."""
    steps = [{k: line[k] for k in ("step", "visit", "chunk", "tokens", "rows", "lr")}
             for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    state = json.loads((run / "ckpt_002" / "state.json").read_text())
    groups = [{k: group[k] for k in ("names", "lr_mult", "weight_decay", "betas", "eps")}
              for group in state["param_groups"]]
    return {"steps": steps, "groups": groups}


def poison(i: int) -> None:
    """In a rank, before it trains: the embedding of id i is no number, every row with it fails."""
    def fail(module: torch.nn.Module, args: tuple, x: torch.Tensor) -> torch.Tensor | None:
        if isinstance(module, torch.nn.Embedding):
            return x.masked_fill((args[0] == i)[..., None], float("nan"))
    torch.nn.modules.module.register_module_forward_hook(fail)


def incidents_of(run: Path) -> list[dict]:
    """Its incidents, with "finite" for the numbers of ranks whose rows were sound, and with the
    documents of their rows, which 3e72e77 wrote into the file and analyze.py now looks up."""
    lines = read_lines(run / "incidents.jsonl")
    folder = Path("data/llama")
    manifest = read_manifest(folder)
    for line in lines:
        assert line["documents"] is None
        line["documents"] = documents_of(folder, manifest, chunk_name(line["chunk"]), line["rows"])
        for k in line.keys() & {"loss", "grad_norm"}:
            line[k] = ["finite" if np.isfinite(float(x)) else x for x in line[k]]
    return lines


def old_checkpoint(name: str) -> Path:
    return HERE / "old" / "runs" / name / "ckpt_000"


def question_ids(name: str) -> dict[str, list[str]]:
    """By convention and shots: of each choice, how many ids are its own, and all with the
    question's."""
    found, folder = {}, old_checkpoint(name)
    tokenizer = load_tokenizer(folder)
    for convention, shots in (("current", 0), ("current", 1), ("legacy", 1)):
        options = evaluate.EvaluateOptions(tasks="arc_challenge", convention=convention,
                                           data_dir="eval")
        asked = evaluate.read_questions(options, "arc_challenge", shots)
        place = Place(0, 1, torch.device("cpu"), torch.float32, compile=False)
        ckpt = evaluate.Checkpoint(folder, Transformer.from_pretrained(folder), tokenizer,
                                   tokenizer.add_bos, 32, options, place)
        groups, _ = evaluate.encode_questions(ckpt, evaluate.Job("arc_challenge", shots, {}, asked))
        found[f"{convention} {shots}"] = [f"{K} of {ids.tolist()}"
                                          for group in groups for ids, K in group]
    return found


def scored(name: str) -> list[float]:
    """Twelve log-likelihoods: three questions of four choices."""
    evaluate.main([str(old_checkpoint(name)), "--tasks=arc_challenge", "--data_dir=eval",
                   "--device=cpu", f"--output={name}.json"])
    items = json.loads(Path(f"{name}.json").read_text())["runs"][0]["items"]
    return [ll for item in items for ll in item["lls"]]


def sampled(name: str) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # sample.py asks how it encodes
    with contextlib.redirect_stdout(out):
        sample.main([str(old_checkpoint(name)), "--prompt=the sea", "--temperature=0",
                     "--max_new_tokens=20", "--device=cpu"])
    out.seek(0)
    return out.read()


def keys_of(stage: str) -> list[str]:
    """Every key that --help lists, with its default."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [stage, "--help"]), contextlib.redirect_stdout(out), (
            contextlib.suppress(SystemExit)):
        runpy.run_path(str(HERE.parent / f"{stage}.py"), run_name="__main__")
    found = re.findall(r"^  (--\w+|\w+) +(\S+) +\S", out.getvalue(), re.M)
    return [f"{key} {default}" for key, default in found]


def observe(server: ForkServerContext) -> dict:
    """All of it, in this empty folder: what is exact, numbers, and digests of bits."""
    write_inputs(Path.cwd())
    exact = {"sets": {name: prepared(name) for name in ("llama", "crystal", "release")},
             "batches": {}, "schedule": {}, "incidents": {}, "resumed": {}}
    numbers, bits = {}, {}
    for name in MODELS:
        for world in WORLDS:
            run, file, again = f"{name}.{world}", f"{name}.py", f"{name}.{world}.resumed"
            exact["batches"][run] = trained(server, world, file, "--max_steps=6", f"--run={run}")
            trained(server, world, file, "--max_steps=3", f"--run={again}")
            trained(server, world, file, "--max_steps=6", f"--run={again}")
            bits[run] = results_of(Path("out", run))
            exact["resumed"][run] = results_of(Path("out", again)) == bits[run]
            exact["schedule"][run] = schedule_of(Path("out", run))
            numbers[run] = numbers_of(Path("out", run))
        numbers[f"{name} scored"] = scored(name)
        bits[f"{name} scored"] = digest(np.array(numbers[f"{name} scored"]))
    for action, world in (("skip", 2), ("defer", 1)):
        argv = ["llama.py", f"--on_nonfinite={action}", "--max_skips=9", f"--run={action}"]
        started = start(server, trains, argv, world, functools.partial(poison, POISON[action]))
        assert ended(started) == [0] * world, Path("err.0").read_text()
        exact["incidents"][action] = incidents_of(Path("out", action))
    exact |= {"questions": {name: question_ids(name) for name in MODELS},
              "text": {name: sampled(name) for name in MODELS},
              "keys": {stage: keys_of(stage) for stage in STAGES}}
    return {"exact": exact, "numbers": numbers, "bits": bits}


# ---- the tests -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def seen(server, tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("golden"))
        return json.loads(json.dumps(observe(server)))


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("part", ["sets", "batches", "schedule", "resumed", "incidents",
                                  "questions", "text", "keys"])
def test_exact(part, seen, golden):
    for name in golden["exact"][part]:
        assert seen["exact"][part][name] == golden["exact"][part][name], name
    assert seen["exact"][part].keys() == golden["exact"][part].keys()


@pytest.mark.numeric
def test_numbers(seen, golden):
    assert seen["numbers"].keys() == golden["numbers"].keys()
    for name, numbers in golden["numbers"].items():
        assert seen["numbers"][name] == pytest.approx(numbers, rel=1e-5), name


def test_bits(seen, golden, record_property):
    known = kind() in golden["bits"]
    record_property("golden", f"compared {'to the bit' if known else 'to 1e-5'}: {kind()} is "
                    f"{'a known' if known else 'no known'} kind of machine")
    if known:
        assert seen["bits"] == golden["bits"][kind()]


def filled(have: dict, seen: dict) -> dict:
    """What golden.json has, and what was seen of entries that it lacks."""
    return have | {k: filled(have[k], v) if isinstance(have.get(k), dict) else have.get(k, v)
                   for k, v in seen.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        seen = json.loads(json.dumps(observe(forkserver("ranks"))))
    have = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    golden = filled(have, seen | {"bits": {kind(): seen["bits"]}})
    if golden["exact"] != seen["exact"] or golden["bits"][kind()] != seen["bits"]:
        sys.exit("error: this is not what golden.json has; pytest tests/test_golden.py tells where;"
                 " nothing was written")
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"golden.json has the bits of {kind()}")


if __name__ == "__main__":
    main()
