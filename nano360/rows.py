"""A data set as its readers see it: the manifest, the rows, their order, the tokenizer's files.

    manifest = read_manifest(Path("data/demo"))
    rows = open_rows(folder, manifest, chunk_name(3))      # (rows, seq_len + 1), checked
    order = permutation(len(rows), seed, epoch, chunk)     # in which a visit trains them

prepare.py writes data/<dataset>/ and describes what lies there; this is all that training,
evaluation and analysis need to know of it.
"""

import hashlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano360.config import DATA, Stop, say
from nano360.files import hash_json, is_locked, read_sealed, sha256_file

FORMAT = 1  # of data/<dataset>/: readers refuse another
FILE_ORDER, HELD_ORDER = 2**32 - 1, 2**32 - 2  # permutations that are no epoch's
HELD_OUT = -1  # the "epoch" of held-out rows in the provenance tables
PIECE_BYTES = "piece_bytes.npy"  # (vocab_size,) int64: UTF-8 bytes of text that each id stands for
PATIENCE = 5.0  # seconds between two looks for a chunk that is being made


def chunk_name(k: int) -> str:
    return f"train_{k:03d}.bin"


def valid_name(source: str) -> str:
    return f"valid_{source}.bin"


def permutation(n: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """The order (n,) int64 of n things: a pure function that no library release changes.

    Philox is specified to the bit (Salmon et al. 2011) and a stable argsort leaves no choice.
    """
    bits = np.random.Philox(key=seed << 64 | epoch << 32 | chunk)
    return np.argsort(bits.random_raw(n), kind="stable")


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared set, its seal checked. Raises Stop(DATA) if there is none."""
    if not folder.is_dir():
        raise Stop(DATA, f"{folder} not found here; make it first: python prepare.py CONFIG "
                   f"--dataset={folder.name}, or run in the folder that holds data/")
    manifest = read_sealed(folder / "manifest.json", DATA)
    if manifest["format"] != FORMAT:
        raise Stop(DATA, f"{folder} has format {manifest['format']}, this code reads {FORMAT}")
    return manifest


def awaited(folder: Path, manifest: dict, name: str, told: Callable[[], int]) -> dict | None:
    """What the manifest says of a file once it is there, while prepare.py is still at work."""
    began = time.monotonic()
    while (name not in (now := read_manifest(folder))["files"] or not (folder / name).is_file()
           ) and is_locked(folder):
        if number := told():
            raise Stop(128 + number, f"stopped by a signal, waiting for {folder / name}")
        if time.monotonic() - began < PATIENCE:
            say(f"waiting for {folder / name}, which prepare.py is making")
        time.sleep(PATIENCE)
    return now["files"].get(name) if now["data_hash"] == manifest["data_hash"] else None


def open_rows(folder: Path, manifest: dict, name: str, told: Callable[[], int] = int) -> np.ndarray:
    """The rows of a chunk, (rows, seq_len + 1), mapped from the file after it was checked.

    Checked are size, sha256, and that every id is one of the tokenizer's: a wrong id would
    otherwise end in the embedding, far from its cause. A chunk that is being made is waited for,
    until a signal is `told`. Raises Stop(DATA).
    """
    path, entry = folder / name, manifest["files"].get(name)
    if entry is None or not path.is_file():
        entry = awaited(folder, manifest, name, told)
    if entry is None or not path.is_file():
        raise Stop(DATA, f"{path} is missing; make it: python prepare.py CONFIG "
                   f"--dataset={folder.name}")
    dtype, T1 = np.dtype(manifest["dtype"]), manifest["seq_len"] + 1
    size, expected = path.stat().st_size, entry["rows"] * T1 * dtype.itemsize
    if size != expected:
        raise Stop(DATA, f"{path} has {size} bytes, expected {expected} ({entry['rows']} rows of "
                   f"{T1} {dtype}); prepare it again")
    if (digest := sha256_file(path)) != entry["sha256"]:
        raise Stop(DATA, f"{path} was changed: its sha256 is {digest}, the manifest says "
                   f"{entry['sha256']}; see python prepare.py CONFIG --verify")
    rows = open_tokens(path, dtype).reshape(-1, T1)
    limit = manifest["tokenizer"]["vocab_size"]
    if rows.size and (top := int(rows.max())) >= limit:
        at = int(rows.argmax())
        raise Stop(DATA, f"{path}: id {top} at row {at // T1}, token {at % T1} (byte "
                   f"{at * dtype.itemsize}), but the tokenizer has {limit} ids; prepare it again")
    return rows


def data_hash(recipe: dict, tokenizer: str) -> str:
    """Of a recipe and its tokenizer's sha256: another sentencepiece may train another one of it."""
    return hash_json(recipe | {"sha256": tokenizer})


def open_tokens(path: Path | str, dtype: str) -> np.ndarray:
    """The tokens of a file, (tokens,); mapped, not read."""
    return np.memmap(path, dtype, "r") if os.path.getsize(path) else np.zeros(0, dtype)


@dataclass(frozen=True)
class TokenizerFiles:
    """What training needs of a tokenizer: no text, only what prepare.py wrote of it."""
    files: dict[str, bytes]  # what a checkpoint's folder holds of it, by name
    eos: int
    piece_bytes: np.ndarray


def read_tokenizer_files(folder: Path, manifest: dict) -> TokenizerFiles:
    """The tokenizer's files of a data set, each as its manifest says. Raises Stop(DATA)."""
    spec = manifest["tokenizer"]
    if PIECE_BYTES not in manifest["files"]:  # prepared by a version that left them to training
        from nano360.tokenizer_json import tokenizer_files
        from nano360.tokenizers import load_tokenizer
        tokenizer = load_tokenizer(folder, spec["sha256"])
        return TokenizerFiles(tokenizer_files(tokenizer), tokenizer.eos, tokenizer.piece_bytes())
    hashes = {name: manifest["files"][name]["sha256"] for name in (
        PIECE_BYTES, "tokenizer.json", "tokenizer_config.json")} | {spec["file"]: spec["sha256"]}
    files = {}
    for name, expected in hashes.items():
        path = folder / name
        files[name] = path.read_bytes() if path.is_file() else b""
        digest = hashlib.sha256(files[name]).hexdigest()
        if digest != expected:
            raise Stop(DATA, f"{path} is missing or was changed: its sha256 is {digest}, the "
                       f"manifest says {expected}; prepare the set again")
    sizes = np.load(io.BytesIO(files.pop(PIECE_BYTES)), allow_pickle=False)
    return TokenizerFiles(files, spec["eos"], sizes)
