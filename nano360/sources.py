"""Files -> documents: what prepare.py reads, wherever it lies.

    corpus = open_corpus(source, config.data, listing, made)   # which files there are
    file = at_hand(corpus, number, config.data)                # fetched, if it is elsewhere
    for line, begins, ends, parts in documents(span, corpus.kind, source, ...): ...

A source is a file or a folder of .jsonl, .parquet and text (.gz and .zst of the first and the last
too), such files at https:// or in a data set of Hugging Face's hub, or the standard library of the
running Python, which is there without a download.
"""

import ast
import codecs
import collections
import contextlib
import dataclasses
import fnmatch
import gzip
import hashlib
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TextIO
from urllib.parse import quote

from tqdm import tqdm

from nano360.config import DATA, ENVIRONMENT, USAGE, DataConfig, Source, Stop
from nano360.files import sha256_file, write_atomic

TEXT = (".txt .md .rst .tex .html .css .js .ts .py .ipynb .c .h .cc .cpp .hpp .cu .cs .java .go "
        ".kt .rs .rb .php .pl .lua .r .jl .hs .scala .swift .sh .sql").split()
LINES = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)  # how the name of a file of lines ends
PACKED = (".gz", ".zst", ".parquet")  # what can only be read from its beginning
DOWNLOADS = Path("data/downloads")
PART = 1 << 19  # bytes or characters read at once
LONGEST = 1 << 27  # characters of a line: a bomb of zeros is longer, and would fill the memory


@dataclass(frozen=True)
class Remote:
    """A file that can be fetched, and what is known of its content."""
    name: str  # path below the source's root, checked to stay inside
    url: str
    size: int | None  # bytes, None: unknown
    sha256: str = ""  # known for large files of the hub
    blob: str = ""  # of its small files: git's sha1
    etag: str = ""  # of a plain URL: what identifies its content


