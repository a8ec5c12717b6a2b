"""Checkpoints: there whole or not at all, hashed before they have a name, the newest intact found.

    with Saver(out, config.model, tokenizer, parent, keep) as saver:
        saver.save("ckpt_003", snapshot(model, optimizer, random), state)   # the loop goes on
    folder, state = newest(out, facts)

train.py says when, this file how. A checkpoint is a folder of Hugging Face's, which model.py reads,
and beside the weights, nothing of it pickled:

    optimizer/adamw.safetensors     exp_avg.<name> and exp_avg_sq.<name> of every parameter
    optimizer/random.safetensors    the random state of every rank
    state.json, state.json.sha256   where the run stood, and the sha256 of every other file

It is written under another name, hashed, synced and renamed. Nothing is removed before what takes
its place is whole: NAME.part is unfinished, NAME.old the one that NAME replaces, .gone is rubbish.
"""

import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from configs import (CHECKPOINT, NUMERICAL, ModelConfig, Stop, read_sealed, say, sha256_file, sync,
                     write_sealed)
from extras.hf_folders import verify, weight_files, write_folder
from extras.tokenizer_json import tokenizer_files
from extras.tokenizers import Tokenizer

FORMAT = 2  # of state.json; 1 had no list of skipped steps, and chunks without epochs as its queue
MASTER = "float32"  # of weights and optimizer state, in memory and on disk
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
Tensors = dict[str, torch.Tensor]


# ---- reading -------------------------------------------------------------------------------------

def check_types(folder: Path, state: dict) -> None:
    """Refuse to go on from rounded weights: all must be of the masters' type. Raises Stop."""
    files = {"weights": weight_files(folder), "optimizer": [folder / "optimizer/adamw.safetensors"]}
    for part, paths in files.items():
        for path in paths:
            with safe_open(path, framework="pt") as tensors:
                odd = {tensors.get_slice(name).get_dtype() for name in tensors.keys()} - {"F32"}
            if odd or state["dtypes"][part] != MASTER:
                raise Stop(CHECKPOINT, f"{path} holds {', '.join(odd) or state['dtypes'][part]}, "
                           f"training goes on from {MASTER} alone: a cast is for export")


def checkpoints_of(out: Path) -> dict[int, Path]:
    """visit -> folder, in order, of the checkpoints of a run, whole or not."""
    found = {int(path.name[5:]): path for path in out.glob("ckpt_*")
             if path.name[5:].isdecimal() and path.is_dir()}
    return dict(sorted(found.items()))


