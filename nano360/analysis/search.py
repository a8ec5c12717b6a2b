"""Where a text lies in the rows of a data set: what analyze.py trace asks.

    find_text(folder, manifest, tokenizer, text)   # the parts of rows that hold it

It is looked for as ids: its first and last word are left out, which inside a document may be other
pieces, and of what is left some ids are sought in all chunks, as fast as memory gives them. Where
one is found the ids around it are compared, then the rows that the text runs on in are looked up,
at last its bytes are compared, first and last word too. Where filling in the middle has cut the
text in two, it is not the same ids, and is not found.

Chunks must have the right size, but their sha256 is not computed: it takes longer than a search.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from nano360.analysis.canaries import overwritten
from nano360.analysis.provenance import (Part, epochs_of, is_release, origins_of, shares_stream,
                                         stream_rows, stride_of)
from nano360.config import DATA, USAGE, Stop, say
from nano360.rows import HELD_OUT
from nano360.tokenizer_json import JsonTokenizer
from nano360.tokenizers import Tokenizer

FEWEST = 4  # ids: fewer are found everywhere
ANCHOR, PLACES = 16, 8  # ids of an anchor; pairs of anchors spread over a text
BLOCK = 1 << 18  # ids compared at once: they and what comes out stay in the cache
STRETCH = 1 << 24  # ids that a thread takes on


@dataclass(frozen=True)
class Wanted:
    """A text: ids (n,) that any document with it has, and the bytes before and after them."""
    ids: np.ndarray
    head: bytes
    tail: bytes


# ---- a text as ids -------------------------------------------------------------------------------

def spell(tokenizer: Tokenizer | JsonTokenizer, i: int) -> bytes:
    """The bytes of text that an id stands for; none of a special token, or of what is no id."""
    if not 0 <= i < tokenizer.vocab_size or i in tokenizer.special_tokens.values():
        return b""
    if tokenizer.kind == JsonTokenizer.kind:
        return tokenizer.pieces[i]
    if tokenizer.kind == "tiktoken":
        return tokenizer.coder.decode_single_token_bytes(i)
    piece = tokenizer.coder.id_to_piece(i)
    return (bytes([int(piece[3:5], 16)]) if tokenizer.coder.is_byte(i)
            else piece.replace("▁", " ").encode())


def plain(text: str) -> str:
    """A text in one line, with all spelled out that a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_wanted(tokenizer: Tokenizer | JsonTokenizer, text: str) -> Wanted:
    """What to look for, from a word's start to a word's start; without blanks in the text, all but
    the first and last piece. Raises Stop if that is too little.

    As the tokenizer may normalize, it is the text of the ids that counts from here on.
    """
    ids = tokenizer.encode(text.replace("\r\n", "\n"), first=False)
    pieces = [spell(tokenizer, i) for i in ids]
    words = [i for i in range(1, len(ids))
             if pieces[i].startswith(b" ") and not pieces[i - 1][-1:].isspace()]
    end = len(ids) - 1
    first = words[0] if words and end - words[0] >= FEWEST else 1
    end = words[-1] if words and words[-1] - first >= FEWEST else end
    if end - first < FEWEST:
        raise Stop(USAGE, f"the text is too short to look for: it has {max(0, end - first)} tokens "
                   f"without its first and last, expected {FEWEST} or more; give a longer one")
    return Wanted(np.array(ids[first:end]), b"".join(pieces[:first]), b"".join(pieces[end:]))


# ---- ids in files --------------------------------------------------------------------------------

def open_files(folder: Path, manifest: dict) -> dict[str, np.ndarray]:
    """The rows of every file that is here, (rows, seq_len + 1), not verified. Raises Stop."""
    found, T1, dtype = {}, manifest["seq_len"] + 1, np.dtype(manifest["dtype"])
    for name, entry in manifest["files"].items():
        if not name.endswith(".bin"):
            continue
        path, size = folder / name, entry["rows"] * T1 * dtype.itemsize
        if not path.is_file() and is_release(manifest):
            say(f"{path} is not here: what it holds cannot be told")
            continue
        if not path.is_file() or path.stat().st_size != size:
            raise Stop(DATA, f"{path} is missing or has not {size} bytes; see python prepare.py "
                       "CONFIG --verify")
        rows = np.asarray(np.memmap(path, dtype, "r")) if size else np.zeros(0, dtype)
        found[name] = rows.reshape(-1, T1)
    return found


