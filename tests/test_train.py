"""train.py: the order, the loop against transformers, going on bit for bit, several processes."""

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prepare
import train
from conftest import REPO
from model import Transformer, init_weights
from nano360 import tokenizers
from nano360.config import Config, load, run
from nano360.files import sha256_file, write_sealed
from nano360.place import explain
from ranks import free_port

# A run of 4 chunks x 4 steps; --dtype=float32 where numbers are compared with another program's.
TINY = """
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
n_inner = 64
init_std = 0.1
vocab_size = 300
seq_len = 32
sources = [dict(name="a", path="a.jsonl", weight=0.75), dict(name="b", path="b.txt", weight=0.25)]
n_chunks = 4
rows_per_chunk = 33
valid_share = 0.1
lr = 1e-2
min_lr = 1e-3
warmup_steps = 3
batch_size = 8
log_every = 4
"""
TIMINGS = ("tok_per_s", "mfu", "memory", *(
    f"time_{name}" for name in ("data", "forward", "backward", "optimizer", "save")))


def words(n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["red", "green", "blue", "one", "two", "tree", "sea", "\n"], n))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with tiny.py and its prepared data; tests copy nothing from it, they link to it."""
    root, before = tmp_path_factory.mktemp("tiny"), Path.cwd()
    (root / "tiny.py").write_text(TINY)
    rows = [json.dumps({"text": words(40 + i, i)}) for i in range(150)]
    (root / "a.jsonl").write_text("\n".join(rows))
    (root / "b.txt").write_text(words(4000, 999))
    os.chdir(root)
    try:
        prepare.main(["tiny.py", "--workers=1"])
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def room(prepared, tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with the prepared data in reach."""
    (tmp_path / "data").symlink_to(prepared / "data")
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(out: Path, kind: str = "train") -> list[dict]:
    """The lines of a kind, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS}
            for line in lines if line["kind"] == kind]


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p)
            for p in sorted(folder.rglob("*")) if p.is_file()}


def config_of(*argv: str) -> Config:
    return load(["tiny.py", *argv])[0]


# ---- order ---------------------------------------------------------------------------------------

@pytest.mark.numeric
def test_amber_schedule():
    """The check values of the released schedule, and its corners."""
    optim = load([str(REPO / "configs/amber_7b.py")])[0].optim
    last = 274_320
    assert train.lr_at(1, optim, last) == pytest.approx(3e-4 / 2000)
    assert train.lr_at(2000, optim, last) == pytest.approx(3e-4)
    assert train.lr_at(138_160, optim, last) == pytest.approx(1.65e-4)
    assert train.lr_at(last, optim, last) == train.lr_at(last + 1, optim, last) == 3e-5
    assert train.lr_at(last - 1, optim, last) > 3e-5


@pytest.mark.numeric
def test_linear_schedule_that_is_stopped_early(room):
    """Decay length and steps run are two numbers: CrystalCoder's first stage ends half-way down."""
    optim = config_of("--lr=0.012", "--min_lr=0.00012408", "--schedule=linear",
                      "--warmup_steps=86", "--decay_steps=294423").optim
    assert train.lr_at(86, optim, 79_721) == pytest.approx(0.012)
    assert train.lr_at(79_721, optim, 79_721) == pytest.approx(0.0087869, rel=1e-3)