def newest(out: Path, facts: dict) -> tuple[Path, dict] | None:
    """The checkpoint of a run with the most steps that is intact, optimizer and all; its state.

    `facts` are what state.json must say to be this run's. What is damaged is named, left as it is,
    and the one before is taken. Raises Stop(CHECKPOINT) if only damaged ones are left.
    """
    last = out / "last" if (out / "last").is_dir() else out / "last.old"
    places = checkpoints_of(out) | ({math.inf: last} if last.is_dir() else {})
    found, damaged, bare = [], {}, []
    for visit, folder in places.items():
        try:
            state = read_sealed(folder / "state.json", CHECKPOINT)
        except (Stop, OSError) as error:
            damaged[visit] = str(error)
            continue
        if state.get("format") != FORMAT:
            raise Stop(CHECKPOINT, f"{folder} has format {state.get('format')}, this code reads "
                       f"{FORMAT}: go on with the code that wrote it, or give --run=NAME")
        if wrong := [k for k in facts if state.get(k) != facts[k]]:
            raise Stop(CHECKPOINT, f"{folder} is none of this run: its {', '.join(wrong)} differs; "
                       f"move it out of {out} or give --run=NAME")
        if visit not in (state["visit"], math.inf):
            damaged[visit] = f"{folder} holds checkpoint {state['visit']}, not what its name says"
        elif not (folder / "optimizer").is_dir():
            bare.append((folder, state))
        else:
            found.append((visit, folder, state))
    for visit, folder, state in sorted(found, key=lambda one: one[2]["step"], reverse=True):
        try:
            verify(folder)
            verify(folder, "optimizer")
            check_types(folder, state)
        except (Stop, OSError) as error:
            damaged[visit] = str(error)
            continue
        late = [f"{one} has no optimizer state" for one, its in bare if its["step"] > state["step"]]
        for why in [*damaged.values(), *late]:
            say(why)
        if late or any(one > visit for one in damaged):
            say(f"the newest checkpoint that is whole is {folder}, step {state['step']}; "
                "nothing was removed")
        return folder, state
    if damaged or bare:
        one = bare[-1][0] if bare else out
        why = "; ".join(damaged.values()) or (
            f"{one} has no optimizer state: its weights can begin another run, --run=NAME "
            f"--init_from={one}")
        raise Stop(CHECKPOINT, f"{out} has no whole checkpoint to go on from: {why}")
    return None


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, updates: int | None
                   ) -> None:
    """Put the moments back; every parameter has taken the same number of updates."""
    if not (folder / "optimizer").is_dir() or updates is None:  # or no state.json that counts them
        raise Stop(CHECKPOINT, f"{folder} has no optimizer state: give --init_optimizer=false")
    verify(folder, "optimizer")
    tensors = load_file(folder / "optimizer" / "adamw.safetensors")
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            optimizer.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),  # where fused wants it
                **{kind: tensors.pop(f"{kind}.{name}").to(p.device) for kind in MOMENTS}}
    assert not tensors, f"nobody claims {sorted(tensors)}"


# ---- writing -------------------------------------------------------------------------------------

def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer, random: Tensors
             ) -> dict[str, Tensors]:
    """A copy of all that changes, in host memory: what the loop waits for in a save."""
    moments = {f"{kind}.{name}": optimizer.state[p][kind] for group in optimizer.param_groups
               for name, p in zip(group["names"], group["params"], strict=True)
               for kind in MOMENTS}
    return {part: {name: tensor.detach().to("cpu", copy=True).contiguous()
                   for name, tensor in tensors.items()}
            for part, tensors in (("weights", dict(model.named_parameters())),
                                  ("adamw", moments), ("random", random))}


def size_of(copy: dict[str, Tensors]) -> int:
    """Bytes of a checkpoint, but for a MB of small files."""
    return sum(t.numel() * t.itemsize for tensors in copy.values() for t in tensors.values())


