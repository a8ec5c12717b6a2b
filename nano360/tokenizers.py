"""Text <-> token ids: what prepare.py makes rows with and its readers turn them back with.

    tokenizer = load_tokenizer("data/demo")     # or a checkpoint's folder, or a file
    ids = tokenizer.encode("some text")         # with neither BOS nor EOS

sentencepiece and tiktoken do the work; here is what the stages need of both in the same words. A
tokenizer.json, Hugging Face's, is read by nano360/tokenizer_json.py.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nano360.config import DATA, USAGE, Stop
from nano360.files import sha256_file

if TYPE_CHECKING:
    from nano360.tokenizer_json import JsonTokenizer

BLOCK = 1 << 20  # characters tokenized at once: bounds memory, and no document is too long
PIECE = 1 << 11  # the same for sentencepiece, which is twice as fast on what fits the caches
CUT = re.compile("[^\\s▁] ")  # sentencepiece takes ▁ for a blank
EOT = "<|endoftext|>"  # what tiktoken calls EOS
KINDS = {".model": "sentencepiece", ".tiktoken": "tiktoken", ".json": "tokenizer_json"}
# How tiktoken cuts text before merging: the pattern of cl100k_base, for ranks that come as a file.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")


def blocks(texts: Iterable[str], size: int) -> Iterator[str]:
    """Cut a text that comes in parts into pieces of little more than `size` characters.

    Cuts fall in front of a blank that follows a non-blank, where no token crosses: the ids are
    those of the whole text. Only BLOCK characters without one are cut blindly.
    """
    rest = ""
    for text in texts:
        rest, at = rest + text, 0
        while len(rest) - at > size:
            found = CUT.search(rest, at + size)
            if found and found.start() < at + BLOCK:
                cut = found.start() + 1
            elif len(rest) - at > BLOCK:
                cut = at + BLOCK
            else:
                break
            yield rest[at:cut]
            at = cut
        rest = rest[at:]
    if rest:
        yield rest


class Tokenizer:
    """Text <-> token ids, by sentencepiece (.model) or tiktoken (.tiktoken, a file of ranks).

    Text is only ever text: "</s>" inside a document becomes ordinary pieces, not the end of it.
    """

    def __init__(self, kind: str, data: bytes, spec: dict):
        self.kind, self.data = kind, data
        self.file = "tokenizer.tiktoken" if kind == "tiktoken" else "tokenizer.model"
        self.add_bos, self.block = False, BLOCK
        if kind == "tiktoken":
            import tiktoken
            pairs = [line.split() for line in data.splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            if [*ranks.values()] != [*range(len(pairs))] or not {bytes([b]) for b in range(256)
                                                                 } <= ranks.keys():
                raise ValueError("its ranks do not count from 0, or lack some single bytes")
            self.ranks = ranks  # token -> id, in the order of the ids
            self.pattern = spec.get("pattern", PATTERN)
            self.special_tokens = spec.get("special_tokens", {EOT: len(ranks)})
            self.bos, self.eos = None, self.special_tokens[EOT]
            self.coder = tiktoken.Encoding("ranks", pat_str=self.pattern, mergeable_ranks=ranks,
                                           special_tokens=self.special_tokens)
            self.vocab_size = self.coder.n_vocab
        else:
            import sentencepiece
            self.coder = sentencepiece.SentencePieceProcessor(model_proto=data)
            # The same model without the blank in front of each text, for the later pieces of a long
            # one. A second normalizer_spec (field 3) with add_dummy_prefix = 0 (its field 3): a
            # reader of protocol buffers merges the two, and the last value holds.
            self.later = sentencepiece.SentencePieceProcessor(
                model_proto=data + b"\x1a\x02\x18\x00")
            self.vocab_size = self.coder.vocab_size()
            self.bos, self.eos = (i if i >= 0 else None
                                  for i in (self.coder.bos_id(), self.coder.eos_id()))
            self.special_tokens = {self.coder.id_to_piece(i): i for i in range(self.vocab_size)
                                   if self.coder.is_control(i)}
            if not any(re.search("[^▁]▁", self.coder.id_to_piece(i))
                       for i in range(self.vocab_size)):  # no piece goes over a cut
                self.block = PIECE
        if self.eos is None:
            raise ValueError("it has no end-of-text token")

    def encode(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text of any length, with neither BOS nor EOS; `first` as below."""
        return [i for n, part in enumerate(blocks([text], self.block))
                for i in self.encode_piece(part, first and n == 0)]

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """The ids of a piece of a document, which is its first one or follows another."""
        if self.kind == "tiktoken":
            return self.coder.encode_ordinary(text)
        return (self.coder if first else self.later).encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; what is no UTF-8 becomes U+FFFD."""
        return self.coder.decode([int(i) for i in ids])

    def piece_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, (vocab_size,) int64, for bits per byte.

        A leading blank (the mark of sentencepiece) is one byte, a byte piece is one, EOS none.
        """
        sizes = np.zeros(self.vocab_size, np.int64)
        if self.kind == "tiktoken":
            sizes[:len(self.ranks)] = [len(token) for token in self.ranks]
            return sizes
        for i in range(self.vocab_size):
            if self.coder.is_byte(i):
                sizes[i] = 1
            elif not self.coder.is_control(i) and not self.coder.is_unknown(i):
                sizes[i] = len(self.coder.id_to_piece(i).replace("▁", " ").encode())
        return sizes

    def spec(self) -> dict:
        """What the manifest says of it."""
        spec = {name: getattr(self, name) for name in
                ("kind", "file", "vocab_size", "bos", "eos", "special_tokens")}
        spec["sha256"] = hashlib.sha256(self.data).hexdigest()
        return spec | ({"pattern": self.pattern} if self.kind == "tiktoken" else {})