def test_every_row_once_and_as_computed_by_hand(room):
    """Per visit: 32 of the 33 rows, each once, in the order of the Philox keys, as logged."""
    train.main(["tiny.py", "--epochs=2"])
    config = config_of("--epochs=2")
    manifest = prepare.read_manifest(Path("data/tiny"))
    plan = train.make_plan(config, manifest)
    seen, logged = {}, metrics(Path("out/tiny"))
    for step, numbers, rows in train.batches(config, plan, manifest, Path("data/tiny"), 1):
        visit = (step - 1) // 4
        key = 1337 << 64 | (visit // 4) << 32 | visit % 4
        order = np.argsort(np.random.Philox(key=key).random_raw(33), kind="stable")
        b = (step - 1) % 4
        assert numbers.tolist() == order[8 * b:8 * b + 8].tolist()
        chunk = np.fromfile(f"data/tiny/train_{visit % 4:03d}.bin", np.uint16).reshape(33, 33)
        assert np.array_equal(rows, chunk[numbers])
        digest = hashlib.sha256(np.array(numbers, "<i8").tobytes()).hexdigest()[:16]
        assert logged[step - 1]["rows"] == digest and logged[step - 1]["step"] == step
        seen.setdefault(visit, []).extend(numbers)
    assert len(logged) == 32 and sorted(seen) == list(range(8))
    assert all(len(set(one)) == 32 for one in seen.values())
    assert seen[0] != seen[4]  # the second epoch has another order
    state = json.loads(Path("out/tiny/ckpt_005/state.json").read_text())
    assert (state["visit"], state["chunk"], state["epoch"], state["step"]) == (5, 1, 1, 24)
    queue = [[epoch, chunk] for epoch in (0, 1) for chunk in range(4)]
    assert state["queue"] == queue and state["consumed"] == queue[:6]
    assert state["tokens"] == 24 * 8 * 32


# ---- the loop ------------------------------------------------------------------------------------

@pytest.mark.numeric
def test_equals_a_loop_over_transformers(room):
    """Loss, norm and weights of LlamaForCausalLM under torch's AdamW on the rows of the files."""
    from transformers import LlamaForCausalLM
    config = config_of()
    start = Transformer(config.model)
    init_weights(start, config.data.seed)
    start.save_pretrained("start")
    theirs = LlamaForCausalLM.from_pretrained("start")
    train.main(["tiny.py", "--max_steps=6", "--dtype=float32", "--micro_batch_size=4"])
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.1)
    logged = metrics(Path("out/tiny"))
    for step in range(1, 7):
        visit, b = divmod(step - 1, 4)
        order = np.argsort(np.random.Philox(key=1337 << 64 | visit).random_raw(33), kind="stable")
        chunk = np.fromfile(f"data/tiny/train_{visit:03d}.bin", np.uint16).reshape(33, 33)
        x = torch.from_numpy(chunk[order[8 * b:8 * b + 8]].astype(np.int64))
        lr = 1e-2 * step / 3 if step < 3 else (
            1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 13)))
        loss = torch.nn.functional.cross_entropy(
            theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        line = logged[step - 1]
        assert line["lr"] == pytest.approx(lr)
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = load_file("out/tiny/last/model.safetensors")
    for name, p in theirs.named_parameters():
        assert (ours[name] - p).abs().max() < 1e-4, name


@pytest.mark.numeric
def test_micro_batches_leave_the_loss(room):
    """The mean over the global batch, whatever it is cut into."""
    for micro in (1, 4, 8):
        train.main(["tiny.py", "--max_steps=4", "--dtype=float32", f"--run=m{micro}",
                    f"--micro_batch_size={micro}"])
    a, b, c = (metrics(Path(f"out/m{micro}")) for micro in (1, 4, 8))
    for x, y, z in zip(a, b, c, strict=True):
        assert x["loss"] == pytest.approx(z["loss"], rel=1e-6)
        assert y["loss"] == pytest.approx(z["loss"], rel=1e-6)
        assert x["grad_norm"] == pytest.approx(z["grad_norm"], rel=1e-5)
        assert x["rows"] == y["rows"] == z["rows"]


@pytest.mark.numeric
def test_validation_by_brute_force(room):
    """Nats and bits per UTF-8 byte of the predicted pieces, row by row with transformers."""
    import sentencepiece
    from transformers import AutoModelForCausalLM
    train.main(["tiny.py", "--max_steps=4", "--dtype=float32"])
    coder = sentencepiece.SentencePieceProcessor(model_file="data/tiny/tokenizer.model")
    theirs = AutoModelForCausalLM.from_pretrained("out/tiny/ckpt_000")
    for line in metrics(Path("out/tiny"), "valid"):
        rows = np.fromfile(f"data/tiny/valid_{line['source']}.bin", np.uint16).reshape(-1, 33)
        assert len(rows)
        nats = n_bytes = 0
        for row in rows.astype(np.int64):
            logp = theirs(torch.from_numpy(row[None, :-1])).logits[0].log_softmax(-1)
            nats -= logp[torch.arange(32), torch.from_numpy(row[1:])].sum().item()
            for i in map(int, row[1:]):
                if coder.is_byte(i):
                    n_bytes += 1
                elif not coder.is_control(i):
                    n_bytes += len(coder.id_to_piece(i).replace("▁", " ").encode())
        assert line["tokens"] == rows[:, 1:].size and line["bytes"] == n_bytes
        assert line["loss"] == pytest.approx(nats / line["tokens"], rel=1e-5)
        assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert {line["source"] for line in metrics(Path("out/tiny"), "valid")} == {"a", "b"}


def test_loss_falls(room):
    train.main(["tiny.py"])
    lines = metrics(Path("out/tiny"))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


# ---- going on ------------------------------------------------------------------------------------

def again(*argv: str) -> subprocess.CompletedProcess:
    """train.py in a new process."""
    return subprocess.run([sys.executable, str(REPO / "train.py"), "tiny.py", *argv],
                          capture_output=True, text=True, timeout=300)


def test_two_and_two_visits_equal_four(room):
    """Weights, optimizer state, state.json and metrics of a run that stopped in between: the same
    bits, in the type that this machine trains in by default."""
    assert again("--run=straight").returncode == 0
    assert again("--run=parts", "--max_steps=8").returncode == 0
    assert not Path("out/parts/ckpt_002").exists()
    second = again("--run=parts")
    assert second.returncode == 0 and "going on from out/parts/ckpt_001, step 8" in second.stdout
    for v in range(4):
        a, b = (hashes(Path(f"out/{name}/ckpt_{v:03d}")) for name in ("straight", "parts"))
        assert "optimizer/adamw.safetensors" in a and "model.safetensors" in a and a == b
    for kind in ("train", "valid"):
        a, b = (metrics(Path(f"out/{name}"), kind) for name in ("straight", "parts"))
        assert a == b
    assert [line["step"] for line in metrics(Path("out/parts"))] == list(range(1, 17))


def test_a_stop_inside_a_visit(room, capsys):
    """max_steps inside a visit leaves last/, from which the run goes on to the same bits."""
    train.main(["tiny.py", "--run=straight"])
    train.main(["tiny.py", "--run=parts", "--max_steps=6"])
    assert Path("out/parts/last/state.json").is_file()
    train.main(["tiny.py", "--run=parts"])
    assert not Path("out/parts/last").exists()
    assert hashes(Path("out/parts/ckpt_003")) != {}
    straight, parts = (load_file(f"out/{name}/ckpt_003/model.safetensors")
                       for name in ("straight", "parts"))
    assert all(torch.equal(straight[k], parts[k]) for k in straight)
    assert metrics(Path("out/parts")) == metrics(Path("out/straight"))


def test_a_crystalcoder_trains_resumes_and_speaks(room, capsys):
    """All of CrystalCoder's switches by the command line: its checkpoints have the published names,
    a resumed run is the same bits, and the other stages read them."""
    import evaluate
    import sample
    switches = ("--norm=layer --norm_eps=1e-5 --bias=true --n_kv_head=none --rotary_dim=4 "
                "--rope_interleaved=true --tie=true --mup_base_width=8 --mup_emb_mult=4 "
                "--mup_alpha=2").split()
    train.main(["tiny.py", "--run=straight", *switches])
    train.main(["tiny.py", "--run=parts", "--max_steps=6", *switches])
    train.main(["tiny.py", "--run=parts", *switches])
    last = Path("out/parts/ckpt_003")
    straight, parts = (load_file(f"out/{name}/ckpt_003/model.safetensors")
                       for name in ("straight", "parts"))
    assert "transformer.h.1.attn.c_attn.weight" in straight and straight.keys() == parts.keys()
    assert all(torch.equal(straight[k], parts[k]) for k in straight)
    groups = json.loads((last / "state.json").read_text())["param_groups"]
    assert {(g["lr_mult"], g["weight_decay"]) for g in groups} == {(1, 0.1), (0.25, 0.1), (1, 0)}
    losses = [line["loss"] for line in metrics(Path("out/parts"))]
    assert losses[-1] < losses[0] - 0.5
    capsys.readouterr()
    sample.main([str(last), "--prompt=red green", "--max_new_tokens=8"])
    evaluate.main([str(last), "--tasks=valid"])
    out = capsys.readouterr().out
    assert out.startswith("red green") and "bits_per_byte" in out


def test_a_mixture_goes_on(room):
    """Its config.json is ours and spells out that each head has keys of its own; a LLaMA's has none
    such. Both are the same model."""
    argv = ["tiny.py", "--norm=layer", "--norm_eps=1e-5", "--n_kv_head=4"]
    train.main([*argv, "--max_steps=6"])
    train.main([*argv, "--max_steps=8"])
    assert (Path("out/tiny/ckpt_001/config.json").read_text()).count('"nano360"') == 1
    assert metrics(Path("out/tiny"))[-1]["step"] == 8


def test_a_kill_between_save_and_validation(room):
    """The held-out lines that a kill prevented are made up for; later and broken lines go."""
    train.main(["tiny.py", "--max_steps=8"])
    path = Path("out/tiny/metrics.jsonl")
    whole = metrics(Path("out/tiny"), "valid")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"valid"' in line and '"step": 8' in line)]
    path.write_text("".join(kept) + '{"kind": "train", "step": 9}\n{"kind": "tr')
    train.main(["tiny.py", "--max_steps=9"])
    assert [line for line in metrics(Path("out/tiny"), "valid") if line["step"] <= 8] == whole
    assert [line["step"] for line in metrics(Path("out/tiny"))] == list(range(1, 10))


def test_metrics_stay_when_the_checkpoint_is_broken(room):
    """What is on disk is changed only after the checkpoint to go on from was verified."""
    train.main(["tiny.py", "--max_steps=6"])
    shutil.rmtree("out/tiny/last")
    Path("out/tiny/ckpt_000/optimizer/adamw.safetensors").unlink()
    before = hashes(Path("out"))
    assert run(train.main, "", [], ["tiny.py"]) == 4
    assert hashes(Path("out")) == before


def test_a_kill_while_last_is_replaced(room):
    """Between its two renames only last.old is whole: the run goes on from there."""
    train.main(["tiny.py", "--max_steps=6"])
    Path("out/tiny/last").rename("out/tiny/last.old")
    train.main(["tiny.py", "--max_steps=7"])
    assert [line["step"] for line in metrics(Path("out/tiny"))] == list(range(1, 8))
    assert json.loads(Path("out/tiny/run.json").read_text())["launches"][1]["from_step"] == 6


def test_the_last_validation_is_made_up_for(room):
    train.main(["tiny.py", "--max_steps=4"])
    path = Path("out/tiny/metrics.jsonl")
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True)
                            if '"valid"' not in line))
    train.main(["tiny.py", "--max_steps=4"])
    assert path.read_text() == whole


