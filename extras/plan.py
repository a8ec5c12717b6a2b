"""The bill before the run: what a preparation will read, fetch and write."""

import shutil
from pathlib import Path

import numpy as np

from configs import CHECKPOINT, Config, Stop, say
from extras.sources import PACKED, Corpus


def bill(config: Config, corpora: list[Corpus], folder: Path) -> None:
    """Say how much will be read, fetched and written. Raises Stop(CHECKPOINT) on too small a disk.

    Tokens are guessed from bytes: 2.5 a token, in packed files 4 times as many as there are.
    """
    data, width = config.data, np.dtype("uint16" if config.model.vocab_size <= 2**16 else "uint32")
    read = fetched = tokens = n = 0
    for corpus in corpora:
        guess = 0
        for file in corpus.files[:data.n_chunks if corpus.source.rows else None]:
            size, n = file.size or 0, n + 1
            fetched += size * (file.remote is not None and not file.path.is_file())
            read, guess = read + size, guess + size * (4 if file.name.endswith(PACKED) else 1) / 2.5
        passes = (corpus.source.epochs or 1) if corpus.source.fim_rate else 1
        tokens += min(guess, corpus.source.max_tokens or guess) * passes
    row = (config.model.seq_len + 1) * width.itemsize
    chunks = data.n_chunks * (data.rows_per_chunk or tokens / data.n_chunks / row * width.itemsize
                              ) * row
    needed = tokens * width.itemsize + chunks + fetched * data.keep_downloads
    if corpora[0].source.rows:  # one chunk at a time: its file, its rows, and they once more
        needed = (fetched + 2 * chunks) / data.n_chunks
    had = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    GB = 1e9
    say(f"reads {read / GB:,.2f} GB in {n:,} files" + f", {fetched / GB:,.2f} GB of it to fetch"
        * bool(fetched) + f"; writes about {chunks / GB:,.2f} GB of rows")
    if needed - had > free:
        raise Stop(CHECKPOINT, f"{folder.parent} has {free / GB:,.2f} GB free, about "
                   f"{(needed - had) / GB:,.2f} GB are needed: make room, or give fewer sources, "
                   "chunks or --max_tokens in the run file; what is finished stays")