def with_special(data: bytes, names: list[str]) -> bytes:
    """A sentencepiece model that goes on with these tokens, which no text is ever encoded to.

    Its file is a message of protocol buffers, and of two that are joined a reader makes one: each
    name is a piece (field 1) with its text (field 1) and its type (field 3), 3 for control.
    """
    for name in names:
        text = name.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x18\x03"
        if len(piece) > 127:
            raise Stop(USAGE, f"--special_tokens: {name!r} is too long, the limit is 123 bytes")
        data += b"\x0a" + bytes([len(piece)]) + piece
    return data


@functools.lru_cache(maxsize=4)
def build_tokenizer(kind: str, data: bytes, spec: str) -> "Tokenizer | JsonTokenizer":
    if kind == "tokenizer_json":
        from nano360.tokenizer_json import JsonTokenizer
        return JsonTokenizer(data, json.loads(spec))
    return Tokenizer(kind, data, json.loads(spec))


def read_tokenizer(file: str, spec: str) -> "Tokenizer | JsonTokenizer":
    """The tokenizer of a file; `spec` is json of what the file cannot say. Raises Stop(DATA)."""
    try:
        return build_tokenizer(KINDS[Path(file).suffix], Path(file).read_bytes(), spec)
    except (ValueError, RuntimeError, KeyError) as error:  # base64, int(), sentencepiece
        raise Stop(DATA, f"tokenizer {file} is truncated or of another kind: {error}") from error


def load_tokenizer(path: str | Path, sha256: str = "") -> "Tokenizer | JsonTokenizer":
    """The tokenizer of a file, or of a data set's or checkpoint's folder. Raises Stop(DATA).

    In a folder, tokenizer_config.json says whether BOS is put in front, as in Hugging Face's.
    """
    file, config, spec = Path(path), {}, {}
    if file.is_dir():
        if (file / "tokenizer_config.json").is_file():
            try:
                config = json.loads((file / "tokenizer_config.json").read_text(encoding="utf-8"))
                spec = config.get("nano360", {}) | config
            except (ValueError, AttributeError, TypeError) as error:
                raise Stop(DATA, f"{file}/tokenizer_config.json is broken: {error}") from error
        elif (file / "manifest.json").is_file():
            spec = json.loads((file / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
        names = [n for n in map("tokenizer{}".format, KINDS) if (file / n).is_file()]
        if not names:
            raise Stop(DATA, f"{path} has no tokenizer{', '.join(KINDS)}: give --tokenizer=FILE")
        file = file / names[0]
    if not file.is_file() or file.suffix not in KINDS:
        what = f"is none of {', '.join(KINDS)}" if file.is_file() else "not found"
        expected = f" with sha256 {sha256}" if sha256 else ""
        raise Stop(DATA, f"tokenizer {path} {what}; expected a sentencepiece model, tiktoken "
                   f"ranks or a tokenizer.json{expected}; a published checkpoint of the family has "
                   "it as tokenizer.model or tokenizer.json: give --tokenizer=FILE")
    if sha256 and sha256_file(file) != sha256:
        raise Stop(DATA, f"tokenizer {file} is another than was named: its sha256 is "
                   f"{sha256_file(file)}, expected {sha256}")
    tokenizer = copy(read_tokenizer(str(file), json.dumps(spec)))
    if file.suffix != ".json":  # which says itself whether, unless the spec does
        llama = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
        tokenizer.add_bos = tokenizer.bos is not None and bool(config.get("add_bos_token", llama))
    return tokenizer


def fim_ids(coder: Tokenizer) -> list[int]:
    """The ids of the marks of prefix, suffix and middle, in either spelling of CrystalCoder's."""
    names = [[f"<|fim_{part}|>", f"<fim_{part}>"] for part in ("prefix", "suffix", "middle")]
    ids = [next((coder.special_tokens[n] for n in two if n in coder.special_tokens), None)
           for two in names]
    if None in ids:
        raise Stop(USAGE, "fim_rate wants a tokenizer with <|fim_prefix|>, <|fim_suffix|> and "
                   "<|fim_middle|>: name them in special_tokens")
    return ids