def discard(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that could be taken for whole."""
    if path.is_dir():
        gone = path.with_name(f"{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


def sweep(out: Path) -> None:
    """Remove what saves that were killed have left."""
    for path in [*out.glob("*.part"), *out.glob("*.gone"), *out.glob("ckpt_*/optimizer.gone")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in out.glob("*.old"):
        if path.with_suffix("").is_dir():  # which is whole, since it has its name
            discard(path)


def thin(out: Path, visit: int, keep: int | None) -> None:
    """Keep the optimizer state of the newest checkpoints up to a visit; later ones are damaged."""
    full = [folder for v, folder in checkpoints_of(out).items()
            if v <= visit and (folder / "optimizer").is_dir()]
    for folder in full[:-keep] if keep else []:
        discard(folder / "optimizer")


def check_space(out: Path, n_params: int, more: int) -> None:
    """Refuse to begin where not even two checkpoints fit; say if the `more` of the run will not."""
    size = n_params * 4 * (1 + len(MOMENTS))
    free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.is_dir())
                             ).free
    if free < 2 * size:
        raise Stop(CHECKPOINT, f"{out}: {free / 1e9:,.3f} GB are free, a checkpoint takes "
                   f"{size / 1e9:,.3f} GB and two must fit: make room and type the same command")
    if free < more * size:
        say(f"{out}: {more} checkpoints take {more * size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are "
            "free; without the optimizer state of old ones (--keep_optimizer) it is a third")


def write(out: Path, name: str, copy: dict[str, Tensors], state: dict, model: ModelConfig,
          tokenizer: Tokenizer) -> None:
    """Write one checkpoint, whole or not at all. Raises Stop, and leaves the others as they are."""
    folder, part = out / name, out / f"{name}.part"
    for tensors in (copy["weights"], copy["adamw"]):
        for key, tensor in tensors.items():
            assert str(tensor.dtype) == f"torch.{MASTER}", f"{key} is {tensor.dtype}"
            if not tensor.isfinite().all():
                raise Stop(NUMERICAL, f"{folder} is not written: {key} has values that are no "
                           "numbers; the last checkpoint stays: try a smaller --lr")
    try:
        shutil.rmtree(part, ignore_errors=True)  # what a killed save left
        tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": None}
        write_folder(part, model, copy["weights"], tokens, torch.float32, max_shard_gb=5.0)
        for file, content in tokenizer_files(tokenizer).items():
            (part / file).write_bytes(content)
        (part / "optimizer").mkdir()
        for kind in ("adamw", "random"):
            save_file(copy[kind], part / "optimizer" / f"{kind}.safetensors")
        files = sorted(path for path in part.rglob("*") if path.is_file())
        hashes = {path.relative_to(part).as_posix(): sha256_file(path) for path in files}
        for path in (*files, part / "optimizer"):
            sync(path)
        write_sealed(part / "state.json", state | {"files": hashes})
        for lines in filter(Path.is_file, (out / "metrics.jsonl", out / "incidents.jsonl")):
            sync(lines)  # no checkpoint is ahead of its metrics
        if folder.is_dir():  # last/, or a damaged one that was trained again
            shutil.rmtree(out / f"{name}.old", ignore_errors=True)
            folder.rename(out / f"{name}.old")
        part.rename(folder)
        sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)  # of no use, and what it took is wanted
        free = shutil.disk_usage(out).free
        raise Stop(CHECKPOINT, f"{folder} could not be written: {error}; it takes "
                   f"{size_of(copy) / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free: make room and "
                   "type the same command, it goes on from the last checkpoint") from error
    discard(out / f"{name}.old")


class Saver:
    """Writes checkpoints beside the loop, one at a time; a save that fails ends the run."""

    def __init__(self, out: Path, model: ModelConfig, tokenizer: Tokenizer, parent: str | None,
                 keep: int | None):
        """`parent`: sha256 of the state.json of the checkpoint before the next one."""
        self.out, self.model, self.tokenizer, self.parent = out, model, tokenizer, parent
        self.keep, self.pool = keep, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, name: str, copy: dict[str, Tensors], state: dict) -> None:
        """Begin to write; after the save before, if that is not waited for."""
        self.pending = self.pool.submit(self.work, name, copy, state)

    def work(self, name: str, copy: dict[str, Tensors], state: dict) -> None:
        write(self.out, name, copy, state | {"parent": self.parent}, self.model, self.tokenizer)
        if name != "last":  # which it takes the place of
            self.parent = sha256_file(self.out / name / "state.json")
            discard(self.out / "last")
            discard(self.out / "last.old")
            thin(self.out, state["visit"], self.keep)
        say(f"  saved {self.out / name}")

    def wait(self) -> None:
        """Until the save that is under way is on the disk. Raises what it raised."""
        if self.pending:
            self.pending.result()

    def busy(self) -> bool:
        return self.pending is not None and not self.pending.done()

    def check(self) -> None:
        """Raise what a save raised that has ended."""
        if not self.busy():
            self.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        failed = self.pending and self.pending.exception()  # waits for it
        self.pool.shutdown()
        if failed and failed is not error:
            if error and getattr(error, "code", 0) < 128:  # a signal's says that all was saved
                say(str(error))
            raise failed
