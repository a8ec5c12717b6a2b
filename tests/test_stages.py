"""Training in stages, as CrystalCoder's: a run that starts from another run's checkpoint.

The chain of the three configs in small, on made-up text: what is carried over is compared with a
loop that is written out here, and with numbers that were published.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import prepare
import train
from conftest import REPO
from model import Transformer
from nano360.config import CHECKPOINT, USAGE, Config, Stop, load, run, to_json
from nano360.files import write_sealed
from test_train import hashes, metrics, words

# Two chunks of four steps a stage. m = 32 / 8 = 4.
ONE = """
n_layer = 2
n_head = 4
n_embd = 32
n_inner = 64
vocab_size = 300
seq_len = 32
norm = "layer"
norm_eps = 1e-5
bias = True
rotary_dim = 2
rope_interleaved = True
tie = True
mup_base_width = 8
mup_emb_mult = 7.3
mup_alpha = 2.22
init_std = 0.146
sources = [dict(name="prose", path="prose.jsonl", weight=0.9),
           dict(name="code", path="code.jsonl", weight=0.1)]
special_tokens = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"
bos = True
overlap = True
n_chunks = 2
rows_per_chunk = 32
valid_share = 0.1
lr = 1e-2
min_lr = 1e-3
schedule = "linear"
warmup_steps = 2
decay_steps = 20
batch_size = 8
eps = 1e-9
dtype = "float32"
log_every = 4
"""
TWO = ONE + """
_prose, _code = sources
sources = [_prose | dict(weight=0.4), _code | dict(weight=0.6, fim_rate=0.9)]
tokenizer = "data/one/tokenizer.model"
special_tokens = ""
init_from = "out/one/ckpt_001"
init_optimizer = True
lr = 6e-3
decay_steps = 12
"""
THREE = TWO + """
_prose, _code = sources
sources = [_prose | dict(weight=0.2), _code | dict(weight=0.8, fim_rate=0.3)]
init_from = "out/two/ckpt_001"
init_optimizer = False
lr = 2e-3
decay_steps = 8
"""
RUN_FILES = {"one": ONE, "two": TWO, "three": THREE}
MARKS = {"<|fim_prefix|>": 296, "<|fim_middle|>": 297, "<|fim_suffix|>": 298, "<|fim_pad|>": 299}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with three run files and their data, the first stage trained to its end."""
    root = tmp_path_factory.mktemp("stages")
    for name, text in RUN_FILES.items():
        (root / f"{name}.py").write_text(text)
    for s, source in enumerate(("prose", "code")):
        rows = [json.dumps({"text": words(20 + i, 1000 * s + i)}) for i in range(150)]
        (root / f"{source}.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in RUN_FILES:
            prepare.main([f"{name}.py", "--workers=1"])
        train.main(["one.py"])
    return root


@pytest.fixture
def room(trained, tmp_path, monkeypatch) -> Path:
    """A folder to run in, with the data in reach and a copy of the first stage's checkpoints."""
    for name in ("data", "prose.jsonl", "code.jsonl"):
        (tmp_path / name).symlink_to(trained / name)
    shutil.copytree(trained / "out", tmp_path / "out")
    for name, text in RUN_FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path: str) -> dict:
    return json.loads(Path(path).read_text())


def batch(dataset: str, step: int) -> torch.Tensor:
    """The rows (8, 33) of a step, of 4 in each chunk, by the Philox keys of its order."""
    chunk, b = divmod(step - 1, 4)
    rows = np.fromfile(f"data/{dataset}/train_{chunk:03d}.bin", np.uint16).reshape(32, 33)
    order = np.argsort(np.random.Philox(key=1337 << 64 | chunk).random_raw(32), kind="stable")
    return torch.from_numpy(rows[order[8 * b:8 * b + 8]].astype(np.int64))


def forget_steps(folder: str, updates: int) -> None:
    """Say that fewer steps were taken than were counted, as where a loss was no number."""
    path = Path(folder) / "state.json"
    write_sealed(path, read(path) | {"updates": updates})


# ---- what is carried over ------------------------------------------------------------------------

