"""Files -> documents: what prepare.py reads. Sources are files and folders of .txt .md .py .jsonl,
and the standard library of the running Python, which is there without a download.

    corpus = open_corpus(source, config.data)
    for number, line, parts in documents(corpus, config.data, specials): ...
    for number, line, text, first, last in pieces(corpus, config.data, specials): ...
"""

import ast
import codecs
import collections
import dataclasses
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs import DATA, USAGE, DataConfig, Source, Stop

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
PART = 1 << 20  # bytes or characters read at once
TOKENIZER_SAMPLE = 8_000_000  # characters a new tokenizer is trained on
BLOCK = 1 << 20  # characters tokenized at once: bounds memory, and no document is too long


@dataclass
class Corpus:
    """The files of one source, and what was noticed in them."""
    source: Source
    files: list[tuple[str, Path]]  # name below the source's root, where it is
    kind: str  # text; or code, prose: the two halves of the standard library
    revision: str  # sha256 over the names and contents of all files
    notes: collections.Counter


def scan(path: Path, encoding: str) -> tuple[str, int | None]:
    """A file's sha256, and the offset of the first byte that is not text (None: all of it is)."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        "".encode(encoding)  # hex and the like are codecs, but none of text
    except LookupError as error:
        raise Stop(USAGE, f"--encoding: {error}; expected a name such as utf-8, latin-1") from error
    digest, at, bad = hashlib.sha256(), 0, None
    with open(path, "rb") as file:
        while block := file.read(PART):
            digest.update(block)
            pending = len(decoder.getstate()[0])  # bytes of a character that began before
            try:
                if bad is None:
                    decoder.decode(block)
            except UnicodeError as error:  # utf-16 without its mark has no start
                bad = at - pending + getattr(error, "start", 0)
            at += len(block)
    if bad is None and decoder.getstate()[0]:
        bad = at - len(decoder.getstate()[0])
    return digest.hexdigest(), bad


def find_files(source: Source) -> tuple[list[tuple[str, Path]], str]:
    """(name, path) of a source's files in the order of their names, and their kind."""
    if source.path in ("stdlib:code", "stdlib:prose"):
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (p.relative_to(root) for p in root.rglob("*.py"))
        names = [p.as_posix() for p in paths
                 if not {"site-packages", "dist-packages", "__pycache__"} & set(p.parts)]
        # A file gives either its code or its docstrings, by the hash of its path, so that neither
        # source contains the other. The language reference in pydoc_data is prose.
        prose = {n for n in names if hashlib.sha256(n.encode()).digest()[0] % 2
                 or n == "pydoc_data/topics.py"}
        chosen = prose if source.path == "stdlib:prose" else set(names) - prose
        return [(n, root / n) for n in sorted(chosen)], source.path.removeprefix("stdlib:")
    root = Path(source.path)
    if not root.exists():
        raise Stop(DATA, f"source {source.name}: {root} not found; expected a file or folder of "
                   f"{' '.join(SUFFIXES)}")
    below = [root] if root.is_file() else sorted(
        p for p in root.rglob("*") if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts))
    files = [(p.name if root.is_file() else p.relative_to(root).as_posix(), p)
             for p in below if p.suffix.lower() in SUFFIXES]
    if not files:
        seen = ", ".join(p.name for p in below[:5]) or "an empty folder"
        raise Stop(DATA, f"source {source.name}: no {' '.join(SUFFIXES)} in {root}, only {seen}")
    return files, "text"


def open_corpus(source: Source, data: DataConfig) -> Corpus:
    """Find, hash and check the files of a source. Raises Stop(DATA) where one is not text."""
    files, kind = find_files(source)
    corpus = Corpus(source, [], kind, "", collections.Counter())
    revision = hashlib.sha256()
    for name, path in files:
        digest, bad = scan(path, data.encoding if kind == "text" else "utf-8")
        revision.update(f"{digest}  {name}\n".encode())
        if bad is None:
            corpus.files.append((name, path))
        elif kind == "text":
            skip_bad(corpus.notes, data.max_bad_documents, f"{path}: byte {bad} is not "
                     f"{data.encoding}; give --encoding=NAME, or --max_bad_documents=N to skip it")
        else:
            corpus.notes["not_text"] += 1  # files that test how Python reads files
    corpus.revision = revision.hexdigest()
    return corpus


def skip_bad(notes: collections.Counter, limit: int, message: str) -> None:
    """Count a document that cannot be read; past the limit, stop."""
    notes["bad"] += 1
    if notes["bad"] > limit:
        raise Stop(DATA, message)


