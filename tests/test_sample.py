"""sample.py: what it prints, and what it never sends to a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare
import sample
from conftest import REPO
from model import Transformer, init_weights
from nano360 import tokenizers
from nano360.config import ModelConfig, run
from nano360.tokenizer_json import tokenizer_files

EXAMPLE = "the cat sat on the mat, and the dog sat on the log.\n\x1b[2J\x07 café 中文\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint folder with random weights and a tokenizer of its own."""
    path = tmp_path_factory.mktemp("ckpt")
    data = prepare.train_tokenizer(iter([EXAMPLE * 50]), 300)
    tokenizer = tokenizers.Tokenizer("sentencepiece", data, {})
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, vocab_size=300,
                                    seq_len=64, init_std=0.3))
    init_weights(model, 0)
    model.save_pretrained(path, eos=tokenizer.eos)
    for name, content in tokenizer_files(tokenizer).items():
        (path / name).write_bytes(content)
    return path


def said(capsys, *argv: str) -> str:
    sample.main(list(argv))
    return capsys.readouterr().out


def test_greedy_is_the_models_own_text(folder, capsys):
    """The streamed text is the decoded generate() of the same prompt."""
    model, tokenizer = Transformer.from_pretrained(folder), tokenizers.load_tokenizer(folder)
    ids = tokenizer.encode("the cat")
    out = model.generate(torch.tensor([ids]), 40, temperature=0, stop=[tokenizer.eos])[0].tolist()
    expected = tokenizer.decode([i for i in out if i != tokenizer.eos])
    text = said(capsys, str(folder), "--prompt=the cat", "--temperature=0", "--max_new_tokens=40")
    assert text == expected + "\n" and len(expected) > len("the cat")


def test_draws_follow_the_seed(folder, capsys):
    one = said(capsys, str(folder), "--prompt=the", "--seed=1", "--num_samples=2")
    assert one == said(capsys, str(folder), "--prompt=the", "--seed=1", "--num_samples=2")
    assert one != said(capsys, str(folder), "--prompt=the", "--seed=2", "--num_samples=2")
    first, second = one.split("\n" + "-" * 80 + "\n")
    assert first != second.rstrip("\n")


def test_streams_whole_characters():
    """Bytes of one character arrive one by one; nothing is shown until it is whole."""
    data = prepare.train_tokenizer(iter([EXAMPLE * 50]), 300)
    tokenizer = tokenizers.Tokenizer("sentencepiece", data, {})
    ids = tokenizer.encode("a 🦙 sat")
    parts = list(sample.pieces_of_text(tokenizer, ids[:1], iter(ids[1:])))
    assert "".join(parts) == "a 🦙 sat".removeprefix(tokenizer.decode(ids[:1]))
    assert not any("\ufffd" in part for part in parts) and len(parts) > 3
    # a text that ends in half a character still shows that something is there
    llama = [i for i in ids if tokenizer.coder.is_byte(i)]
    assert "".join(sample.pieces_of_text(tokenizer, [], iter(llama[:2]))) != ""


def test_stops_before_eos():
    data = prepare.train_tokenizer(iter([EXAMPLE * 50]), 300)
    tokenizer = tokenizers.Tokenizer("sentencepiece", data, {})
    ids = tokenizer.encode("the cat")
    shown = sample.pieces_of_text(tokenizer, [], iter([*ids, tokenizer.eos, *ids]))
    assert "".join(shown) == "the cat"


@pytest.mark.parametrize("stop, left", [
    ("sat", "the cat "), ("on the mat", "the cat sat "), (" ", "the"), ("never there", None),
    ("mat, a dog", None), ("café", None)])
def test_stops_before_a_text(stop, left):
    """The text up to `stop`, whatever its tokens; what only began like it is shown after all."""
    data = prepare.train_tokenizer(iter([EXAMPLE * 50]), 300)
    tokenizer = tokenizers.Tokenizer("sentencepiece", data, {})
    whole = "the cat sat on the mat, and"
    parts = list(sample.pieces_of_text(tokenizer, [], iter(tokenizer.encode(whole)), stop))
    assert "".join(parts) == (whole if left is None else left)
    # a stop text in the prompt is none
    ids = tokenizer.encode("the cat sat")
    after = sample.pieces_of_text(tokenizer, ids, iter(tokenizer.encode(whole)), "the cat sat on")
    assert "".join(after).lstrip() == ""