def test_the_data_of_a_chain(room, capsys):
    """One tokenizer for all; its special tokens are in its file, and cannot be added again."""
    sets = [read(f"data/{name}/manifest.json") for name in RUN_FILES]
    assert len({one["tokenizer"]["sha256"] for one in sets}) == 1
    for one in sets:
        assert one["tokenizer"]["vocab_size"] == 300
        assert MARKS.items() <= one["tokenizer"]["special_tokens"].items()
    with_marks = []
    for name in RUN_FILES:
        ids = np.concatenate([np.fromfile(f"data/{name}/train_{k:03d}.bin", np.uint16)
                              for k in range(2)])
        assert MARKS["<|fim_pad|>"] not in ids
        with_marks.append([int((ids == MARKS[f"<|fim_{part}|>"]).sum())
                           for part in ("prefix", "middle", "suffix")])
    assert with_marks[0] == [0, 0, 0]
    assert min(with_marks[1]) > min(with_marks[2]) > 0
    prose = {Path(f"data/{name}/valid_prose.bin").read_bytes() for name in RUN_FILES}
    assert len(prose) == 1 and prose != {b""}  # so that all stages are asked the same
    assert run(prepare.main, "", [], ["two.py", "--dataset=twice", "--workers=1",
                                      "--special_tokens=<|fim_prefix|>"]) == USAGE
    assert "<|fim_prefix|> is already defined" in capsys.readouterr().err
    assert not list(Path("data").glob("twice*"))


@pytest.mark.numeric
@pytest.mark.parametrize("updates", [8, 5])
@pytest.mark.parametrize("carried", [True, False])
def test_equals_a_loop_from_the_parent(carried, updates, room):
    """Losses, norms and weights of AdamW on the parent's weights: with its moments and the number
    of steps that they have seen, which corrects their bias, or with none."""
    forget_steps("out/one/ckpt_001", updates)
    train.main(["two.py", f"--init_optimizer={str(carried).lower()}"])
    model = Transformer.from_pretrained("out/one/ckpt_001")
    moments = load_file("out/one/ckpt_001/optimizer/adamw.safetensors")
    named = dict(model.named_parameters())
    # muP: matrices inside the blocks at lr / 4; norms and biases do not decay
    optimizer = torch.optim.AdamW(
        [dict(params=[p], inside=p.ndim == 2 and ".layers." in name,
              weight_decay=0.1 if p.ndim == 2 else 0.0) for name, p in named.items()],
        betas=(0.9, 0.95), eps=1e-9, foreach=False)
    for name, p in named.items() if carried else ():
        assert moments[f"exp_avg_sq.{name}"].any()
        optimizer.state[p] = {"step": torch.tensor(float(updates)),
                              "exp_avg": moments[f"exp_avg.{name}"],
                              "exp_avg_sq": moments[f"exp_avg_sq.{name}"]}
    logged = metrics(Path("out/two"))
    assert [line["step"] for line in logged] == list(range(1, 9))  # a stage counts from 1
    for step, line in enumerate(logged, 1):
        x = batch("two", step)
        lr = 6e-3 * step / 2 if step < 2 else 6e-3 - 5e-3 * (step - 2) / 10
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr / 4 if group["inside"] else lr
        optimizer.step()
        optimizer.zero_grad()
        assert line["lr"] == pytest.approx(lr)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert line["tokens"] == step * 8 * 32
    ours = Transformer.from_pretrained("out/two/ckpt_001")
    for name, p in ours.named_parameters():
        # The bias of k adds the same to all that a query asks: its gradient is rounding alone,
        # which Adam makes as large as any.
        assert (named[name] - p).abs().max() < 1e-5 or name.endswith("k_proj.bias"), name
    state = read("out/two/ckpt_001/state.json")
    assert (state["step"], state["updates"]) == (8, 8 + updates * carried)