def test_the_run_says_what_it_was_trained_on(room):
    """run.json holds the sources and numbers of the data's manifest, not the run file's guess."""
    train.main(["tiny.py", "--max_steps=1", "--rows_per_chunk=999", "--tokenizer=/some/where/x=y"])
    data = json.loads(Path("out/tiny/run.json").read_text())["config"]["data"]
    assert data["rows_per_chunk"] == 33 and data["tokenizer"] == "bpe"
    assert [(one["name"], one["path"]) for one in data["sources"]] == [
        ("a", "a.jsonl"), ("b", "b.txt")]
    assert "some" not in Path("out/tiny/run.json").read_text()


def test_finished_says_so(room, capsys):
    train.main(["tiny.py", "--max_steps=4"])
    before = hashes(Path("out"))
    for argv in (["--max_steps=4"], ["--max_steps=2"]):
        assert run(train.main, "", [], ["tiny.py", *argv]) == 0
        assert "out/tiny is finished: out/tiny/ckpt_000 holds step 4" in capsys.readouterr().out
    assert hashes(Path("out")) == before


def test_a_changed_checkpoint_is_refused(room, capsys):
    train.main(["tiny.py", "--max_steps=4"])
    for name in ("model.safetensors", "optimizer/adamw.safetensors", "state.json", "config.json"):
        path = Path("out/tiny/ckpt_000") / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        assert run(train.main, "", [], ["tiny.py"]) == 4
        assert str(path) in capsys.readouterr().err
        path.write_bytes(good)