@dataclass(frozen=True)
class File:
    """A file of a source. What is not known of one that is elsewhere is None or empty."""
    name: str  # below the source's root
    path: Path  # where it is, or will be
    size: int | None
    sha256: str
    marks: tuple[tuple[int, int], ...] = ()  # (byte, line) where it may be cut
    remote: Remote | None = None


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file, which begin in this line."""
    name: str
    path: str
    start: int
    end: int
    size: int  # of the whole file
    line: int = 1


@dataclass
class Corpus:
    """The files of one source, and what was noticed in them."""
    source: Source
    files: list[File]
    kind: str  # text; or code, prose: the two halves of the standard library
    revision: str  # what its content follows from: a commit, or a sha256 over all files
    notes: collections.Counter


# ---- which files ---------------------------------------------------------------------------------

def scan(path: Path, encoding: str) -> tuple[str, int | None, tuple[tuple[int, int], ...]]:
    """A file's sha256, the offset of the first byte that is no text (None: all is), and its marks.

    A file of lines may be cut between them, a text in front of a blank that follows a letter.
    """
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
        # Bytes may be searched for line ends and blanks where these are the bytes of ASCII.
        cut = rb"\n" if LINES.search(path.name) else rb"[!-~](?= )"
        cut = re.compile(cut if " \n".encode(encoding) == b" \n" else b"(?!)")
    except LookupError as error:
        raise Stop(USAGE, f"--encoding: {error}; expected a name such as utf-8, latin-1") from error
    digest, at, bad, line, marks = hashlib.sha256(), 0, None, 1, []
    with open(path, "rb") as file:
        while block := file.read(PART):
            digest.update(block)
            # a twentieth of the way apart: some hundred in a GB; at most 32 MB: a worker's memory
            far = not marks or at - marks[-1][0] >= min(at // 20, 1 << 25) - PART
            if far and (found := cut.search(block)):
                marks.append((at + found.end(), line + block.count(b"\n", 0, found.end())))
            line += block.count(b"\n")
            pending = len(decoder.getstate()[0])  # bytes of a character that began before
            try:
                if bad is None:
                    decoder.decode(block)
            except UnicodeError as error:  # utf-16 without its mark has no start
                bad = at - pending + getattr(error, "start", 0)
            at += len(block)
    if bad is None and decoder.getstate()[0]:
        bad = at - len(decoder.getstate()[0])
    return digest.hexdigest(), bad, tuple(marks)


def library_files(half: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of the standard library that give their code, or their prose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (p.relative_to(root) for p in root.rglob("*.py"))
    names = [p.as_posix() for p in paths
             if not {"site-packages", "dist-packages", "__pycache__"} & set(p.parts)]
    # A file gives either its code or its docstrings, by the hash of its path, so that neither
    # source contains the other. The language reference in pydoc_data is prose.
    prose = {n for n in names if hashlib.sha256(n.encode()).digest()[0] % 2
             or n == "pydoc_data/topics.py"}
    return [(n, root / n) for n in sorted(prose if half == "prose" else set(names) - prose)]


def is_readable(name: str) -> bool:
    bare = name.lower().removesuffix(".gz").removesuffix(".zst")
    return bare.endswith((".jsonl", *TEXT)) or name.lower().endswith(".parquet")


def choose(source: Source, names: Iterable[str]) -> list[str]:
    """The names that a source's pattern and subset leave, in their order. Raises Stop(DATA)."""
    seen = sorted(names)
    found = [n for n in seen if (fnmatch.fnmatchcase(n, source.files) if source.files
                                 else is_readable(n))]
    if not found:
        some = ", ".join(seen[:5]) or "an empty folder"
        what = source.files or "file of a kind known here (.jsonl .parquet .txt .md .py ...)"
        raise Stop(DATA, f"source {source.name}: no {what} in {source.path}, only {some}")
    taken = {"all": found, "even": found[::2], "odd": found[1::2],
             "tenth": found[:len(found) // 10]}[source.subset]
    if not taken:
        raise Stop(DATA, f"source {source.name}: the {source.subset} of {len(found)} files, first "
                   f"{found[0]}, is none; expected 10 or more for a tenth, 2 for odd: leave it out")
    return taken


def find_files(source: Source) -> tuple[list[tuple[str, Path]], str]:
    """(name, path) of a source's files on this machine, and their kind."""
    if source.path in ("stdlib:code", "stdlib:prose"):
        half = source.path.removeprefix("stdlib:")
        return library_files(half), half
    root = Path(source.path)
    if not root.exists():
        raise Stop(DATA, f"source {source.name}: {root} not found; expected a file or folder of "
                   ".jsonl .parquet .txt .md .py ...")
    below = {root.name: root} if root.is_file() else {
        p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts)}
    return [(name, below[name]) for name in choose(source, below)], "text"


def find_remote(source: Source) -> tuple[str, list[Remote]]:
    """What is at a source's URL or in its data set, and what its content follows from."""
    from nano360.hub.fetch import ask, list_hub, list_urls
    scheme, _, rest = source.path.partition(":")
    if scheme == "hf":
        repo, _, revision = rest.partition("@")
        return list_hub(repo, revision, source.files)
    found = list_urls(rest, source.files) if scheme == "list" else [ask(source.path)]
    facts = "".join(f"{one.url} {one.size} {one.etag}\n" for one in found)
    return hashlib.sha256(facts.encode()).hexdigest(), found


def shown(url: str) -> str:
    """A URL as messages and files may hold it: without user, password, query, escape codes."""
    bare = re.sub(r"^([^/?#]*//)[^/?#]*@", r"\1", re.split("[?#]", url)[0])
    return quote(bare, safe="%/:@!$&'()*+,;=~[]")


def is_remote(source: Source) -> bool:
    return source.path.startswith(("hf:", "list:", "https:", "http:"))


def open_corpus(source: Source, data: DataConfig, listing: Path, made: bool) -> Corpus:
    """Find the files of a source, and check those that are here. Raises Stop(DATA).

    What is elsewhere is listed once, into the file `listing`: a preparation that goes on tomorrow
    goes on with the same revision. That of a set that is `made` is not written again.
    """
    if is_remote(source):
        from nano360.hub.fetch import inside
        asked = dict(path=shown(source.path), files=source.files, subset=source.subset)
        kept = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
        if kept.get("asked") != asked and made:
            kept = dict(revision="another", files=[])
        elif kept.get("asked") != asked:
            revision, found = find_remote(source)
            chosen = set(choose(source, [one.name for one in found]))
            kept = dict(asked=asked, revision=revision, files=[
                dataclasses.asdict(one) for one in found if one.name in chosen])
            listing.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(listing, json.dumps(kept))
        root = DOWNLOADS / re.sub("[^A-Za-z0-9._-]+", "_", shown(source.path).partition("@")[0]) / (
            kept["revision"][:12])
        files = [File(one.name, inside(root, one.name), one.size, one.sha256 or one.blob, (), one)
                 for one in map(lambda facts: Remote(**facts), kept["files"])]
        return Corpus(source, files, "text", kept["revision"], collections.Counter())
    names, kind = find_files(source)
    corpus, revision = Corpus(source, [], kind, "", collections.Counter()), hashlib.sha256()
    with ThreadPoolExecutor() as pool, contextlib.closing(  # hashing lets the other threads run
            pool.map(lambda one: look(File(*one, None, ""), kind, data), names)) as looked:
        for file, wrong in tqdm(looked, f"look at {source.name}", len(names), disable=None):
            revision.update(f"{file.sha256}  {file.name}\n".encode())
            if accept(wrong, corpus, data):  # here and not in a thread: the first bad ones count
                corpus.files.append(file)
    corpus.revision = revision.hexdigest()
    return corpus


def look(file: File, kind: str, data: DataConfig) -> tuple[File, str]:
    """A file that is here, with size, sha256 and marks; and what is wrong with it, if anything."""
    size = file.path.stat().st_size
    if file.name.lower().endswith(PACKED):
        return dataclasses.replace(file, size=size, sha256=sha256_file(file.path)), ""
    encoding = data.encoding if kind == "text" else "utf-8"
    digest, bad, marks = scan(file.path, encoding)
    wrong = "" if bad is None else (f"{file.path}: byte {bad} is not {encoding}; give "
                                    "--encoding=NAME, or --max_bad_documents=N to skip it")
    return dataclasses.replace(file, size=size, sha256=digest, marks=marks), wrong


def accept(wrong: str, corpus: Corpus, data: DataConfig) -> bool:
    """Whether a file can be read; if not, it is counted, and past the limit that is an error."""
    if wrong and corpus.kind == "text":
        skip_bad(corpus.notes, data.max_bad_documents, wrong)
    elif wrong:
        corpus.notes["not_text"] += 1  # files that test how Python reads files
    return not wrong


def at_hand(corpus: Corpus, number: int, data: DataConfig, fetched: bool = True) -> File | None:
    """A file of a source, fetched if it was elsewhere; None if it is to be skipped.

    What a look at it found is kept beside it, so that one let go need not be `fetched` again.
    """
    file = corpus.files[number]
    if file.remote is None:
        return file
    facts = Path(f"{file.path}.{data.encoding}.part.json")
    if fetched or not facts.is_file():
        from nano360.hub.fetch import fetch
        fetch(file.remote, file.path)
    if not facts.is_file():
        found, wrong = look(file, corpus.kind, data)
        if not accept(wrong, corpus, data):
            return None
        write_atomic(facts, json.dumps([found.size, found.sha256, found.marks]))
    size, sha256, marks = json.loads(facts.read_text(encoding="utf-8"))
    return dataclasses.replace(file, size=size, sha256=sha256, marks=marks)


def cut(file: File, corpus: Corpus, size: int) -> list[Span]:
    """A file in spans of about `size` bytes, or as one where it can only be read as a whole."""
    lines = bool(LINES.search(file.name))
    marks = file.marks if lines or corpus.kind != "prose" and not corpus.source.fim_rate else ()
    edges = [(0, 1)]
    for at, line in marks:
        if at - edges[-1][0] >= size and file.size - at >= size // 2:
            edges.append((at, line))
    ends = [at for at, _ in edges[1:]] + [file.size]
    return [Span(file.name, str(file.path), start, end, file.size, line if lines else 1)
            for (start, line), end in zip(edges, ends, strict=True)]


# ---- what is in them -----------------------------------------------------------------------------

def skip_bad(notes: collections.Counter, limit: int, message: str) -> None:
    """Count a document that cannot be read; past the limit, stop."""
    notes["bad"] += 1
    if notes["bad"] > limit:
        raise Stop(DATA, message)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A file's statements, outer ones first. Expressions hold no docstring, and are most of it."""
    waiting = collections.deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, field, ()))


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
    found = [(node.body[0].lineno, doc) for node in statements(tree) if isinstance(node, kinds)
             if (doc := ast.get_docstring(node))]
    if found:
        found.sort(key=lambda one: one[0])
        yield found[0][0], "\n\n".join(doc for _, doc in found)