def anchors_of(ids: np.ndarray, counts: np.ndarray) -> dict[int, list[tuple[int, list[int]]]]:
    """id -> (its place in the text, places of its anchor's ids, the rarest first) of all anchors.

    They come in pairs, as a row's end may cut one of two, from one end of the text to the other. Of
    each the rarest id is looked for; `counts` (vocab_size,) say which it is.
    """
    found, size = {}, min(2 * ANCHOR, len(ids))
    for start in np.linspace(0, len(ids) - size, min(PLACES, len(ids) // size)).astype(int):
        for first in (start, start + size // 2):
            order = sorted(range(first, first + size // 2), key=lambda c: counts[ids[c]])
            found.setdefault(int(ids[order[0]]), []).append((order[0], order))
    return found


def scan(ids: np.ndarray, anchors: dict, job: tuple[str, np.ndarray, int]
         ) -> set[tuple[str, int, int]]:
    """(file, row, token of the row that the text's first id would be) of every anchor that is whole
    in a row of a stretch."""
    name, rows, start = job
    T1, tokens, found = rows.shape[1], rows.reshape(-1), set()
    hits = {i: [np.zeros(0, int)] for i in anchors}
    for at in range(start, min(start + STRETCH, len(tokens)), BLOCK):
        block = tokens[at:at + BLOCK]
        for i, some in hits.items():
            some.append(np.flatnonzero(block == i) + at)
    for i, places in anchors.items():
        every = np.concatenate(hits[i])
        for place, order in places:
            low, high, here = min(order), max(order), every - place  # where the text would begin
            here = here[(here + low >= 0) & (here + high < len(tokens))]
            for c in order[1:]:
                here = here[tokens[here + c] == ids[c]]
            row = (here + low) // T1
            here, row = (one[(here + high) // T1 == row] for one in (here, row))
            found |= {(name, int(r), int(h)) for r, h in zip(row, here - row * T1, strict=True)}
    return found


def seek(ids: np.ndarray, files: dict[str, np.ndarray]) -> list[tuple[str, int, int]]:
    some = next((rows for rows in files.values() if rows.size), ids)
    counts = np.bincount(some.reshape(-1)[:BLOCK], minlength=int(ids.max()) + 1)
    jobs = [(name, rows, start) for name, rows in files.items()
            for start in range(0, rows.size, STRETCH)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets the other threads run
        return sorted(set(chain(*pool.map(partial(scan, ids, anchors_of(ids, counts)), jobs))))


# ---- a hit, and the text around it ---------------------------------------------------------------

def reach(tokenizer: Tokenizer | JsonTokenizer, ids: list[int], text: bytes, back: bool
          ) -> int | None:
    """How many of these ids it takes to spell a text, forward or backward; None if they do not.
    An id -1 is not here: what comes before it has to do."""
    got, used = b"", 0
    for i in ids:
        if len(got) >= len(text) or i == -1:
            break
        if not (piece := spell(tokenizer, i)):
            return None
        got, used = piece + got if back else got + piece, used + 1
    n = min(len(got), len(text))
    same = got[-n:] == text[-n:] if back else got[:n] == text[:n]
    return used if same or not n else None


def confirm(tokenizer: Tokenizer | JsonTokenizer, want: Wanted, at: int, files: dict,
            rows: list[tuple[int, Part]], begins: bool) -> list[Part]:
    """The parts that hold the text, if it is it, whose first id would be token `at` of a stream.

    `rows` are those parts of the stream that are here; `begins`: nothing is before its token 0.
    """
    h, n = len(want.head), len(want.ids)
    known = np.full(h + n + len(want.tail), -1)
    if begins:
        known[:max(0, h - at)] = -2
    for token, part in rows:
        low, high = max(token, at - h), min(token + part.end - part.first, at - h + len(known))
        if low < high and part.name in files:
            ids = files[part.name][part.row, part.first:part.end]
            known[low - at + h:high - at + h] = ids[low - token:high - token]
    there = known[h:h + n] >= 0
    if there.sum() < FEWEST or (known[h:h + n] != want.ids)[there].any():
        return []
    before = reach(tokenizer, known[:h][::-1].tolist(), want.head, True)
    after = reach(tokenizer, known[h + n:].tolist(), want.tail, False)
    if before is None or after is None:
        return []
    cut = [(part, part.first + max(0, at - before - token),
            min(part.end, part.first + at + n + after - token)) for token, part in rows]
    return [Part(part.name, part.row, first, end) for part, first, end in cut
            if first < end and part.name in files]


def find_text(folder: Path, manifest: dict, tokenizer: Tokenizer | JsonTokenizer, text: str
              ) -> list[Part]:
    """All parts of rows, held-out ones too, that hold a text or as much of it as is in the set.

    Where the next row is not there (it was left out, or the rows are a release's, which stand
    alone), what is in a row counts if it holds a whole anchor, up to 16 ids.
    """
    want, files, found = read_wanted(tokenizer, text), open_files(folder, manifest), set()
    T1, streams = manifest["seq_len"] + 1, set()
    for name, row, at in seek(want.ids, files):
        origins = None if is_release(manifest) else origins_of(folder, name)
        if origins is None:
            found |= {*confirm(tokenizer, want, at, files, [(0, Part(name, row, 0, T1))], False)}
            continue
        _, first, end = overwritten(folder, name).get(row, (-1, 0, 0))
        if first <= at < end:  # it is a canary's text, which is in no stream
            found |= {*confirm(tokenizer, want, at, files, [(first, Part(name, row, first, end))],
                               False)}
        source, epoch, number = map(int, origins[row])
        all_of_it = epoch == HELD_OUT and shares_stream(manifest, source)
        for e in epochs_of(manifest, manifest["sources"][source]["name"]) if all_of_it else [epoch]:
            streams.add((source, e, number * stride_of(manifest) + at))
    for source, epoch, at in sorted(streams):
        rows = stream_rows(folder, manifest, source, epoch, at - len(want.head),
                           at + len(want.ids) + len(want.tail))
        found |= {*confirm(tokenizer, want, at, files, rows, True)}
    return sorted(found)