@pytest.mark.numeric
def test_the_optimizer_makes_a_difference(room):
    """Two runs begin with one loss, which is far below that of random weights, and then part."""
    train.main(["two.py"])
    train.main(["two.py", "--run=bare", "--init_optimizer=false"])
    train.main(["two.py", "--run=random", "--init_from=none", "--init_optimizer=false"])
    kept, bare, random = ([line["loss"] for line in metrics(Path("out") / name)]
                          for name in ("two", "bare", "random"))
    assert kept[0] == bare[0] < random[0] - 1
    assert all(abs(a - b) > 1e-4 for a, b in zip(kept[1:], bare[1:], strict=True))


def test_three_stages(room):
    """The chain as its run files say it: each begins below where the one before it began."""
    train.main(["two.py"])
    train.main(["three.py"])
    first = [metrics(Path("out") / name)[0]["loss"] for name in RUN_FILES]
    assert first[0] > first[1] + 1 and first[1] > first[2]
    updates = [read(f"out/{name}/ckpt_001/state.json")["updates"] for name in RUN_FILES]
    assert updates == [8, 16, 8]
    parents = [read(f"out/{name}/run.json")["parent"] for name in RUN_FILES]
    assert [one and one["checkpoint"] for one in parents] == [
        None, "out/one/ckpt_001", "out/two/ckpt_001"]
    assert [one and one["updates"] for one in parents] == [None, 8, 16]


def test_last_is_a_parent_too(room):
    """Where a stage is stopped inside a visit, the next one starts from its last/."""
    train.main(["one.py", "--run=short", "--max_steps=6"])
    assert not Path("out/short/ckpt_001").exists()
    train.main(["two.py", "--init_from=out/short/last", "--max_steps=1"])
    parent = read("out/two/run.json")["parent"]
    assert (parent["checkpoint"], parent["step"], parent["tokens"]) == (
        "out/short/last", 6, 6 * 8 * 32)
    assert read("out/two/last/state.json")["updates"] == 7


# ---- what is written down ------------------------------------------------------------------------