def test_the_folder_is_publishable(room):
    """No absolute path and no machine's name, though the command line had one."""
    train.main([str(room / "tiny.py"), "--max_steps=1"])
    text = "".join(p.read_text(errors="replace") for p in Path("out").rglob("*")
                   if p.suffix in (".json", ".jsonl"))
    assert str(room) not in text and socket.gethostname() not in text
    launch = json.loads(Path("out/tiny/run.json").read_text())["launches"][0]
    assert launch["command"] == ["tiny.py", "--max_steps=1"] and launch["from_step"] == 0


@pytest.mark.numeric
@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_checkpoint_loads_in_transformers(which, room):
    """AutoModelForCausalLM gives our logits and greedy tokens, AutoTokenizer our ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = REPO / "out/demo/ckpt_007"
    if which == "tiny":
        train.main(["tiny.py", "--max_steps=4"])
        folder = Path("out/tiny/ckpt_000")
    elif not folder.is_dir():
        pytest.skip("no out/demo/ckpt_007: `make demo` makes it")
    ours = Transformer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    T = ours.config.seq_len
    x = torch.randint(ours.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    assert (ours(x) - theirs(x).logits).abs().max() < 1e-4
    prompt, n = x[:1, :T // 4], min(64, T // 2)
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                             do_sample=False, pad_token_id=0, eos_token_id=None)
    assert ours.generate(prompt, n, temperature=0).tolist() == greedy.tolist()
    text = "red  green\n\n   blue </s> \u00e9\u4e2d"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == (
        tokenizers.load_tokenizer(folder).encode(text))


# ---- bad input: rows of a table, what is done before, exit code, what the line says --------------

def edit_manifest(**changes) -> None:
    """Change the manifest of a copy of the data and seal it again, as a wrong prepare would."""
    path = Path("data/tiny/manifest.json")
    write_sealed(path, json.loads(path.read_text()) | changes)


def cut_chunk(size: int) -> None:
    path = Path("data/tiny/train_000.bin")
    content = path.read_bytes()
    path.write_bytes(content[:size] if size < 0 else content + b"x" * size)


def flip_chunk() -> None:
    path = Path("data/tiny/train_000.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def wrong_id() -> None:
    """An id the tokenizer does not have, in a file whose hash is right."""
    path = Path("data/tiny/train_000.bin")
    rows = np.fromfile(path, np.uint16)
    rows[100] = 60000
    rows.tofile(path)
    manifest = json.loads(Path("data/tiny/manifest.json").read_text())
    manifest["files"]["train_000.bin"]["sha256"] = sha256_file(path)
    write_sealed(Path("data/tiny/manifest.json"), manifest)


def other_run() -> None:
    train.main(["tiny.py", "--max_steps=4"])


def file_named_out() -> None:
    Path("out").write_text("a file")


def no_data() -> None:
    Path("data/tiny").rename("data/elsewhere")


def other_tokenizer() -> None:
    spec = json.loads(Path("data/tiny/manifest.json").read_text())["tokenizer"]
    edit_manifest(tokenizer=spec | {"sha256": "f" * 64})


def other_words() -> None:
    Path("data/tiny/tokenizer.json").write_text("{}")


def no_piece_bytes() -> None:
    Path("data/tiny/piece_bytes.npy").unlink()


def tampered_manifest() -> None:
    path = Path("data/tiny/manifest.json")
    path.write_text(path.read_text().replace("1337", "1338"))


def garbage_run() -> None:
    Path("out/tiny").mkdir(parents=True)
    Path("out/tiny/run.json").write_text("{")


def foreign_checkpoint() -> None:
    train.main(["tiny.py", "--run=other", "--seed=5", "--max_steps=4"])
    Path("out/tiny").mkdir(parents=True)
    Path("out/other/ckpt_000").rename("out/tiny/ckpt_000")


def nothing() -> None:
    pass


BAD = [
    (no_data, [], 3, ["data/tiny not found", "python prepare.py"]),
    (lambda: cut_chunk(-1), [], 3, ["train_000.bin", "2177 bytes", "expected 2178"]),
    (lambda: cut_chunk(66), [], 3, ["train_000.bin", "2244 bytes", "expected 2178"]),
    (lambda: Path("data/tiny/train_000.bin").unlink(), [], 3, ["train_000.bin is missing"]),
    (flip_chunk, [], 3, ["train_000.bin was changed", "--verify"]),
    (tampered_manifest, [], 3, ["manifest.json was changed"]),
    (wrong_id, [], 3, ["train_000.bin", "id 60000", "row 3, token 1", "byte 200", "300 ids"]),
    (nothing, ["--vocab_size=9000"], 3, ["vocab_size is 9000", "300 ids", "--vocab_size=300"]),
    (nothing, ["--vocab_size=299"], 3, ["vocab_size is 299", "300 ids"]),
    (nothing, ["--tokenizer_sha256=" + "a" * 64], 3, ["tokenizer has sha256", "a" * 64]),
    (other_tokenizer, [], 3, ["tokenizer.model", "f" * 64]),
    (other_words, [], 3, ["tokenizer.json is missing or was changed", "prepare the set again"]),
    (no_piece_bytes, [], 3, ["piece_bytes.npy is missing or was changed"]),
    (nothing, ["--seq_len=64"], 3, ["seq_len is 64", "the data has 32"]),
    (nothing, ["--n_chunks=5"], 3, ["n_chunks is 5", "the data has 4"]),
    (nothing, ["--batch_size=34"], 3, ["33 rows", "batch of 34"]),
    (nothing, ["--batch_size=10", "--micro_batch_size=4"], 2,
     ["10 rows", "micro_batch_size = 4", "--micro_batch_size=2"]),
    (other_run, ["--lr=0.5", "--beta1=0.8", "--max_steps=8"], 2,
     ["another run", "lr", "0.01", "0.5", "beta1", "0.9", "0.8", "--run=NAME"]),
    (nothing, ["--device=cuda"], 6, ["device=cuda", "finds only", "--device=auto"]),
    (nothing, ["--dtype=float16"], 2, ["--dtype", "float32 | bfloat16", "'float16'"]),
    (file_named_out, [], 4, ["out/tiny", "--run=NAME"]),
    (nothing, ["--run=../../elsewhere"], 2, ["--run"]),
    (nothing, ["--lr=1e30", "--warmup_steps=0", "--dtype=float32"], 5,
     ["step 4", "nan", "chunk 0, rows", "lr is", "--lr", "incidents.jsonl"]),
    (nothing, ["--warmup_steps=16"], 2, ["the whole queue has 16 steps", "--warmup_steps=1"]),
    (garbage_run, [], 4, ["run.json is broken"]),
    (foreign_checkpoint, [], 4, ["ckpt_000 is none of this run", "seed"]),
]


@pytest.mark.parametrize("before, argv, code, parts", BAD,
                         ids=[f"{b.__name__} {' '.join(a)}"[:50] for b, a, _, _ in BAD])
def test_bad_input(before, argv, code, parts, prepared, tmp_path, monkeypatch, capsys):
    """One line with what happened and what to do, its exit code, nothing lost or overwritten."""
    if "--device=cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    shutil.copytree(prepared / "data", tmp_path / "data")
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    before()
    files = hashes(tmp_path)
    capsys.readouterr()
    assert run(train.main, "", [], ["tiny.py", *argv]) == code
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert err.count("error:") == 1 or before is other_run and "Traceback" not in err
    after = hashes(tmp_path)
    assert all(after[name] == digest for name, digest in files.items())
    assert not list(tmp_path.rglob("ckpt_*")) or before in (other_run, foreign_checkpoint)


def test_out_of_memory_says_what_to_change(room):
    """What torch says when memory is gone becomes the sizes and a smaller micro-batch."""
    config, place = config_of(), train.choose_place(config_of("--device=cpu"))
    for error in (torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        said = explain(error, config, place, 0)
        assert said.code == 6 and "micro-batches of 8 rows of 32" in str(said)
        assert "--micro_batch_size=4" in str(said)
    one = explain(error, config_of("--micro_batch_size=1"), place, 0)
    assert "--recompute=full" in str(one)
    one = explain(error, config_of("--micro_batch_size=1", "--recompute=full"), place, 0)
    assert "a smaller model" in str(one)
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert explain(other, config, place, 0) is None


def test_without_a_compiler(room):
    """--compile=true where there is no C++ compiler ends in a line, not in pages of inductor."""
    env = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(room / "cache")}
    done = subprocess.run([sys.executable, str(REPO / "train.py"), "tiny.py", "--compile=true",
                           "--max_steps=1", "--device=cpu"], capture_output=True, text=True,
                          timeout=300, env=env)
    assert done.returncode == 6 and "Traceback" not in done.stderr
    assert "--compile=false" in done.stderr.splitlines()[-1]


# ---- several processes ---------------------------------------------------------------------------

def loopback() -> bool:
    """Whether processes here can talk at all: where the network is cut, lo may be down too."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
        return True
    except OSError:
        return False


