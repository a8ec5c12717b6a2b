"""Hugging Face's tokenizer.json: ours in its words, and any other's as a tokenizer of ours.

tokenizer_files() is for other people's programs: with these files in a checkpoint's folder,
transformers.AutoTokenizer gives the ids that the model was trained on. JsonTokenizer is for other
people's checkpoints, which may have no tokenizer.model; it needs the package tokenizers.
"""

import functools
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from nano360.config import ENVIRONMENT, Stop

if TYPE_CHECKING:  # nano360/tokenizers.py imports this file
    import tokenizers

    from nano360.tokenizers import Tokenizer

MAX_BYTES, MAX_IDS = 1 << 28, 1 << 24  # more than any tokenizer has: the file is something else
# What a tokenizer calls the ends of a text where nothing names them.
USUAL = dict(bos_token=("<s>", "<|begin_of_text|>"),
             eos_token=("</s>", "<|end_of_text|>", "<|endoftext|>"))


# ---- ours -> tokenizer.json ----------------------------------------------------------------------

def merges_of(vocab: dict, ranked: list) -> list[tuple]:
    """All pairs of pieces that make another, the best piece first: what a merge list spells out."""
    return [(piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab]


def sentencepiece_bpe(tokenizer: "Tokenizer") -> tuple[dict, dict, None, dict]:
    """A sentencepiece model in tokenizer.json's words: model, normalizer, splitter, decoder."""
    coder = tokenizer.coder
    pieces = [coder.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    plain = [i for i in range(len(pieces)) if not (
        coder.is_control(i) or coder.is_unknown(i) or coder.is_byte(i) or coder.is_unused(i))]
    ranked = [pieces[i] for i in sorted(plain, key=lambda i: -coder.get_score(i))]
    model = dict(type="BPE", dropout=None, unk_token=pieces[coder.unk_id()], fuse_unk=True,
                 continuing_subword_prefix=None, end_of_word_suffix=None, byte_fallback=True,
                 vocab=vocab, merges=merges_of(set(ranked), ranked))
    normalizer = dict(type="Sequence", normalizers=[
        dict(type="Prepend", prepend="▁"),
        dict(type="Replace", pattern={"String": " "}, content="▁")])
    decoder = dict(type="Sequence", decoders=[
        dict(type="Replace", pattern={"String": "▁"}, content=" "), dict(type="ByteFallback"),
        dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)])
    return model, normalizer, None, decoder


def spelling() -> dict[int, str]:
    """byte -> the character that stands for it in a byte-level vocabulary, as GPT-2 has it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that print as themselves
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def byte_level_bpe(tokenizer: "Tokenizer") -> tuple[dict, None, dict, dict]:
    """tiktoken's ranks in the words of tokenizer.json."""
    spell, special = spelling(), tokenizer.special_tokens
    tokens = ["".join(spell[b] for b in token) for token in tokenizer.ranks]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = dict(type="BPE", dropout=None, unk_token=None, fuse_unk=False, byte_fallback=False,
                 continuing_subword_prefix=None, end_of_word_suffix=None,
                 vocab=vocab | special, merges=merges_of(vocab, tokens))
    splitter = dict(type="Sequence", pretokenizers=[
        # {1,3}+ is possessive to tiktoken; to the engine of tokenizers it is a repeat of {1,3}
        dict(type="Split", pattern={"Regex": tokenizer.pattern.replace("{1,3}+", "{1,3}")},
             behavior="Isolated", invert=False),
        dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)])
    return model, None, splitter, dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True,
                                       use_regex=True)


