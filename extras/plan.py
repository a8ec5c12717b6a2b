"""The bill before the run: what a preparation will read, fetch and write."""

import shutil
from pathlib import Path

from tqdm import tqdm

from configs import CHECKPOINT, Config, Stop, say
from extras.sources import PACKED, Corpus


def amount(n: float) -> str:
    return tqdm.format_sizeof(n, "B")


def bill(config: Config, corpora: list[Corpus], folder: Path) -> None:
    """Say how much will be read, fetched and written. Raises Stop(CHECKPOINT) on too small a disk.

    Tokens are guessed from bytes: 2.5 to a token, and packed files hold 4 times their size. What is
    in the folder already, from before a kill, counts as written.
    """
    data, item = config.data, 2 if config.model.vocab_size <= 2**16 else 4
    read = fetched = tokens = n = 0
    for corpus in corpora:
        guess = 0
        for file in corpus.files[:data.n_chunks if corpus.source.rows else None]:
            size, n = file.size or 0, n + 1
            fetched += size * (file.remote is not None and not file.path.is_file())
            read, guess = read + size, guess + size * (4 if file.name.endswith(PACKED) else 1) / 2.5
        passes = (corpus.source.epochs or 1) if corpus.source.fim_rate else 1
        tokens += min(guess, corpus.source.max_tokens or guess) * passes
    chunks = tokens * item
    if data.rows_per_chunk:
        chunks = data.n_chunks * data.rows_per_chunk * (config.model.seq_len + 1) * item
    needed = tokens * item + chunks + fetched * data.keep_downloads
    if corpora[0].source.rows:  # chunk after chunk: the file of one, its rows, and they once more
        needed = (fetched + 2 * chunks) / data.n_chunks
    had = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    say(f"reads {amount(read)} in {n:,} file{'s' * (n > 1)}" + f", {amount(fetched)} of it fetched"
        * bool(fetched) + f"; writes about {amount(chunks)} of rows")
    if needed - had > free:
        raise Stop(CHECKPOINT, f"{folder.parent} has {amount(free)} free, about "
                   f"{amount(needed - had)} are needed: make room, or give fewer chunks, or"
                   " a source max_tokens; what is finished stays")
