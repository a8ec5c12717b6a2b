"""Our tokenizers in the words of Hugging Face's tokenizer.json.

No stage needs this: it is for other people's programs. With these files in a checkpoint's folder,
transformers.AutoTokenizer gives the ids that the model was trained on.
"""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # prepare.py stands above this file
    from prepare import Tokenizer


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


def byte_level_bpe(tokenizer: "Tokenizer") -> tuple[dict, None, dict, dict]:
    """tiktoken's ranks in the words of tokenizer.json; bytes are spelled as GPT-2 spells them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that print as themselves
    hidden = [b for b in range(256) if b not in shown]
    spell = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    special = tokenizer.special_tokens
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


def tokenizer_files(tokenizer: "Tokenizer") -> dict[str, bytes]:
    """File name -> content: what a checkpoint folder needs for AutoTokenizer to give our ids."""
    spelled = byte_level_bpe if tokenizer.kind == "tiktoken" else sentencepiece_bpe
    model, normalizer, splitter, decoder = spelled(tokenizer)
    unk = model["unk_token"]
    special = ({unk: model["vocab"][unk]} if unk else {}) | tokenizer.special_tokens
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    whole = dict(
        version="1.0", truncation=None, padding=None, normalizer=normalizer,
        added_tokens=[dict(id=i, content=text, **flags) for text, i in special.items()],
        pre_tokenizer=splitter, post_processor=None, decoder=decoder, model=model)
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", unk_token=unk, add_bos_token=False,
        bos_token=tokenizer.name_of(tokenizer.bos), eos_token=tokenizer.name_of(tokenizer.eos),
        clean_up_tokenization_spaces=False, split_special_tokens=True,  # the text "</s>" is text
        nano360=tokenizer.spec())
    return {tokenizer.file: tokenizer.data,
            "tokenizer.json": json.dumps(whole, ensure_ascii=False).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode()}