def docstrings(text: str, name: str, notes: collections.Counter) -> Iterator[tuple[int, str]]:
    """(line, text) of a Python file's prose: its docstrings as one document, or its topics."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # files that test the parser
        notes["not_python"] += 1
        return
    if name == "pydoc_data/topics.py":  # one dict: topic -> text
        texts = [v for d in ast.walk(tree) if isinstance(d, ast.Dict) for v in d.values]
        yield from ((v.lineno, v.value) for v in texts if isinstance(v, ast.Constant))
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node.body[0].lineno, doc) for node in ast.walk(tree) if isinstance(node, kinds)
             if (doc := ast.get_docstring(node))]
    if found:
        found.sort(key=lambda one: one[0])
        yield found[0][0], "\n\n".join(doc for _, doc in found)


def clean(texts: Iterator[str], specials: list[str],
          notes: collections.Counter) -> Iterator[str]:
    """A document's text as it is trained on; every change, and what looks odd, is counted.

    A byte order mark goes, CRLF becomes LF, a lone surrogate U+FFFD. NUL and the names of special
    tokens stay: they are text. U+2581 stays too, but sentencepiece will take it for a blank.
    """
    for i, text in enumerate(texts):
        if i == 0 and text.startswith("\ufeff"):
            text, notes["bom"] = text[1:], notes["bom"] + 1
        if "\r\n" in text:
            notes["crlf"] += text.count("\r\n")
            text = text.replace("\r\n", "\n")
        if not text.isascii() and (lone := re.findall("[\ud800-\udfff]", text)):
            notes["surrogates"] += len(lone)
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        for char, name in (("\0", "nul"), ("▁", "lower_block")):
            if char in text:
                notes[name] += text.count(char)
        for special in specials:
            if special in text:
                notes["special_text"] += text.count(special)
        yield text


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """A text file in parts; a CR is never parted from its LF."""
    with open(path, encoding=encoding, newline="") as file:
        while part := file.read(PART):
            yield part + file.read(1) if part.endswith("\r") else part


def json_lines(path: Path, data: DataConfig,
               notes: collections.Counter) -> Iterator[tuple[int, str]]:
    """(line, text) of a .jsonl file; blank lines are passed over."""
    wanted, limit = data.text_key, data.max_bad_documents
    with open(path, encoding=data.encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip("\ufeff\r\n\t "):
                continue
            if line.startswith("\ufeff"):
                line, notes["bom"] = line[1:], notes["bom"] + 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                skip_bad(notes, limit, f"{path}:{number}: broken json ({error}): "
                         f"{line[:80].strip()} (--max_bad_documents=N skips such lines)")
                continue
            text = row.get(wanted) if isinstance(row, dict) else None
            if isinstance(text, str):
                yield number, text
            else:
                keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                skip_bad(notes, limit, f"{path}:{number}: no text under {wanted!r}, the line has "
                         f"{keys}; give --text_key=NAME")


def documents(corpus: Corpus, data: DataConfig, specials: list[str]
              ) -> Iterator[tuple[int, int, Iterator[str]]]:
    """(number of the file, line, text in parts) of every document of a source, in order."""
    notes = corpus.notes
    for number, (name, path) in enumerate(corpus.files):
        if corpus.kind == "prose":
            found = docstrings(path.read_text(encoding="utf-8"), name, notes)
        elif path.suffix.lower() == ".jsonl":
            found = json_lines(path, data, notes)
        else:
            encoding = "utf-8" if corpus.kind == "code" else data.encoding
            yield number, 1, clean(read_text(path, encoding), specials, notes)
            continue
        for line, text in found:
            yield number, line, clean(iter([text]), specials, notes)


def is_blank(char: str) -> bool:
    return char.isspace() or char == "▁"  # which sentencepiece takes for a blank


def blocks(texts: Iterator[str] | list[str]) -> Iterator[str]:
    """Cut a text that comes in parts into pieces of about BLOCK characters, never an empty one.

    Cuts fall in front of a blank that follows a non-blank, where no piece of a sentencepiece BPE
    crosses: the ids are those of the whole text. Only BLOCK characters without one are cut blindly.
    """
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > BLOCK:
            cut = BLOCK
            while cut > BLOCK // 2 and not (rest[cut] == " " and not is_blank(rest[cut - 1])):
                cut -= 1
            cut = cut if cut > BLOCK // 2 else BLOCK
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def pieces(corpus: Corpus, data: DataConfig, specials: list[str]
           ) -> Iterator[tuple[int, int, str, bool, bool]]:
    """(number of the file, line, text, first, last) of every piece of every document, in order.

    Documents of blanks alone are passed over and counted.
    """
    for number, line, parts in documents(corpus, data, specials):
        cut = blocks(parts)
        text, following = next(cut, ""), next(cut, None)
        if following is None and not text.strip():
            corpus.notes["blank"] += 1
            continue
        first = True
        while text is not None:
            corpus.notes["bytes"] += len(text.encode())
            yield number, line, text, first, following is None
            text, following, first = following, next(cut, None), False


def is_held_out(data: DataConfig, source: str, file: str, line: int) -> bool:
    """By the hash of where a document came from: nothing else in the set moves it."""
    digest = hashlib.sha256(f"{data.seed}/{source}/{file}:{line}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.valid_share * 2**64


def no_documents(corpus: Corpus) -> Stop:
    return Stop(DATA, f"source {corpus.source.name}: 0 documents in {corpus.source.path}: "
                f"{len(corpus.files)} files, nothing but blanks in them")


def sample_text(corpus: Corpus, data: DataConfig) -> Iterator[str]:
    """Text to train a tokenizer on: a source's first documents, without those it will hold out."""
    unheard, limit = dataclasses.replace(corpus, notes=collections.Counter()), TOKENIZER_SAMPLE
    limit *= corpus.source.weight / sum(source.weight for source in data.sources)
    found, size = [], 0
    for number, line, parts in documents(unheard, data, []):
        text = next(blocks(parts), "")  # enough of a long one
        found.append((is_held_out(data, corpus.source.name, corpus.files[number][0], line), text))
        size += len(text)
        if size > limit:
            break
    if not any(text.strip() for _, text in found):
        raise no_documents(corpus)
    heard = [text for held, text in found if not held]
    return iter(heard or [text for _, text in found])
