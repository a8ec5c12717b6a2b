"""Checkpoints: there whole or not at all, hashed before they have a name, the newest intact found.

    with Saver(out, config.model, tokenizer, parent, keep, place) as saver:
        saver.take("ckpt_003", model, optimizer, random)    # a copy in host memory
        saver.save("ckpt_003", state)                       # the loop goes on
    folder, state = found(out, facts, place)

train.py says when, this file how. A checkpoint is a folder of Hugging Face's, which model.py reads,
and beside the weights, nothing of it pickled:

    optimizer/adamw.safetensors     exp_avg.<name> and exp_avg_sq.<name> of every parameter; or
    optimizer/shard-*.safetensors   what each rank has of them, where they are sharded
    optimizer/random.safetensors    the random state of every rank
    state.json, state.json.sha256   where the run stood, and the sha256 of every other file

It is written under another name, hashed, synced and renamed. Nothing is removed before what takes
its place is whole: NAME.part is unfinished, NAME.old the one that NAME replaces, .gone is rubbish.
"""

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from model import Transformer, local, parameters, shapes_of
from nano360.config import CHECKPOINT, NUMERICAL, ModelConfig, Stop, say
from nano360.files import read_sealed, sha256_file, sync, write_sealed
from nano360.hf_folders import read_config, verify, weight_files, write_folder
from nano360.place import Place, exchange, owned
from nano360.rows import TokenizerFiles

FORMAT = 2  # of state.json; 1 had no list of skipped steps, and chunks without epochs as its queue
LAST, NONE = ("last", "last.old"), -3  # instead of a visit's number they have -2, -1, and nothing
MASTER = "float32"  # of weights and optimizer state, in memory and on disk
FILE_GB = 2.0  # of weights, at most; while one is written rank 0 has its tensors and their bytes
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
Tensors = dict[str, torch.Tensor]


# ---- reading -------------------------------------------------------------------------------------

def check_types(folder: Path, state: dict) -> None:
    """Refuse to go on from rounded weights: all must be of the masters' type. Raises Stop."""
    files = {"weights": weight_files(folder), "optimizer": [
        path for path in (folder / "optimizer").glob("*.safetensors") if path.stem != "random"]}
    for part, paths in files.items():
        for path in paths:
            with safe_open(path, framework="pt") as tensors:
                odd = {tensors.get_slice(name).get_dtype() for name in tensors.keys()} - {"F32"}
            if odd or state["dtypes"][part] != MASTER:
                raise Stop(CHECKPOINT, f"{path} holds {', '.join(odd) or state['dtypes'][part]}, "
                           f"training goes on from {MASTER} alone: a cast is for export")


def check_shape(folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint that is not of this run's shape. Raises Stop(CHECKPOINT)."""
    theirs, ours = (dataclasses.asdict(one) | {  # but for the spread of weights that are not drawn
        "init_std": None, "n_kv_head": one.n_kv_head or one.n_head}
        for one in (read_config(folder), model))
    if differ := [f"{k} {theirs[k]}, here {ours[k]}" for k in ours if theirs[k] != ours[k]]:
        raise Stop(CHECKPOINT, f"{folder} holds another model than this run's ({'; '.join(differ)})"
                   ": choose another checkpoint, or give these keys its values")


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


def found(out: Path, facts: dict, place: Place) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its state, for all ranks. Rank 0 looks for it, since that is
    to hash all of it; the others open the same folder. Raises Stop(CHECKPOINT) if it is not."""
    one, number, digest = newest(out, facts) if place.rank == 0 else None, NONE, 0
    if one:
        name = one[0].name
        number = int(name[5:]) if name.startswith("ckpt") else LAST.index(name) - len(LAST)
        digest = int(sha256_file(one[0] / "state.json")[:6], 16)  # as much as a float32 can hold
    number, digest = exchange([number, digest], place)[0].astype(int)
    if number == NONE:
        return None
    folder = out / (LAST[number] if number < 0 else f"ckpt_{number:03d}")
    path = folder / "state.json"
    same = path.is_file() and int(sha256_file(path)[:6], 16) == digest
    if not exchange([same], place).all():  # or each would train what it likes
        raise Stop(CHECKPOINT, f"rank 0 goes on from {folder}, another rank does not find it: "
                   f"{out} must be one folder for all ranks")
    return one or (folder, read_sealed(path, CHECKPOINT))


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """exp_avg.<name>, exp_avg_sq.<name> -> what AdamW remembers of this rank's parameters."""
    return {f"{kind}.{name}": optimizer.state[p][kind] for group in optimizer.param_groups
            for name, p in zip(group["names"], group["params"], strict=True) for kind in MOMENTS}


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, updates: int | None,
                   verified: bool = True) -> None:
    """Put the moments back; every parameter has taken the same number of updates.

    Each rank reads its own part of them, whoever wrote them: one process, or others on another
    mesh. They go by name alone, so that no number of a group, or of a stage, has a meaning.
    """
    if not (folder / "optimizer").is_dir() or updates is None:  # or no state.json that counts them
        raise Stop(CHECKPOINT, f"{folder} has no optimizer state: give --init_optimizer=false")
    if not verified:
        verify(folder, "optimizer")
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),  # where fused wants it
                **{kind: torch.zeros_like(p, requires_grad=False) for kind in MOMENTS}}
    read_shards(folder / "optimizer", moments_of(optimizer))


