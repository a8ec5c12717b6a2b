"""The bill before the run: what a preparation will read, fetch and write."""

import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from nano360.config import CHECKPOINT, Config, Stop, say
from nano360.sources import PACKED, Corpus


def bill(config: Config, corpora: list[Corpus], folder: Path, n_chunks: int) -> None:
    """Say how much will be read, fetched and written. Raises Stop(CHECKPOINT) on too small a disk.

    Tokens are guessed from bytes: 2.5 to a token, and packed files hold 4 times their size. Sources
    that choose documents from the same files share them by weight. What is in the folder already,
    from before a kill, counts as written.
    """
    data, item = config.data, 2 if config.model.vocab_size <= 2**16 else 4
    amount = tqdm.format_sizeof
    files, readers = {}, Counter()  # by path; the weights of its sources
    for corpus in corpora:
        some = corpus.files[:n_chunks] if corpus.source.rows else corpus.files
        files |= {file.path: file for file in some}
        readers.update({file.path: corpus.source.weight for file in some})
    tokens = 0
    for corpus in corpora:
        passes = (corpus.source.epochs or 1) if corpus.source.fim_rate else 1
        share = corpus.source.weight * passes
        guess = sum((file.size or 0) * (4 if file.name.endswith(PACKED) else 1) / 2.5 * share
                    / readers[file.path] for file in corpus.files if file.path in files)
        tokens += min(guess, corpus.source.max_tokens or guess)
    read = sum(file.size or 0 for file in files.values())
    fetched = sum(file.size or 0 for file in files.values()
                  if file.remote is not None and not file.path.is_file())
    chunks = tokens * item
    if data.rows_per_chunk:
        chunks = n_chunks * data.rows_per_chunk * (config.model.seq_len + 1) * item
    needed = chunks + tokens * item + fetched * data.keep_downloads
    if corpora[0].source.rows:  # but for the chunks, what is needed goes after each
        needed = chunks + (chunks + fetched) / max(1, n_chunks)
    needed -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    say(f"reads {amount(read)}B in {len(files):,} file{'s' * (len(files) > 1)}"
        + f", {amount(fetched)}B of it fetched" * bool(fetched)
        + f"; writes about {amount(chunks)}B of rows, needs {amount(max(0, needed))}B of disk")
    if needed > free:
        raise Stop(CHECKPOINT, f"{folder.parent} has {amount(free)}B free, about {amount(needed)}B "
                   "are needed: make room, or give fewer chunks, or a source max_tokens; what is "
                   "finished stays")