def clean(texts: Iterator[str], specials: list[str], notes: collections.Counter) -> Iterator[str]:
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


@contextlib.contextmanager
def whole(path: str) -> Iterator[None]:
    """Say so where a packed file is cut short, or is none. Raises Stop(DATA)."""
    try:
        yield
    except (EOFError, zlib.error, UnicodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not what is in the file, but the disk
            raise
        raise Stop(DATA, f"{path} is damaged: {error}; fetch or copy it again") from error


def arrow(path: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise Stop(ENVIRONMENT, f"{path} is read by the package pyarrow, which is missing: pip "
                   "install pyarrow, or nano360[data]") from error
    return pyarrow


def open_bytes(path: str) -> BinaryIO:
    """A file, unpacked as it is read."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        return arrow(path).input_stream(path, compression="zstd")
    return open(path, "rb")


def read_parquet(path: str, columns: list[str]) -> Iterator[tuple[int, dict]]:
    """(row from 1, object) of a .parquet file."""
    pyarrow, number = arrow(path), 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            has = file.schema_arrow.names
            for batch in file.iter_batches(256, columns=[c for c in columns if c in has] or has):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise Stop(DATA, f"{path} is broken after row {number}: {error}") from error


def open_text(span: Span, encoding: str, newline: str) -> TextIO:
    """The text of a span. Bytes of a packed file that are no text become lone surrogates."""
    file = open_bytes(span.path)
    if (span.start, span.end) != (0, span.size):
        with file:
            file.seek(span.start)
            file = io.BytesIO(file.read(span.end - span.start))
    errors = "surrogateescape" if span.path.lower().endswith(PACKED) else "strict"
    return io.TextIOWrapper(file, encoding, errors=errors, newline=newline)


def read_text(span: Span, encoding: str) -> Iterator[str]:
    """A text in parts; a CR is never parted from its LF."""
    with whole(span.path), open_text(span, encoding, "") as file:
        while part := file.read(PART):
            yield part + file.read(1) if part.endswith("\r") else part


def read_lines(span: Span, encoding: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a span of a file of lines; blank lines are passed over."""
    with whole(span.path), open_text(span, encoding, "\n") as file:
        number, cut_short = span.line, False
        while line := file.readline(LONGEST):
            if not cut_short and line.strip("\ufeff\r\n\t "):
                yield number, line
            cut_short = not line.endswith("\n")
            number += not cut_short


def read_json(span: Span, data: DataConfig, notes: collections.Counter
              ) -> Iterator[tuple[int, dict]]:
    """(line, object) of a span of a .jsonl file."""
    for number, line in read_lines(span, data.encoding):
        try:
            if len(line) >= LONGEST and not line.endswith("\n"):
                raise ValueError(f"the line has more than {LONGEST} characters")
            if re.search("[\udc80-\udcff]", line):
                raise ValueError(f"it is not {data.encoding}")
            if line.startswith("\ufeff"):
                line, notes["bom"] = line[1:], notes["bom"] + 1
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            skip_bad(notes, data.max_bad_documents, f"{span.path}:{number}: broken json ({error}): "
                     f"{line[:80].strip()} (--max_bad_documents=N skips such lines)")


def texts_of(found: Iterator[tuple[int, dict]], span: Span, source: Source, data: DataConfig,
             notes: collections.Counter) -> Iterator[tuple[int, str]]:
    """(line, text) of the objects that are what the source asks for."""
    key, (path, _, wanted) = source.text_key or data.text_key, source.where.partition("=")
    for number, row in found:
        value = row
        for name in path.split(".") if path else ():
            value = value.get(name) if isinstance(value, dict) else None
        if path and wanted != (value if isinstance(value, str) else json.dumps(value, default=str)):
            notes["passed_over"] += 1
            continue
        text = row.get(key) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield number, text
        else:
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            skip_bad(notes, data.max_bad_documents, f"{span.path}:{number}: no text under {key!r}, "
                     f"the line has {keys}; give --text_key=NAME")


def documents(span: Span, kind: str, source: Source, data: DataConfig, specials: list[str],
              notes: collections.Counter) -> Iterator[tuple[int, bool, bool, Iterator[str]]]:
    """(line, begins here, ends here, text in parts) of every document of a span, in order."""
    name, encoding = span.name.lower(), data.encoding if kind == "text" else "utf-8"
    if kind == "prose":
        found = docstrings("".join(read_text(span, encoding)), span.name, notes)
    elif name.endswith(".parquet"):
        columns = [source.text_key or data.text_key, re.split("[.=]", source.where)[0]]
        found = texts_of(read_parquet(span.path, columns), span, source, data, notes)
    elif LINES.search(name):
        found = texts_of(read_json(span, data, notes), span, source, data, notes)
    else:
        begins, ends = span.start == 0, span.end == span.size
        yield 1, begins, ends, clean(read_text(span, encoding), specials, notes)
        return
    for line, text in found:
        yield line, True, True, clean(iter([text]), specials, notes)


def no_documents(corpus: Corpus) -> Stop:
    none = f"none has {w}" if (w := corpus.source.where) else "nothing but blanks in them"
    return Stop(DATA, f"source {corpus.source.name}: 0 documents in {shown(corpus.source.path)}: "
                f"{len(corpus.files)} files, {none}")