def fingerprint(folder: str, *weights: str) -> str:
    """sha256 over a line for config.json and for each file of weights, as `sha256sum` prints it."""
    lines = [hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest() + f"  {name}\n"
             for name in ("config.json", *weights)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_run_knows_its_parent(room):
    forget_steps("out/one/ckpt_001", 7)
    train.main(["two.py"])
    sha256 = fingerprint("out/one/ckpt_001", "model.safetensors")
    assert read("out/two/run.json")["parent"] == {
        "checkpoint": "out/one/ckpt_001", "sha256": sha256, "step": 8, "updates": 7,
        "tokens": 8 * 8 * 32}
    assert read("out/one/run.json")["parent"] is None
    first, second = (Path(f"out/two/ckpt_00{v}/state.json") for v in range(2))
    assert read(first)["parent"] == sha256
    assert read(second)["parent"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert read("out/one/ckpt_000/state.json")["parent"] is None
    assert read("out/two/run.json")["config"]["train"]["init_from"] == "out/one/ckpt_001"


def test_a_path_of_this_machine_stays_here(room):
    train.main(["two.py", f"--init_from={room / 'out/one/ckpt_001'}", "--max_steps=1"])
    text = Path("out/two/run.json").read_text()
    assert read("out/two/run.json")["parent"]["checkpoint"] == "ckpt_001" and str(room) not in text


@pytest.mark.parametrize("carried", ["true", "false"])
def test_a_stop_inside_a_stage(carried, room):
    """The same bits, in weights, optimizer, state and metrics, though the parent has gone."""
    argv = ["two.py", f"--init_optimizer={carried}"]
    train.main([*argv, "--run=straight"])
    for steps in (2, 5):  # inside the first visit, whose parent is the other run's, and the second
        train.main([*argv, "--run=parts", f"--max_steps={steps}"])
        shutil.rmtree("out/one", ignore_errors=True)
    train.main([*argv, "--run=parts"])
    for v in range(2):
        a, b = (hashes(Path(f"out/{name}/ckpt_{v:03d}")) for name in ("straight", "parts"))
        assert "optimizer/adamw.safetensors" in a and a == b
    for kind in ("train", "valid"):
        assert metrics(Path("out/parts"), kind) == metrics(Path("out/straight"), kind)
    straight, parts = (read(f"out/{name}/run.json") for name in ("straight", "parts"))
    assert parts["parent"] == straight["parent"] and parts["parent"]["step"] == 8
    assert [launch["from_step"] for launch in parts["launches"]] == [0, 2, 5]


# ---- folders of Hugging Face ---------------------------------------------------------------------

LLAMA = ("--norm=rms --norm_eps=1e-6 --bias=false --rotary_dim=none --rope_interleaved=false "
         "--tie=false --mup_base_width=none --mup_emb_mult=1 --mup_alpha=1").split()


@pytest.mark.numeric
def test_from_a_folder_of_transformers(room, capsys):
    """Its weights begin the run; it has no optimizer's state, and says so where one is wanted."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64,
        vocab_size=300, max_position_embeddings=32, rms_norm_eps=1e-6, initializer_range=0.1))
    theirs.save_pretrained("theirs", max_shard_size="40KB")
    shards = sorted(path.name for path in Path("theirs").glob("*.safetensors"))
    argv = ["two.py", "--init_from=theirs", *LLAMA]
    before = hashes(room / "out")
    assert run(train.main, "", [], argv) == CHECKPOINT
    assert "theirs has no optimizer state: give --init_optimizer=false" in capsys.readouterr().err
    assert hashes(room / "out") == before
    train.main([*argv, "--init_optimizer=false"])
    x = batch("two", 1)
    loss = theirs(x, labels=x).loss.item()
    assert metrics(Path("out/two"))[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert len(shards) > 1 and read("out/two/run.json")["parent"] == {
        "checkpoint": "theirs", "sha256": fingerprint("theirs", *shards),
        "step": None, "updates": None, "tokens": None}
    assert read("out/two/ckpt_001/state.json")["updates"] == 8


# ---- what is refused: what is done before, exit code, what the line says -------------------------

def flip(name: str) -> None:
    """Another bit in the middle of a file of the parent."""
    path = Path("out/one/ckpt_001") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def begin() -> None:
    train.main(["two.py", "--max_steps=1"])


def without_optimizer() -> None:
    shutil.rmtree("out/one/ckpt_001/optimizer")


def nothing() -> None:
    pass


BAD = [
    (nothing, ["--n_layer=1"], 4, ["out/one/ckpt_001", "another model", "(n_layer 2, here 1)"]),
    (nothing, ["--n_inner=96", "--mup_alpha=2", "--bias=false"], 4,
     ["n_inner 64, here 96", "bias True, here False", "mup_alpha 2.22, here 2.0"]),
    (nothing, ["--init_from=out/nowhere"], 4, ["out/nowhere", "no weights"]),
    (nothing, ["--init_from=out/one"], 4, ["out/one", "no weights"]),
    (nothing, ["--init_from=none"], 2, ["init_optimizer", "init_from names no checkpoint"]),
    (lambda: flip("model.safetensors"), [], 4, ["ckpt_001/model.safetensors was changed"]),
    (lambda: flip("model.safetensors"), ["--init_optimizer=false"], 4,
     ["ckpt_001/model.safetensors was changed"]),
    (lambda: flip("config.json"), [], 4, ["ckpt_001/config.json"]),
    (lambda: flip("optimizer/adamw.safetensors"), [], 4,
     ["ckpt_001/optimizer/adamw.safetensors was changed"]),
    (lambda: flip("state.json"), [], 4, ["ckpt_001/state.json was changed"]),
    (without_optimizer, [], 4, ["no optimizer state", "--init_optimizer=false"]),
    (begin, ["--init_from=out/one/ckpt_000"], 2,
     ["another run", "init_from", "out/one/ckpt_001", "out/one/ckpt_000", "--run=NAME"]),
    (begin, ["--init_from=none", "--init_optimizer=false"], 2,
     ["another run", "init_from", "out/one/ckpt_001", "None"]),
    (begin, ["--init_optimizer=false"], 2, ["another run", "init_optimizer", "True", "False"]),
]


@pytest.mark.parametrize("before, argv, code, parts", BAD,
                         ids=[f"{i}: {' '.join(a)}" for i, (_, a, _, _) in enumerate(BAD)])
def test_bad_parents(before, argv, code, parts, room, capsys):
    """One line with what happened and its exit code; no file is changed, nothing is begun."""
    before()
    files = hashes(room / "out")
    capsys.readouterr()
    assert run(train.main, "", [], ["two.py", *argv]) == code
    err = capsys.readouterr().err
    assert all(part in err for part in parts) and "Traceback" not in err, err
    assert hashes(room / "out") == files


def test_weights_alone_need_no_optimizer(room):
    """What is not read may be missing, or broken."""
    flip("optimizer/adamw.safetensors")
    train.main(["two.py", "--init_optimizer=false", "--max_steps=1"])
    without_optimizer()
    train.main(["two.py", "--init_optimizer=false", "--max_steps=1", "--run=again"])
    assert metrics(Path("out/two")) == metrics(Path("out/again"))


def test_a_parent_that_is_replaced_before_the_first_save(room, monkeypatch, capsys):
    """A run that was killed before it saved starts again from its parent, or from nothing else."""
    def killed(*args) -> None:
        raise Stop(137, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", killed)
        assert run(train.main, "", [], ["two.py"]) == 137
    record = read("out/two/run.json")
    assert record["parent"]["step"] == 8 and len(record["launches"]) == 1
    Path("out/one/ckpt_001").rename("out/one/kept")
    shutil.copytree("out/one/ckpt_000", "out/one/ckpt_001")
    other, capture = fingerprint("out/one/ckpt_001", "model.safetensors"), hashes(room / "out")
    capsys.readouterr()
    assert run(train.main, "", [], ["two.py"]) == CHECKPOINT
    err = capsys.readouterr().err
    assert all(part in err for part in ("out/one/ckpt_001", other, "--run=NAME")), err
    assert hashes(room / "out") == capture
    shutil.rmtree("out/one/ckpt_001")
    Path("out/one/kept").rename("out/one/ckpt_001")
    train.main(["two.py"])
    train.main(["two.py", "--run=straight"])
    assert hashes(Path("out/two/ckpt_001")) == hashes(Path("out/straight/ckpt_001"))
    assert read("out/two/run.json")["parent"] == record["parent"]


# ---- the run files -------------------------------------------------------------------------------

STAGES = {name: [f"{name}_stage{k}" for k in (1, 2, 3)]
          for name in ("crystal_mini", "crystalcoder_7b")}


def recipe(name: str) -> Config:
    return load([str(REPO / f"configs/{name}.py")])[0]


def rates(config: Config, *steps: int) -> list[float]:
    return [train.lr_at(step, config.optim, config.optim.max_steps) for step in steps]


@pytest.mark.parametrize("names", STAGES.values(), ids=list(STAGES))
def test_the_stages_are_one_chain(names):
    """One model and one tokenizer; each stage starts where the one before it stops, the second with
    its optimizer. What prepare would make of it, train takes."""
    configs = [recipe(name) for name in names]
    first = configs[0]
    fixed = ("weight_decay", "grad_clip", "beta1", "beta2", "eps", "batch_size", "schedule")
    ends = []
    for name, config in zip(names, configs, strict=True):
        data, optim = config.data, config.optim
        assert config.model == first.model and data.dataset == config.train.run == name
        assert all(getattr(optim, k) == getattr(first.optim, k) for k in fixed)
        assert (data.bos, data.overlap, data.seed) == (True, True, first.data.seed)
        assert (data.valid_share, data.valid_rows) == (
            first.data.valid_share, first.data.valid_rows)
        sha256 = data.tokenizer_sha256 or "0" * 64
        train.check(config, dict(
            tokenizer=dict(vocab_size=first.model.vocab_size, sha256=sha256),
            recipe=dict(tokenizer=sha256), seq_len=config.model.seq_len, n_chunks=data.n_chunks,
            rows_per_chunk=data.rows_per_chunk))
        whole, inside = divmod(optim.max_steps * optim.batch_size, data.rows_per_chunk)
        assert 0 < whole + (inside > 0) <= data.n_chunks
        ends.append(f"out/{name}/last" if inside else f"out/{name}/ckpt_{whole - 1:03d}")
    assert [config.train.init_from for config in configs] == [None, *ends[:2]]
    assert [config.train.init_optimizer for config in configs] == [False, True, False]
    rate = [max(source.fim_rate for source in config.data.sources) for config in configs[:2]]
    assert rate == [0, 0.9]
    assert 0.3 in {source.fim_rate for source in configs[2].data.sources}


def test_the_small_stages_have_one_tokenizer():
    one, two, three = (recipe(name).data for name in STAGES["crystal_mini"])
    assert one.tokenizer == "bpe" and one.special_tokens.split() == list(MARKS)
    for data in (two, three):
        assert data.tokenizer == "data/crystal_mini_stage1/tokenizer.model"
        assert data.special_tokens == ""
    for sources in zip(*(data.sources for data in (one, two, three)), strict=True):
        assert len({(source.name, source.path) for source in sources}) == 1  # so: one is held out
    large = recipe("crystalcoder_7b_stage1").data.special_tokens.split()
    assert large[:4] == list(MARKS)


@pytest.mark.numeric
def test_the_small_model_has_every_switch_of_the_large():
    small, large = (to_json(recipe(f"{name}_stage1"))["model"] for name in STAGES)
    sizes = {"n_layer", "n_head", "n_embd", "n_inner", "vocab_size", "seq_len", "rotary_dim",
             "mup_base_width", "mup_emb_mult", "init_std"}
    assert {k for k in small if small[k] != large[k]} == sizes
    for m in (small, large):
        assert m["rotary_dim"] * 4 == m["n_embd"] // m["n_head"]
        assert m["n_inner"] == m["n_embd"] * 8 // 3 and m["mup_base_width"] < m["n_embd"]
        assert m["mup_emb_mult"] * m["init_std"] == pytest.approx(14.6 * 0.073)
    with torch.device("meta"):
        model = Transformer(recipe("crystal_mini_stage1").model)
    assert sum(p.numel() for p in model.parameters()) == 1_119_486


@pytest.mark.numeric
def test_the_small_line_goes_over_two_stages():
    """0.012 at step 12, 0.00001 less with each step, 0.00012 at 1,200; from 300 on it is stage 2's,
    but for its warm-up. Stage 3 has its own."""
    one, two, three = (recipe(name) for name in STAGES["crystal_mini"])
    assert (one.optim.max_steps, two.optim.max_steps, three.optim.max_steps) == (300, 900, 120)
    for step in range(12, 1201):
        line = pytest.approx(0.012 - (step - 12) * 1e-5, rel=1e-9)
        if step <= 300:
            assert rates(one, step) == [line]
        elif step >= 312:
            assert rates(two, step - 300) == [line]
    assert rates(one, 6, 12, 300) == pytest.approx([0.006, 0.012, 0.00912])
    assert rates(two, 1, 12, 900) == pytest.approx([0.00075, 0.009, 0.00012])
    assert rates(three, 12, 66, 120) == pytest.approx([0.002, 0.0011, 0.0002])
    # the shares of the original's steps: 79,721, 214,387 and 27,728
    assert 300 / 900 == pytest.approx(79_721 / 214_387, rel=0.2)
    assert 120 / 1200 == pytest.approx(27_728 / 294_108, rel=0.2)


@pytest.mark.numeric
def test_the_published_line():
    one, two, three = (recipe(name) for name in STAGES["crystalcoder_7b"])
    assert rates(one, 86, 79_721) == pytest.approx([0.012, 0.0087869], rel=1e-5)
    assert rates(two, 86, 214_387) == pytest.approx([0.0087825, 0.00013679], rel=1e-9)
    before, after = rates(one, 79_721, 79_721 + 2 * 86)
    assert before > two.optim.lr > after
    for step in range(1000, 214_387, 1000):  # one line, but for its last digits
        assert rates(two, step) == pytest.approx(rates(one, 79_721 + step), rel=1e-3, abs=2e-6)
    assert rates(three, 276, 27_728) == pytest.approx([0.002, 0.0002], rel=1e-9)