def read_shards(folder: Path, tensors: Tensors) -> None:
    """Fill tensors, or this rank's shards of DTensors, from the safetensors files of a folder that
    hold parts of them. Raises Stop(CHECKPOINT) if one is not there."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        check_shards(folder, {key: tensor.shape for key, tensor in tensors.items()})
        with warnings.catch_warnings():  # that nothing is asked of other ranks is what is wanted
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, SafetensorError, OSError, RuntimeError) as error:
        raise Stop(CHECKPOINT, f"{folder} lacks what is wanted of it: {last_line(error)}"
                   ) from error


def check_shards(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Refuse a folder where parts of these tensors are not to be seen: torch fills what it finds
    and is silent of the rest. Raises Stop(CHECKPOINT)."""
    known = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for key, shape in shapes.items():
        there = sum(one.sizes.numel() for one in known[key].chunks) if key in known else 0
        if there != shape.numel():
            raise Stop(CHECKPOINT, f"{folder} has {there:,} of {key}'s {shape.numel():,} numbers: "
                       "choose another checkpoint or copy this one again")


def last_line(error: BaseException) -> str:
    """Of what torch says in a page, with the traceback of a rank in it."""
    return str(error).strip().splitlines()[-1]


# ---- writing -------------------------------------------------------------------------------------

def size_of(model: ModelConfig) -> int:
    """Bytes of a checkpoint, but for a MB of small files."""
    return 4 * (1 + len(MOMENTS)) * parameters(model)


def odd_names(tensors: Tensors) -> list[str]:
    """Those with values that are no numbers, in what this rank holds of them."""
    return [name for name, tensor in tensors.items() if not local(tensor).isfinite().all()]


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


def check_space(out: Path, model: ModelConfig, more: int) -> None:
    """Refuse to begin where not even two checkpoints fit; say if the `more` of the run will not."""
    size = size_of(model)
    free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.is_dir())
                             ).free
    if free < 2 * size:
        raise Stop(CHECKPOINT, f"{out}: {free / 1e9:,.3f} GB are free, a checkpoint takes "
                   f"{size / 1e9:,.3f} GB and two must fit: make room and type the same command")
    if free < more * size:
        say(f"{out}: {more} checkpoints take {more * size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are "
            "free; without the optimizer state of old ones (--keep_optimizer) it is a third")


def refuse(folder: Path, odd: list[str]) -> None:
    """A checkpoint of which these tensors are no numbers is not written. Raises Stop."""
    if odd:
        raise Stop(NUMERICAL, f"{folder} is not written: {odd[0]} has values that are no numbers; "
                   "the last checkpoint stays: try a smaller --lr")


def unwritten(folder: Path, model: ModelConfig, error: BaseException) -> Stop:
    """What is said of a checkpoint for which there was no room."""
    free = shutil.disk_usage(folder.parent).free
    return Stop(CHECKPOINT, f"{folder} could not be written: {last_line(error)}; it takes "
                f"{size_of(model) / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free: make room and "
                "type the same command, it goes on from the last checkpoint")


def write(out: Path, name: str, read: Callable[[list[str]], Tensors], optimizer: dict[str, Tensors],
          passing: int, state: dict, model: ModelConfig, tokenizer: TokenizerFiles) -> None:
    """Write one checkpoint, whole or not at all. Raises Stop, and leaves the others as they are.

    `read` gives weights by name. `optimizer` is file -> tensors; what ranks have written of it
    lies in NAME.part/optimizer already, where the first `passing` files of each are the weights.
    """
    folder, part = out / name, out / f"{name}.part"
    try:
        tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": None}
        write_folder(part, model, shapes_of(model), read, tokens, torch.float32, FILE_GB)
        for file, content in tokenizer.files.items():
            (part / file).write_bytes(content)
        (part / "optimizer").mkdir(exist_ok=True)
        for kind, tensors in optimizer.items():
            save_file(tensors, part / "optimizer" / f"{kind}.safetensors")
        for i in range(passing):  # by the name that torch gives; they are in the folder itself now
            for path in (part / "optimizer").glob(f"shard-*-model-{i + 1:05d}-of-*"):
                path.unlink()
        for path in (part / "optimizer").glob("shard-*"):
            settle(path)
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
        raise unwritten(folder, model, error) from error
    discard(out / f"{name}.old")


def settle(path: Path) -> None:
    """Sort the two keys of a shard's metadata, which safetensors writes in an order of chance:
    equal states are to be equal files."""
    with open(path, "r+b") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= n
        file.seek(8)
        file.write(text.ljust(n))