def test_bfloat16_is_asked_for(folder, capsys, monkeypatch):
    seen, read = [], Transformer.from_pretrained
    monkeypatch.setattr(Transformer, "from_pretrained",
                        lambda *args: (seen.append(args), read(*args))[1])
    said(capsys, str(folder), "--prompt=the", "--dtype=bfloat16", "--stop=the")
    assert seen[0][2] == torch.bfloat16


def test_no_control_character_reaches_a_terminal(folder):
    """In a real terminal (a pty) escape codes are spelled out; in a pipe the text is as it is."""
    command = [sys.executable, str(REPO / "sample.py"), str(folder), "--max_new_tokens=0",
               "--prompt=a\x1b]52;c;AAAA\x07\x9bb\tc"]
    piped = subprocess.run(command, capture_output=True, timeout=120).stdout
    assert piped == "a\x1b]52;c;AAAA\x07\x9bb\tc\n".encode()
    here, there = pty.openpty()
    process = subprocess.Popen(command, stdout=there, stderr=subprocess.DEVNULL)
    os.close(there)
    seen = b""
    try:
        while part := os.read(here, 1000):
            seen += part
    except OSError:  # how Linux says that the other side was closed
        assert seen
    assert process.wait(timeout=120) == 0
    assert b"\x1b" not in seen and b"\x07" not in seen and b"\\x1b]52" in seen and b"\tc" in seen


# ---- bad input: what was given, exit code, what the line says ------------------------------------

BAD = [
    (["nowhere"], 4, ["nowhere", "config.json is missing", "out/demo/ckpt_007"]),
    (["CKPT", "--temperature=-1"], 2, ["--temperature", "0 or more", "-1"]),
    (["CKPT", "--top_k=-1"], 2, ["--top_k", "0 or more"]),
    (["CKPT", "--top_p=1.5"], 2, ["--top_p", "1 or less"]),
    (["CKPT", "--temprature=1"], 2, ["'temprature'", "did you mean 'temperature'"]),
    (["CKPT", "--prompt=\udcff"], 2, ["prompt is no text", "character 0"]),
    (["CKPT", "--prompt_file=nofile.txt"], 2, ["nofile.txt", "No such file"]),
    (["CKPT", "--prompt=a", "--prompt_file=-"], 2, ["--prompt and --prompt_file"]),
    (["CKPT", "--tokenizer=no.model"], 3, ["no.model not found"]),
    (["CKPT", "more"], 2, ["expected a checkpoint"]),
    (["CKPT", "--device=mps" if not torch.backends.mps.is_available() else "--device=cuda"], 6,
     ["torch finds only"]),
]


@pytest.mark.parametrize("argv, code, parts", BAD, ids=[" ".join(a)[:40] for a, _, _ in BAD])
def test_bad_input(argv, code, parts, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(folder) if word == "CKPT" else word for word in argv]
    assert run(sample.main, "", [], argv) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


def test_a_closed_standard_input(folder, monkeypatch, capsys):
    stdin = open(os.devnull)
    stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(sample.main, "", [], [str(folder), "--prompt_file=-"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


@pytest.mark.parametrize("argv, note", [
    (["--prompt="], "beginning a new document"),
    (["--prompt=" + "the cat " * 60], "the last 64, a whole context, are kept"),
])
def test_odd_prompts_are_answered(argv, note, folder, capsys):
    """An empty prompt begins a document, a long one keeps its end; both say so."""
    assert run(sample.main, "", [], [str(folder), "--max_new_tokens=5", *argv]) == 0
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("same", ["--top_k=0", "--top_k=9999", "--top_p=0", "--top_p=1"])
def test_limits_that_are_off(same, folder, capsys):
    """0 and more than there are: no limit, not a crash."""
    plain = said(capsys, str(folder), "--prompt=the", "--top_k=0")
    argv = [same] if same.startswith("--top_k") else [same, "--top_k=0"]
    assert said(capsys, str(folder), "--prompt=the", *argv) == plain