def torchrun(n: int, *argv: str, script: str = "train.py") -> subprocess.CompletedProcess:
    # -- keeps torchrun from reading --run=NAME as an abbreviation of its own --run-path
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
               f"--master_port={free_port()}", "--", str(REPO / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.numeric
@pytest.mark.skipif(not loopback(), reason="no loopback interface: processes cannot talk")
def test_two_processes_equal_one(tmp_path, monkeypatch):
    """torchrun on a cut-down Amber-7B: the rows, losses and weights of one process."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "amber_7b"
    folder.mkdir(parents=True)
    # one made-up chunk of the 360, and 31,999 ranks + <|endoftext|> for a tokenizer
    import base64
    pairs = [bytes([a, b]) for a in range(124) for b in range(256)][:31_999 - 256]
    ranks = [bytes([i]) for i in range(256)] + pairs
    (folder / "tokenizer.tiktoken").write_bytes(
        b"".join(base64.b64encode(r) + b" %d\n" % i for i, r in enumerate(ranks)))
    rows = np.random.default_rng(0).integers(0, 32_000, (24, 257)).astype(np.uint16)
    rows.tofile(folder / "train_000.bin")
    rows[:2].tofile(folder / "valid_made.bin")
    spec = tokenizers.load_tokenizer(folder / "tokenizer.tiktoken").spec()
    files = {name: dict(rows=n, sha256=sha256_file(folder / name))
             for name, n in (("train_000.bin", 24), ("valid_made.bin", 2))}
    write_sealed(folder / "manifest.json", dict(
        format=1, data_hash="0" * 64, tokenizer=spec, seq_len=256, dtype="uint16", seed=11111,
        n_chunks=360, rows_per_chunk=24, files=files,
        recipe=dict(sources=[], tokenizer=""), sources=[dict(
            name="made", origin="made", licence="none", weight=1.0, valid_rows=2)]))
    argv = [str(REPO / "configs/amber_7b.py"), "--n_layer=2", "--n_head=4", "--n_embd=64",
            "--n_inner=172", "--seq_len=256", "--batch_size=8", "--max_steps=3",
            "--tokenizer_sha256="]
    two = torchrun(2, *argv, "--run=two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step 3/3") == 1  # rank 0 speaks for both
    train.main([*argv, "--run=one"])
    a, b = metrics(Path("out/one")), metrics(Path("out/two"))
    assert len(a) == len(b) == 3
    for x, y in zip(a, b, strict=True):
        assert x["rows"] == y["rows"] and x["tokens"] == y["tokens"]
        assert abs(x["loss"] - y["loss"]) < 1e-5
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-2)
    one, other = (load_file(f"out/{n}/ckpt_000/model.safetensors") for n in ("one", "two"))
    for name in one:
        assert (one[name] - other[name]).abs().max() < 1e-4, name