class Saver:
    """Writes checkpoints beside the loop, one at a time; a save that fails ends the run.

    Where every rank has all, rank 0 writes. Where each has shards, each writes its own, weights and
    moments, by torch.distributed.checkpoint; then rank 0 makes of them the weights of a folder that
    anyone can read, one file after another.
    """

    def __init__(self, out: Path, model: ModelConfig, tokenizer: TokenizerFiles, parent: str | None,
                 keep: int | None, place: Place):
        """`parent`: sha256 of the state.json of the checkpoint before the next one."""
        self.out, self.model, self.tokenizer, self.parent = out, model, tokenizer, parent
        self.keep, self.place, self.pool = keep, place, ThreadPoolExecutor(1)
        self.pending: Future | None = None
        # Shards are agreed upon beside the loop, on a group that the loop's exchanges do not use.
        self.group = dist.new_group(backend="gloo", timeout=place.patience) if (
            place.sharded) else None
        mine = size_of(model) / (1 + len(MOMENTS)) / place.size("dp_shard", "tp", "pp")
        self.files = math.ceil(mine / (FILE_GB * 1e9))  # for one kind of tensors on each rank

    def take(self, name: str, model: Transformer, optimizer: torch.optim.Optimizer, random: Tensors
             ) -> None:
        """Copy all that changes to host memory, which the loop waits for, and for the save before:
        there is one copy at a time. Raises Stop(NUMERICAL) for shards that hold what is no number;
        a whole copy is looked at in work()."""
        self.wait()
        part = self.out / f"{name}.part"
        if self.place.rank == 0:
            shutil.rmtree(part, ignore_errors=True)  # what a killed save left
        if not self.place.sharded and self.place.rank:
            return
        weights, moments = owned(model, self.place), moments_of(optimizer)
        moments = {k: v for k, v in moments.items() if k.split(".", 1)[1] in weights}
        for key, tensor in (weights | moments).items():
            assert str(tensor.dtype) == f"torch.{MASTER}", f"{key} is {tensor.dtype}"
        if not self.place.sharded:
            self.copy = {kind: {key: tensor.detach().to("cpu", copy=True).contiguous()
                                for key, tensor in tensors.items()} for kind, tensors in
                         (("weights", weights), ("adamw", moments), ("random", random))}
            return
        odd = odd_names(weights | moments)
        if exchange([bool(odd)], self.place).any():  # and the old part is gone
            refuse(self.out / name, odd or ["a tensor of another rank"])
        tensors = {f"weights.{key}": p.detach() for key, p in weights.items()} | moments
        names = list(shapes_of(self.model))
        files = {f"{kind}.{key}": 1 + k * self.files + i * self.files // len(names)
                 for k, kind in enumerate(("weights", *MOMENTS)) for i, key in enumerate(names)}
        self.copy = {"random": random}
        self.shards = dcp.async_save(tensors, process_group=self.group, storage_writer=(
            dcp.HuggingFaceStorageWriter(str(part / "optimizer"), files, save_distributed=True)))

    def save(self, name: str, state: dict) -> None:
        """Begin to write what was taken."""
        if self.place.sharded or self.place.rank == 0:
            self.pending = self.pool.submit(self.work, name, state)

    def work(self, name: str, state: dict) -> None:
        copy, self.copy = self.copy, None
        state = state | {"parent": self.parent}
        if self.place.sharded:
            try:
                self.shards.result()
            except (CheckpointException, OSError) as error:
                if self.place.rank == 0:
                    shutil.rmtree(self.out / f"{name}.part", ignore_errors=True)  # for the room
                raise unwritten(self.out / name, self.model, error) from error
            if self.place.rank:
                return
            check_shards(self.out / f"{name}.part" / "optimizer", {
                f"{kind}.{key}": shape for kind in MOMENTS
                for key, shape in shapes_of(self.model).items()})
            write(self.out, name, self.whole(name), copy, self.files, state, self.model,
                  self.tokenizer)
        else:
            weights = copy.pop("weights")
            refuse(self.out / name, odd_names(weights | copy["adamw"]))
            write(self.out, name, lambda names: {one: weights[one] for one in names}, copy, 0,
                  state, self.model, self.tokenizer)
        if name != "last":  # which it takes the place of
            self.parent = sha256_file(self.out / name / "state.json")
            discard(self.out / "last")
            discard(self.out / "last.old")
            thin(self.out, state["visit"], self.keep)
        say(f"  saved {self.out / name}")

    def whole(self, name: str) -> Callable[[list[str]], Tensors]:
        """What gives the weights whole, from the shards that all ranks have written."""
        shapes = shapes_of(self.model)

        def read(names: list[str]) -> Tensors:
            found = {f"weights.{one}": torch.empty(shapes[one]) for one in names}
            read_shards(self.out / f"{name}.part" / "optimizer", found)
            return {key.removeprefix("weights."): tensor for key, tensor in found.items()}
        return read

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
        if self.group and not error:
            dist.destroy_process_group(self.group)
        if failed and failed is not error:
            if error and getattr(error, "code", 0) < 128:  # a signal's says that all was saved
                say(str(error))
            raise failed