def whole_json(tokenizer: "Tokenizer | JsonTokenizer") -> tuple[bytes, str | None]:
    """A tokenizer as tokenizer.json, and the text of its unknown token."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.data, tokenizer.unk
    spelled = byte_level_bpe if tokenizer.kind == "tiktoken" else sentencepiece_bpe
    model, normalizer, splitter, decoder = spelled(tokenizer)
    unk = model["unk_token"]
    special = ({unk: model["vocab"][unk]} if unk else {}) | tokenizer.special_tokens
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    whole = dict(
        version="1.0", truncation=None, padding=None, normalizer=normalizer,
        added_tokens=[dict(id=i, content=text, **flags) for text, i in special.items()],
        pre_tokenizer=splitter, post_processor=None, decoder=decoder, model=model)
    return json.dumps(whole, ensure_ascii=False).encode(), unk


def name_of(tokenizer: "Tokenizer | JsonTokenizer", special: int | None) -> str | None:
    """The text of a special token's id."""
    return next((text for text, i in tokenizer.special_tokens.items() if i == special), None)


def tokenizer_files(tokenizer: "Tokenizer | JsonTokenizer") -> dict[str, bytes]:
    """File name -> content: what a checkpoint folder needs for AutoTokenizer to give our ids."""
    whole, unk = whole_json(tokenizer)
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", unk_token=unk, add_bos_token=False,
        bos_token=name_of(tokenizer, tokenizer.bos), eos_token=name_of(tokenizer, tokenizer.eos),
        clean_up_tokenization_spaces=False, split_special_tokens=True,  # the text "</s>" is text
        nano360=tokenizer.spec())
    return {tokenizer.file: tokenizer.data, "tokenizer.json": whole,
            "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode()}


# ---- tokenizer.json -> ours ----------------------------------------------------------------------

def build_coder(text: str) -> "tokenizers.Tokenizer":
    """The library's own tokenizer, to which text is only text. Raises Stop(ENVIRONMENT)."""
    try:
        import tokenizers
    except ImportError as error:
        raise Stop(ENVIRONMENT, "a tokenizer.json is read by the package tokenizers, which is "
                   "missing: pip install tokenizers, or nano360[hf]") from error
    whole = json.loads(text)
    model = whole.get("model") if isinstance(whole, dict) else None
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if isinstance(model, dict) and model.get(name):  # a prefix may even abort the library
            raise ValueError(f"its {name} is {model[name]!r}, which is not known here")
    try:
        coder = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own for what is wrong with a file
        raise ValueError(str(error)) from error
    if not isinstance(coder.model, tokenizers.models.BPE):
        raise ValueError(f"it is of type {type(coder.model).__name__}, expected BPE")
    coder.no_truncation()
    coder.no_padding()
    coder.encode_special_tokens = True  # "</s>" in a text is encoded as any other text
    return coder


def without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no blank in front of a text."""
    if isinstance(part, list):
        return [without_prefix(one) for one in part if one.get("type") != "Prepend"]
    if part is None or part["type"] == "Prepend":
        return None
    changed = {k: without_prefix(part[k]) for k in ("normalizers", "pretokenizers") if k in part}
    if part["type"] in ("ByteLevel", "Metaspace"):
        changed["add_prefix_space"] = False
    if part["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    return part | changed


class JsonTokenizer:
    """Text <-> token ids by a tokenizer.json, with the members of Tokenizer.

    Two spellings of BPE are known: "▁" for a blank and <0x0A> for a byte, as LLaMA's, and GPT-2's
    characters for bytes. What an id stands for is read off its spelling once, so that decoding is
    exact to the byte.
    """
    kind, file = "tokenizer_json", "tokenizer.json"
    block = 1 << 20  # characters of a text encoded at once, as Tokenizer's

    def __init__(self, data: bytes, spec: dict):
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has {len(data)} bytes, the limit is {MAX_BYTES}")
        self.data, self.coder = data, build_coder(data.decode())
        vocab = self.coder.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size > MAX_IDS:
            raise ValueError(f"it has an id {self.vocab_size - 1}, the limit is {MAX_IDS}")
        self.unk = self.coder.model.unk_token
        bos, eos = (self.choose(spec, name, vocab) for name in ("bos_token", "eos_token"))
        if eos is None:
            raise ValueError("it has no end-of-text token")
        self.coder.add_special_tokens([bos, eos] if bos else [eos])  # if they were not marked so
        added = self.coder.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} - {self.unk}
        self.special_tokens = {text: vocab[text] for text in sorted(special, key=vocab.get)}
        self.bos, self.eos = vocab.get(bos), vocab[eos]
        # As its post-processor does, unless tokenizer_config.json has a word on it.
        says, does = spec.get("add_bos_token"), self.coder.encode("a").ids[:1] == [self.bos]
        self.add_bos = bos is not None and bool(does if says is None else says)
        self.pieces = self.spell_out({t: vocab[t] for t in vocab.keys() - special - {self.unk}})

    def choose(self, spec: dict, name: str, vocab: dict[str, int]) -> str | None:
        """The text of BOS or EOS: as tokenizer_config.json or a manifest says, or the usual one."""
        text = spec.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        if text is None and (name not in spec or name == "eos_token"):  # null says: no BOS
            text = next((one for one in USUAL[name] if one in vocab), None)
        if text is not None and (not isinstance(text, str) or text not in vocab):
            raise ValueError(f"its {name} {text!r} is none of its tokens")
        return text

    def spell_out(self, vocab: dict[str, int]) -> list[bytes]:
        """id -> the UTF-8 bytes it stands for, none for special tokens."""
        decoder = self.coder.decoder
        shown = [decoder.decode(["a", mark + "a"]) for mark in "▁Ġ"] if decoder else []
        if "a a" not in shown:
            raise ValueError("its decoder is for neither of the spellings known here, ▁ and Ġ")
        # A ▁ in front of a text was put there by the tokenizer: most decoders take it away again.
        self.strips = decoder.decode(["▁a"]) == "a"
        marked, pieces = shown[0] == "a a", [b""] * self.vocab_size
        bytes_of = {char: byte for byte, char in spelling().items()}
        for token, i in vocab.items():
            if marked and re.fullmatch("<0x[0-9A-F]{2}>", token):
                pieces[i] = bytes([int(token[3:5], 16)])
            elif marked:
                pieces[i] = token.replace("▁", " ").encode()
            elif bytes_of.keys() >= set(token):
                pieces[i] = bytes(bytes_of[char] for char in token)
            else:  # a token that was added is spelled as it is
                pieces[i] = token.encode()
        return pieces

    @functools.cached_property
    def later(self) -> "tokenizers.Tokenizer":
        """The same tokenizer without a blank in front, for the later pieces of a long text."""
        whole = json.loads(self.data)
        for step in ("normalizer", "pre_tokenizer"):
            whole[step] = without_prefix(whole.get(step))
        coder = build_coder(json.dumps(whole))
        coder.add_special_tokens([*self.special_tokens])
        return coder

    def encode(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text of any length, with neither BOS nor EOS; `first` as below."""
        return self.encode_piece(text, first)

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """The ids of a piece of a document, which is its first one or follows another.

        Those of the whole text if no token goes over the blank at which it was cut.
        """
        return (self.coder if first else self.later).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens; what is no UTF-8 becomes U+FFFD."""
        found = b"".join(self.pieces[i] for i in map(int, ids) if i < self.vocab_size)
        text = found.decode(errors="replace")
        return text[1:] if self.strips and text.startswith(" ") else text

    def piece_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, (vocab_size,) int64, for bits per byte."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    def spec(self) -> dict:
        """What the manifest says of it."""
        spec = {name: getattr(self, name) for name in
                ("kind", "file", "vocab_size", "bos", "eos", "special_tokens")}
        return spec | dict(sha256=hashlib.sha256(self.data).hexdigest(),
                           bos_token=name_of(self, self.bos), eos_token=name_of(self, self.eos),
                           add_bos_token=False)  # rows have none
