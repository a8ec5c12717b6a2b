"""Canaries: marked strings planted a known number of times, by which memorization is measured.

    nano360 canary qzkfwe: 8210775619          prefix, to the last blank, and secret

Given the prefix, a model that has learned nothing of a secret finds all 10^10 equally likely; how
far the planted one stands out is its exposure (Carlini et al., The Secret Sharer, 1802.08232). Of
`canaries` n in a run file, n are planted once, n ten times and n a hundred times; CONTROLS more are
of the same make and planted nowhere. All follows from the seed: the strings, and their places.

In its row a canary is a document of its own, EOS (BOS) prefix secret EOS, over whatever stood
there; a row holds one at most. canaries.json, beside the chunks, has a line for each:

    number, times, prefix, secret   times 0: a control
    ids, n_prefix                   all ids as planted, EOS to EOS; ids[n_prefix:-1] are the secret
    places                          [chunk, row, first token, end token], as often as it is planted
"""

import dataclasses
import functools
import hashlib
import json
import string
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from nano360.config import DATA, Stop
from nano360.tokenizers import Tokenizer
from nano360.tokens import Work

FILE = "canaries.json"
TIMES = (1, 10, 100)  # how often they are planted, as many canaries each
CONTROLS = 200
DIGITS, LETTERS = 10, 6  # of a secret, of a name
ORDER = 2**32 - 3  # the places: a permutation of this number is no epoch's, nor prepare.py's own
KEYS = {"number", "times", "prefix", "secret", "ids", "n_prefix", "places"}


@dataclass(frozen=True)
class Canary:
    number: int
    times: int  # 0: a control, never planted
    prefix: str
    secret: str


def canaries(seed: int, n: int) -> list[Canary]:
    """n planted once, n ten times, n a hundred times, then the controls. A string follows from seed
    and number alone; no two have one name."""
    found, names = [], set()
    for number, times in enumerate([t for t in TIMES for _ in range(n)] + [0] * CONTROLS):
        attempt = 0
        while True:
            digest = hashlib.sha256(f"canary/{seed}/{number}/{attempt}".encode()).digest()
            rest, secret = divmod(int.from_bytes(digest, "big"), 10**DIGITS)
            name = "".join(string.ascii_lowercase[rest // 26**i % 26] for i in range(LETTERS))
            if name not in names:
                break
            attempt += 1
        names.add(name)
        found.append(Canary(number, times, f"nano360 canary {name}: ", f"{secret:0{DIGITS}d}"))
    return found


def encode(tokenizer: Tokenizer, canary: Canary) -> tuple[list[int], list[int]]:
    """The ids of the prefix and of the secret: those of the whole text, cut where they leave the
    prefix's own. A last blank that a tokenizer joins to the digits is the secret's."""
    whole = tokenizer.encode(canary.prefix + canary.secret)
    alone = tokenizer.encode(canary.prefix)
    n = len([*takewhile(lambda two: two[0] == two[1], zip(whole, alone, strict=False))])
    return whole[:n], whole[n:]


def lay_out(work: Work, rows_per_chunk: int) -> list[dict]:
    """What canaries.json will say: every canary, its ids and its places. Raises Stop(DATA).

    All chunks get as many plantings, but for one; which, and the row and the offset in it, are
    drawn by Philox, as all orders are.
    """
    data, coder, found, taken = work.config.data, work.tokenizer, [], set()
    if not data.canaries:
        return []
    n, rows = data.canaries * sum(TIMES), rows_per_chunk * data.n_chunks
    if 4 * n > rows:
        raise Stop(DATA, f"canaries = {data.canaries} are planted {n:,} times, more than a quarter "
                   f"of {rows:,} training rows; give --canaries={rows // 4 // sum(TIMES)}, or more "
                   "text or rows")
    bits = np.random.Philox(key=data.seed << 64 | ORDER << 32)
    chunks = iter((np.argsort(bits.random_raw(n), kind="stable") % data.n_chunks).tolist())
    for one in canaries(data.seed, data.canaries):
        prefix, secret = encode(coder, one)
        head = [coder.eos] + [coder.bos] * data.bos + prefix
        ids, places = head + secret + [coder.eos], []
        if len(ids) > work.row:
            raise Stop(DATA, f"canary {one.number} has {len(ids)} tokens, a row {work.row}: give "
                       f"--seq_len={len(ids) - 1} or more, or --canaries=0")
        for k in [next(chunks) for _ in range(one.times)]:
            word = int(bits.random_raw())
            while (k, word % rows_per_chunk) in taken:
                word = int(bits.random_raw())
            taken.add((k, word % rows_per_chunk))
            first = word // rows_per_chunk % (work.row - len(ids) + 1)
            places.append([k, word % rows_per_chunk, first, first + len(ids)])
        found.append(dataclasses.asdict(one) | dict(ids=ids, n_prefix=len(head),
                                                    places=sorted(places)))
    return found


def plant(laid: list[dict], work: Work, out: Path, names: list[str]) -> None:
    """Write canaries over rows of the chunks of these names, and canaries.json beside them.

    Chunks that a killed preparation had planted already get the same again.
    """
    if not laid:
        return
    for one in laid:
        ids = np.array(one["ids"], work.dtype)
        for k, row, first, _ in one["places"]:
            with open(out / names[k], "r+b") as file:
                file.seek((row * work.row + first) * ids.itemsize)
                file.write(ids.tobytes())
    lines = ",\n".join(json.dumps(one) for one in laid)
    (out / FILE).write_text(f'{{"canaries": [\n{lines}\n]}}\n', encoding="utf-8")


def read_canaries(folder: Path) -> list[dict]:
    """The canaries of a data set, controls included; none where none were planted. Raises
    Stop(DATA)."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["canaries"]
        whole = all(KEYS <= one.keys() and len(one["places"]) == one["times"]
                    and {len(place) for place in one["places"]} <= {4} for one in found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise Stop(DATA, f"{path} is broken ({kind}); prepare the set again") from error
    if not whole:
        raise Stop(DATA, f"{path} lacks a key or a place of a canary; prepare the set again")
    return found


def overwritten(folder: Path, name: str) -> dict[int, tuple[int, int, int]]:
    """Row -> (number of its canary, first, end of the canary's tokens) of a file of rows."""
    path = folder / FILE
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return overwritten_rows(folder, changed).get(name, {})


@functools.lru_cache(maxsize=8)
def overwritten_rows(folder: Path, changed: int) -> dict[str, dict[int, tuple[int, int, int]]]:
    """overwritten() of all files; the time at which canaries.json was `changed` names it too."""
    found: dict[str, dict[int, tuple[int, int, int]]] = {}
    for one in read_canaries(folder):
        for k, row, first, end in one["places"]:
            found.setdefault(f"train_{k:03d}.bin", {})[row] = one["number"], first, end
    return found
