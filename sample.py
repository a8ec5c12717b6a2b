"""Stage 3: text out of any checkpoint, printed as it is made.

    python sample.py out/demo/ckpt_007 --prompt="def main(" --max_new_tokens=200
    python sample.py out/demo/ckpt_007 --temperature=0                  # greedy
    python sample.py out/demo/ckpt_007 --prompt_file=- < question.txt   # a file, or standard input
    python sample.py out/demo/ckpt_007 --prompt="def f(" --stop="def "  # up to a text

Reads a checkpoint folder of ours, or any of Hugging Face with a LLaMA or a CrystalCoder; writes to
standard output only.
"""

import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model import Transformer, choose_device
from nano360.config import USAGE, Stop, key, load_options, run
from nano360.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    prompt: str = key("the text to continue; empty: a new document", "")
    prompt_file: str | None = key("a file with the text to continue; -: standard input", None)
    max_new_tokens: int = key("tokens to make, at most: a text may end before", 200, low=0)
    temperature: float = key("0: always the likeliest token; 1: as the model says", 0.8, low=0)
    top_k: int = key("draw from the k likeliest tokens; 0: from all", 50, low=0)
    top_p: float = key("draw from the likeliest tokens that hold this share; 0 or 1: from all",
                       1.0, low=0, high=1)
    stop: str = key("end before this text; empty: at the end of the document only", "")
    num_samples: int = key("texts to make, one after another", 1, low=1)
    seed: int = key("seed of the draws", 0, low=0, high=2**63 - 1)
    tokenizer: str | None = key("tokenizer file; none: the one in the checkpoint's folder", None)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("where to compute", "auto")
    dtype: Literal["float32", "bfloat16"] = key("type of the weights in memory", "float32")


def printable(text: str) -> str:
    """Text with control characters spelled out: a model may have learned to write escape codes."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc"
                   else c.encode("unicode_escape").decode() for c in text)


def pieces_of_text(tokenizer: Tokenizer, prompt: list[int], new: Iterator[int],
                   stop: str = "") -> Iterator[str]:
    """The text that new ids add to a prompt's, up to EOS or `stop`, as soon as it is certain.

    Decoded together with what came before: alone, a token loses its leading blank, and a character
    may take several tokens. An end that `stop` may begin with is held back until it is known.
    """
    ids, shown = list(prompt), len(tokenizer.decode(prompt))
    for i in new:
        if i == tokenizer.eos:
            break
        ids.append(i)
        text = tokenizer.decode(ids)
        at = text.find(stop, shown) if stop else -1
        if at >= 0:
            yield text[shown:at]
            return
        held = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
        end = len(text) - held
        if end > shown and not text.endswith("\ufffd"):  # half of a character, perhaps
            yield text[shown:end]
            shown = end
    yield tokenizer.decode(ids)[shown:]


def read_prompt(options: SampleOptions) -> str:
    """The prompt, from the command line, a file or standard input. Raises Stop(USAGE)."""
    if options.prompt_file is None:
        return options.prompt
    if options.prompt:
        raise Stop(USAGE, "--prompt and --prompt_file are both given; give one")
    try:
        if options.prompt_file == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise Stop(USAGE, "--prompt_file=-: standard input is closed")
            return sys.stdin.read()
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(USAGE, f"--prompt_file={options.prompt_file} cannot be read: {error}") from error


def check(options: SampleOptions, tokenizer: Tokenizer, model: Transformer,
          prompt: str) -> list[int]:
    """The ids to continue, after what the user gave was checked. Raises Stop(USAGE)."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise Stop(USAGE, f"the tokenizer has {tokenizer.vocab_size} ids, the model "
                   f"{model.config.vocab_size}: give the model's own --tokenizer=FILE")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Stop(USAGE, f"the prompt is no text: character {error.start} is half of a surrogate "
                   "pair; give UTF-8") from error
    ids = [tokenizer.bos] * tokenizer.add_bos + tokenizer.encode(prompt)
    if not ids:
        print("empty prompt: beginning a new document", file=sys.stderr)
        ids = [tokenizer.eos]  # what stood in front of every document in training
    if len(ids) > model.config.seq_len:
        print(f"the prompt has {len(ids)} tokens; the last {model.config.seq_len}, a whole "
              "context, are kept", file=sys.stderr)
    return ids[-model.config.seq_len:]


def main(argv: list[str]) -> None:
    folder, options = load_options(argv, SampleOptions, "a checkpoint such as out/demo/ckpt_007")
    prompt = read_prompt(options)
    device = choose_device(options.device)
    model = Transformer.from_pretrained(folder, device, getattr(torch, options.dtype)).eval()
    tokenizer = load_tokenizer(options.tokenizer or folder)
    ids = check(options, tokenizer, model, prompt)
    generator = torch.Generator(device).manual_seed(options.seed)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    show = printable if sys.stdout.isatty() else str  # a file gets the text as it is
    for n in range(options.num_samples):
        print("-" * 80 + "\n" if n else "", show(prompt), sep="", end="", flush=True)
        stream = model.stream(torch.tensor([ids], device=device), options.max_new_tokens,
                              options.temperature, options.top_k, options.top_p,
                              (tokenizer.eos,), generator=generator)
        for text in pieces_of_text(tokenizer, ids, map(int, stream), options.stop):
            print(show(text), end="", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [SampleOptions]))
