"""nano360/config.py: every run file loads, and all that can be wrong with one is said in words."""

import builtins
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import nano360.config
import nano360.files
from nano360.config import SECTIONS, Config, Stop, from_json, load, to_json
from nano360.files import read_sealed, sha256_file, write_sealed

REPO = Path(nano360.config.__file__).parent.parent
RUN_FILES = sorted((REPO / "configs").glob("[!_]*.py"))
CLASSES = [*SECTIONS.values(), nano360.config.Source]

# Every key that has no default.
SMALLEST = """\
n_layer = 1
n_head = 2
n_embd = 8
n_inner = 8
vocab_size = 300
seq_len = 8
n_chunks = 2
lr = 1e-3
batch_size = 2
"""
END = SMALLEST.count("\n")  # lines before what a test adds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a stage, as prepare.py has them."""
    verify: bool = nano360.config.key("check", False)
    text: str | None = nano360.config.key("some text", None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A maker of run files: text to put after the smallest one -> its name in the new cwd."""
    monkeypatch.chdir(tmp_path)

    def make(added: str = "", name: str = "mine.py", base: str = SMALLEST) -> str:
        Path(name).write_text(base + added, encoding="utf-8")
        return name
    return make


def refused(*argv: str, options: type | None = None) -> list[str]:
    """The lines with which a command line is refused."""
    with pytest.raises(Stop) as stop:
        load(list(argv), options)
    assert stop.value.code == nano360.config.USAGE
    return str(stop.value).splitlines()


# ---- the run files that are there ----------------------------------------------------------------

@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_loads_and_survives_json(path):
    config, options = load([str(path)])
    assert (config.data.dataset, config.train.run, options) == (path.stem, path.stem, None)
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config and isinstance(again.data.sources, tuple)
    values = dataclasses.astuple(again), dataclasses.astuple(config)
    assert repr(values[0]) == repr(values[1])  # 1 == 1.0 == True to ==, but not to repr


def test_loading_needs_the_standard_library_only():
    """--help and --plan must not wait for torch, nor need numpy."""
    code = ("import sys\n"
            "before = set(sys.modules)  # what an installation loads at every start\n"
            "import nano360.config\n"
            "for path in sys.argv[1:]: nano360.config.load([path])\n"
            "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
            "print(*sorted(new - set(sys.stdlib_module_names)))")
    done = subprocess.run([sys.executable, "-c", code, *map(str, RUN_FILES)], cwd=REPO,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "configs nano360", "")
    assert len(RUN_FILES) >= 2


def test_amber_7b_has_the_published_numbers():
    config = load([str(REPO / "configs/amber_7b.py")])[0]
    m, d, o = config.model, config.data, config.optim
    assert (m.n_layer, m.n_head, m.n_kv_head, m.n_embd, m.n_inner) == (32, 32, None, 4096, 11008)
    assert (m.vocab_size, m.seq_len, m.norm_eps, m.rope_theta) == (32000, 2048, 1e-6, 10000.0)
    per_layer = 4 * m.n_embd ** 2 + 3 * m.n_embd * m.n_inner + 2 * m.n_embd
    total = m.n_layer * per_layer + 2 * m.vocab_size * m.n_embd + m.n_embd
    assert total == 6_738_415_616
    assert (d.n_chunks, d.rows_per_chunk, d.seed) == (360, 1_706_880, 11111)
    assert (o.lr, o.min_lr, o.schedule, o.warmup_steps) == (3e-4, 3e-5, "cosine", 2000)
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_clip) == (0.9, 0.95, 1e-8, 0.1, 1.0)
    assert (o.batch_size, o.micro_batch_size, o.epochs) == (2240, 10, 1)
    assert o.batch_size == 224 * o.micro_batch_size  # GPUs x rows
    assert o.decay_steps == 274_320 == d.n_chunks * (d.rows_per_chunk // o.batch_size)
    released = 1_706_976  # rows a file; 96 fill no batch, 7 sources are held out of them
    assert d.rows_per_chunk == 762 * o.batch_size == released // o.batch_size * o.batch_size
    assert 0 <= released - d.rows_per_chunk - 7 * d.valid_rows < 7
    assert round(d.n_chunks * released * (m.seq_len + 1) / 1e12, 3) == 1.259


def test_llama_tokenizer_is_the_one_that_amber_7b_names(shared):
    config = load([str(REPO / "configs/amber_7b.py")])[0]
    path = shared / "tokenizer" / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip("no llama_tokenizer.model in ../shared/data/tokenizer")
    assert sha256_file(path) == config.data.tokenizer_sha256


def test_a_run_derives_from_another(file):
    path = file("from configs.amber_7b import *\nbatch_size = 64\nn_layer = n_layer // 2\n",
                name="half.py", base="")
    config, amber = load([path])[0], load([str(REPO / "configs/amber_7b.py")])[0]
    assert (config.optim.batch_size, config.model.n_layer) == (64, 16)
    assert (config.data.dataset, config.train.run) == ("half", "half")
    same = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, batch_size=2240),
        model=dataclasses.replace(config.model, n_layer=32),
        data=dataclasses.replace(config.data, dataset="amber_7b"),
        train=dataclasses.replace(config.train, run="amber_7b"))
    assert same == amber


def test_a_run_file_has_a_namespace_of_its_own(file):
    """What it defines, and the builtins it may shadow, reach neither us nor the next file."""
    before = dict(vars(nano360.config)), dict(vars(builtins)), sys.modules.get("__main__")
    path = file("import string\nfrom math import pi as _pi\n_width = 4\nn_embd = _width * 4\n"
                "assert __name__ == 'run_file'\n")
    assert load([path])[0].model.n_embd == 16  # modules and _names are not keys
    path = file("len = 3\n")
    assert refused(path) == [f"{path}:{END + 1}: unknown key 'len'; did you mean 'seq_len'? "
                             "(--help lists all)"]
    assert "'_width' is not defined" in refused(file("n_embd = _width * 4\n"))[0]
    assert before == (dict(vars(nano360.config)), dict(vars(builtins)), sys.modules.get("__main__"))
    assert "mine" not in sys.modules and "run_file" not in sys.modules


# ---- values and their types ----------------------------------------------------------------------

def test_values_of_a_file_keep_or_widen_their_type(file):
    config = load([file("lr = 1\nmax_steps = None\ncompile = False\n"
                        "sources = [dict(name='a', path='b', weight=2)]\n")])[0]
    assert repr(config.optim.lr) == "1.0" and config.optim.max_steps is None
    assert config.train.compile is False
    assert config.data.sources == (nano360.config.Source(name="a", path="b", weight=2.0),)
    assert repr(config.data.sources[0].weight) == "2.0"


@pytest.mark.parametrize("word, section, value", [
    ("--lr=1", "optim", 1.0), ("--lr=2e-4", "optim", 2e-4), ("--n_layer=3", "model", 3),
    ("--n-layer=3", "model", 3), ("--compile=true", "train", True),
    ("--compile=False", "train", False), ("--compile=FALSE", "train", False),
    ("--compile=NONE", "train", None), ("--max_steps=none", "optim", None),
    ("--max_steps=5", "optim", 5), ("--schedule=linear", "optim", "linear"),
    ("--dataset=other", "data", "other"), ("--text_key=", "data", ""),
    ("--text_key=a=b", "data", "a=b"), ("--tokenizer=None", "data", "None"),
])
def test_words_of_the_command_line_become_values(file, word, section, value):
    config = load([file(), word])[0]
    name = word[2:].partition("=")[0].replace("-", "_")
    got = getattr(getattr(config, section), name)
    assert repr(got) == repr(value)
    others = [s for s in SECTIONS if s != section]  # and nothing else moved
    assert all(getattr(config, s) == getattr(load([file()])[0], s) for s in others)


@pytest.mark.parametrize("word, said", [
    ("--batch_size=abc", "--batch_size wants a whole number, got 'abc'"),
    ("--batch_size=12.5", "--batch_size wants a whole number, got '12.5'"),
    ("--batch_size=", "--batch_size wants a whole number, got ''"),
    ("--batch_size=none", "--batch_size wants a whole number, got 'none'"),
    ("--max_steps=x", "--max_steps wants a whole number or none, got 'x'"),
    ("--lr=fast", "--lr wants a number, got 'fast'"),
    ("--compile=1", "--compile wants true or false or none, got '1'"),
    ("--verify=maybe", "--verify wants true or false, got 'maybe'"),
    ("--sources=x", "--sources wants a list of dict(...), got 'x'"),
    ("--schedule=step", "--schedule wants one of cosine | linear, got 'step'"),
    ("--n_head=0", "--n_head wants 1 or more, got '0'"),
    ("--lr=-1", "--lr wants more than 0, got '-1'"),
    ("--lr=0", "--lr wants more than 0, got '0'"),
    ("--lr=nan", "--lr wants more than 0, got 'nan'"),
    ("--valid_share=0.6", "--valid_share wants 0.5 or less, got '0.6'"),
    ("--seed=4294967296", "--seed wants 4294967295 or less, got '4294967296'"),
    ("--run=../up", "--run wants text like [A-Za-z0-9][A-Za-z0-9._-]*, got '../up'"),
    ("--dataset=.hidden", "--dataset wants text like [A-Za-z0-9][A-Za-z0-9._-]*, got '.hidden'"),
    ("--tokenizer_sha256=12", "--tokenizer_sha256 wants text like ([0-9a-f]{64})?, got '12'"),
    ("--learning_rate=1", "--learning_rate: 'learning_rate' is called 'lr' here"),
    ("--n_layr=2", "--n_layr: unknown key 'n_layr'; did you mean 'n_layer'? (--help lists all)"),
    ("--n_layr", "--n_layr: unknown key 'n_layr'; did you mean 'n_layer'? (--help lists all)"),
    ("--qqq=2", "--qqq: unknown key 'qqq'; not a key (--help lists all)"),
    ("--lr", "--lr needs a value: write --lr=VALUE"),
    ("--text", "--text needs a value: write --text=VALUE"),
])
def test_a_wrong_word_is_refused(file, word, said):
    assert refused(file(), word, options=Options) == [said]


def test_a_blank_instead_of_an_equals_sign(file):
    assert refused(file(), "--lr", "1e-3") == ["--lr needs a value: write --lr=VALUE"]


@pytest.mark.parametrize("line, said", [
    ("n_layr = 2", "unknown key 'n_layr'; did you mean 'n_layer'? (--help lists all)"),
    ("qqq = 2", "unknown key 'qqq'; not a key (--help lists all)"),
    ("learning_rate = 2", "'learning_rate' is called 'lr' here"),
    ("block_size = 2", "'block_size' is called 'seq_len' here"),
    ("max_iters = 2", "'max_iters' is called 'max_steps' here"),
    ("out_dir = 'x'", "'out_dir' is called 'run' here"),
    ("n_layer = '2'", "n_layer wants a whole number, got '2'"),
    ("n_layer = 2.0", "n_layer wants a whole number, got 2.0"),
    ("n_layer = True", "n_layer wants a whole number, got True"),
    ("n_layer = None", "n_layer wants a whole number, got None"),
    ("compile = 1", "compile wants true or false or none, got 1"),
    ("compile = 'no'", "compile wants true or false or none, got 'no'"),
    ("lr = '1e-3'", "lr wants a number, got '1e-3'"),
    ("lr = -1", "lr wants more than 0, got -1"),
    ("tokenizer = 3", "tokenizer wants text, got 3"),
    ("dtype = 'fp16'", "dtype wants one of auto | float32 | bfloat16, got 'fp16'"),
    ("sources = 'a'", "sources wants a list of dict(...), got 'a'"),
    ("sources = ['a']", "sources wants a list of dict(...), got ['a']"),
])
def test_a_wrong_line_is_refused_with_its_place(file, line, said):
    path = file(f"\n\n{line}\n")
    assert refused(path) == [f"{path}:{END + 3}: {said}"]


def test_nanogpt_names_lead_to_keys_that_exist():
    keys = {f.name for c in SECTIONS.values() for f in dataclasses.fields(c)}
    assert set(nano360.config.NANOGPT_NAMES.values()) <= keys
    assert not set(nano360.config.NANOGPT_NAMES) & keys


def test_a_wrong_key_that_a_run_inherits_is_refused(file):
    """Its line stands in another file: the one that was named is better than none."""
    file("n_layr = 2\n", name="base_of_mine.py")
    sys.path.insert(0, os.getcwd())
    try:
        said = refused(file("from base_of_mine import *\n", base=""))
    finally:
        sys.path.remove(os.getcwd())
        sys.modules.pop("base_of_mine", None)
    assert said == ["mine.py: unknown key 'n_layr'; did you mean 'n_layer'? (--help lists all)"]


@pytest.mark.parametrize("source, said", [
    ("dict(path='x')", "missing key 'name'"),
    ("dict(name='a', path='x', wieght=1)", "unknown key 'wieght'; did you mean 'weight'?"),
    ("dict(name='a', path='x', weight=-1)", "weight wants more than 0, got -1"),
    ("dict(name='../a', path='x')", "name wants text like [A-Za-z0-9][A-Za-z0-9._-]*, got '../a'"),
])
def test_a_wrong_source_is_refused(file, source, said):
    assert any(said in line for line in refused(file(f"sources = [{source}]\n")))


def test_a_wrong_source_has_a_place_and_hides_nothing(file):
    path = file("sources = [dict(name='a', path='b', wieght=1), dict(name='b', pth='b')]\n"
                "lr = -1\n")
    said = "\n".join(refused(path))
    assert f"{path}:{END + 1}" in said
    assert all(part in said for part in ("wieght", "pth", "lr wants more than 0"))


@pytest.mark.parametrize("name", [f.name for c in SECTIONS.values() for f in dataclasses.fields(c)
                                  if f.default is dataclasses.MISSING
                                  and f.name not in ("dataset", "run")])  # the file's own name
def test_a_missing_key_is_named_with_its_meaning(file, name):
    lines = [line for line in SMALLEST.splitlines() if not line.startswith(f"{name} =")]
    field = next(f for c in SECTIONS.values() for f in dataclasses.fields(c) if f.name == name)
    kind = "a number" if name == "lr" else "a whole number"
    said = refused(file(base="\n".join(lines)))
    assert said == [f"missing key {name!r} ({kind}): {field.metadata['meaning']}"]


def test_all_that_is_wrong_is_told_at_once(file):
    path = file("n_head = 0\nseq_len = 'x'\nmax_iters = 3\nn_layr = 2\n",
                base=SMALLEST.replace("n_chunks = 2\n", ""))
    said = refused(path, "--batch_size=abc", "--qqq=1")
    for part in (f"{path}:{END}: n_head wants", f"{path}:{END + 1}: seq_len wants", "'max_steps'",
                 f"{path}:{END + 3}: unknown key 'n_layr'", "--batch_size wants", "--qqq: unknown",
                 "missing key 'n_chunks'"):
        assert sum(part in line for line in said) == 1, part
    assert len(said) == 7


@pytest.mark.parametrize("added, said", [
    ("n_embd = 100\nn_head = 6\n",
     "n_embd = 100 is not divisible by n_head = 6; nearest: 96 or 108"),
    ("n_embd = 2\nn_head = 6\n", "n_embd = 2 is not divisible by n_head = 6; nearest: 12"),
    ("n_embd = 6\nn_head = 2\n", "n_embd / n_head = 3 is odd: RoPE turns pairs"),
    ("n_embd = 16\nn_head = 4\nn_kv_head = 3\n",
     "n_head = 4 is not divisible by n_kv_head = 3"),
    ("min_lr = 0.1\n", "min_lr = 0.1 is above lr = 0.001"),
    ("decay_steps = 5\nwarmup_steps = 6\n", "decay_steps = 5 ends before warmup_steps = 6"),
    ("sources = [dict(name='a', path='x'), dict(name='a', path='y')]\n",
     "two sources have one name: a, a"),
])
def test_keys_that_do_not_fit_each_other(file, added, said):
    assert refused(file(added)) == [said]


def test_keys_that_do_not_fit_are_told_at_once(file):
    said = refused(file("n_embd = 9\nn_kv_head = 3\nmin_lr = 1\ndecay_steps = 1\n"
                        "warmup_steps = 2\n"))
    assert len(said) == 4


@pytest.mark.parametrize("n_embd, n_head", [(100, 6), (9, 2), (1, 4), (4097, 32), (5, 3)])
def test_the_nearest_widths_are_accepted(file, n_embd, n_head):
    said, = refused(file(f"n_embd = {n_embd}\nn_head = {n_head}\n"))
    near = [int(word) for word in said.partition("nearest: ")[2].split(" or ")]
    assert 1 <= len(near) <= 2
    for width in near:
        assert load([file(f"n_embd = {width}\nn_head = {n_head}\n")])[0].model.n_embd == width
    step = 2 * n_head  # between them lies no other that fits
    assert all(abs(width - n_embd) < step or width == step for width in near)


# ---- files and command lines ---------------------------------------------------------------------

def test_a_run_file_that_is_not_there(file):
    have = ", ".join(path.name for path in RUN_FILES)
    assert refused("nowhere.py") == [f"config nowhere.py not found; configs/ has {have}"]
    file(name="mine.txt")
    for path in ("mine.txt", "."):
        assert refused(path) == [f"config {path} is not a run file, flat key = value in .py; "
                                 f"configs/ has {have}"]
    assert "demo.py" in have and "amber_7b.py" in have


def test_no_run_file_and_two(file):
    expected = "expected a run file such as configs/demo.py"
    assert refused("--lr=1") == [f"{expected} (see --help)"]
    assert refused(file(), "extra") == [f"{expected}, got 'mine.py extra': write --key=value "
                                        "(see --help)"]


@pytest.mark.parametrize("added, line, said", [
    ("\nn_layer = \n", END + 2, "SyntaxError"),
    ("\n1 / 0\n", END + 2, "ZeroDivisionError"),
    ("\nlr = lrr\n", END + 2, "name 'lrr' is not defined"),
    ("def f():\n    raise OSError('deep')\nf()\n", END + 2, "OSError: deep"),
    ("import no_such_module_here\n", END + 1, "no_such_module_here"),
])
def test_a_run_file_that_fails_is_named_with_its_line(file, added, line, said):
    one, = refused(file(added))
    assert one.startswith(f"mine.py:{line}: ") and said in one
    assert one.endswith("a run file holds only key = value lines")


def test_a_run_file_that_exits_is_named_with_its_line(file):
    one, = refused(file("raise SystemExit(0)\n"))
    assert one.startswith(f"mine.py:{END + 1}: ")


def test_a_run_file_that_is_not_text(file):
    Path("binary.py").write_bytes(bytes(range(256)))
    one, = refused("binary.py")
    assert one.startswith("binary.py:1: ") and "utf-8" in one
    Path("nul.py").write_bytes(b"n_layer = 1\0\n")
    one, = refused("nul.py")
    assert one.startswith("nul.py:1: ") and "null" in one


def test_an_overridden_key_is_told_once_and_the_line_wins(file, capsys):
    config = load([file("lr = 0.5\n"), "--lr=0.25", "--max_steps=3"])[0]
    assert config.optim.lr == 0.25
    out = capsys.readouterr().out
    assert out == f"overridden on the command line: lr = 0.25 (mine.py:{END + 1}: 0.5)\n"


def test_a_key_twice_on_the_line(file, capsys):
    config = load([file(), "--max_steps=3", "--max-steps=4"])[0]
    assert config.optim.max_steps == 4
    assert capsys.readouterr().out == "--max_steps is given twice: the last one, '4', holds\n"


def test_only_rank_0_prints(file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load([file(), "--lr=0.25"])
    assert capsys.readouterr().out == ""


def test_options_of_a_stage(file):
    assert load([file(), "--verify"], Options)[1] == Options(verify=True)
    assert load([file(), "--verify=FALSE", "--text=x"], Options)[1] == Options(text="x")
    assert refused(file(), "--verify") == ["--verify: unknown key 'verify'; not a key "
                                           "(--help lists all)"]


def test_load_options():
    """For stages that take a checkpoint instead of a run file."""
    word, options = nano360.config.load_options(["out/x", "--text=a b"], Options, "a checkpoint")
    assert (word, options) == ("out/x", Options(text="a b"))
    for argv, got in (([], "nothing"), (["a", "b"], "a b")):
        with pytest.raises(Stop) as stop:
            nano360.config.load_options(argv, Options, "a checkpoint")
        assert str(stop.value) == (f"expected a checkpoint, got {got!r} (--help lists all "
                                   "options)")
        assert stop.value.code == nano360.config.USAGE


# ---- the schema ----------------------------------------------------------------------------------

@pytest.mark.parametrize("c", CLASSES, ids=lambda c: c.__name__)
def test_every_attribute_of_a_section_is_a_field(c):
    """An attribute without annotation is silently no field (lingua had one, style.md A.9)."""
    names = {f.name for f in dataclasses.fields(c)}
    public = {name for name in vars(c) if not name.startswith("_")}
    assert public <= names and names == set(typing.get_type_hints(c))


def test_keys_are_unique_and_have_meanings_and_good_defaults():
    fields = [(c, f) for c in SECTIONS.values() for f in dataclasses.fields(c)]
    names = [f.name for _, f in fields]
    assert len(set(names)) == len(names)
    source = nano360.config.Source
    for c, f in fields + [(source, f) for f in dataclasses.fields(source)]:
        assert f.metadata["meaning"].strip(), f.name
        if f.default is not dataclasses.MISSING:
            hint = typing.get_type_hints(c)[f.name]
            value, complaint = nano360.config.check_value(f.default, hint, f)
            assert (repr(value), complaint) == (repr(f.default), ""), f.name


def test_sections_are_frozen(file):
    config = load([file()])[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.n_layer = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = None


def test_which_keys_are_free_on_resume():
    free = {f.name for c in SECTIONS.values() for f in dataclasses.fields(c) if f.metadata["free"]}
    assert {"device", "dtype", "compile", "micro_batch_size", "max_steps", "log_every"} <= free
    assert not free & {"seed", "lr", "batch_size", "n_chunks", "n_layer", "dataset"}


def test_help_names_every_key_with_its_meaning(capsys):
    def never(argv):
        raise AssertionError("--help ran the stage")
    for flag in ("--help", "-h"):
        classes = [Options, *SECTIONS.values()]
        assert nano360.config.run(never, "What it does.", classes, ["x.py", flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "What it does."
        for c in classes:
            for f in dataclasses.fields(c):
                line, = (line for line in lines if line.split()[:1] == [f"--{f.name}"])
                default = ("(file)" if f.name in ("dataset", "run") else
                           "required" if f.default is dataclasses.MISSING else
                           str(f.default).lower() or "''")
                assert line.split()[1] == default
                assert f.metadata["meaning"] in line and f.metadata["unit"] in line
                assert ("free on resume" in line) == f.metadata["free"]


@pytest.mark.parametrize("change, said", [
    (dict(optim=dict(lrr=3)), "run.json: unknown key 'lrr'"),
    (dict(optim=dict(lr="3")), "run.json: lr wants a number, got '3'"),
    (dict(model=dict(n_layer=None)), "run.json: n_layer wants a whole number, got None"),
])
def test_json_of_another_schema_is_refused(file, change, said):
    sections = to_json(load([file()])[0])
    for section, values in change.items():
        sections[section] = sections[section] | values
    with pytest.raises(Stop) as stop:
        from_json(sections)
    assert said in str(stop.value)


def test_json_without_a_key_is_refused(file):
    sections = to_json(load([file()])[0])
    del sections["model"]["n_layer"]
    with pytest.raises(Stop, match="missing key 'n_layer'"):
        from_json(sections)
    assert set(sections) == {f.name for f in dataclasses.fields(Config)}


# ---- sealed json ---------------------------------------------------------------------------------

def test_sealed_json_comes_back(tmp_path):
    path, content = tmp_path / "a.json", {"a": [1, 2.5, None, True, "é\n"], "b": {}}
    write_sealed(path, {"old": 1})
    write_sealed(path, content)
    assert read_sealed(path, nano360.config.DATA) == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.sha256"]
    seal = (tmp_path / "a.json.sha256").read_text()
    assert seal == f"{sha256_file(path)}  a.json\n"
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "a.json.sha256"], cwd=tmp_path,
                              capture_output=True)
        assert done.returncode == 0


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_sealed_json_survives_a_kill_while_it_is_written_anew(done, tmp_path, monkeypatch):
    """After any of its writes there is the old content or the new one, and its seal fits."""
    path, write, writes = tmp_path / "manifest.json", nano360.files.write_atomic, []
    write_sealed(path, {"n": 1})

    def killed(name, text):
        if len(writes) == done:
            raise KeyboardInterrupt
        writes.append(name)
        write(name, text)
    monkeypatch.setattr(nano360.files, "write_atomic", killed)
    if done < 3:
        with pytest.raises(KeyboardInterrupt):
            write_sealed(path, {"n": 2})
    else:
        write_sealed(path, {"n": 2})
        assert len(path.with_name("manifest.json.sha256").read_text().splitlines()) == 1
    assert read_sealed(path, nano360.config.DATA) == {"n": 1 if done < 2 else 2}


@pytest.mark.parametrize("code", [nano360.config.DATA, nano360.config.CHECKPOINT])
def test_sealed_json_that_was_tampered_with(tmp_path, code):
    path, seal = tmp_path / "a.json", tmp_path / "a.json.sha256"
    write_sealed(path, {"lr": 0.001, "n": [1, 2, 3]})
    good, good_seal = path.read_bytes(), seal.read_bytes()

    def complaint() -> str:
        with pytest.raises(Stop) as stop:
            read_sealed(path, code)
        assert stop.value.code == code
        return str(stop.value)

    for i in range(len(good)):  # one bit, anywhere
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
        said = complaint()
        assert str(path) in said and "changed" in said and sha256_file(path) in said
    for text in (good[:-1], good + b"\n", b""):
        path.write_bytes(text)
        assert "changed" in complaint()
    path.write_bytes(good)
    for text in (b"", b"0" * 64, good_seal[1:], b"\xff\xfe"):
        seal.write_bytes(text)
        assert "a.json.sha256" in complaint()
    seal.unlink()
    assert "a.json.sha256 is missing" in complaint()
    seal.write_bytes(good_seal)
    path.unlink()
    assert f"{path} is missing" in complaint()
    path.write_bytes(good)
    assert read_sealed(path, code)["n"] == [1, 2, 3]


# ---- how a stage ends ----------------------------------------------------------------------------

def ends(error: BaseException | None, argv: tuple[str, ...] = ()) -> int:
    """The exit code of a stage that raises `error`."""
    def main(argv):
        if error is not None:
            raise error
    return nano360.config.run(main, "", [], list(argv))


@pytest.mark.parametrize("error, code, said", [
    (None, 0, ""),
    (Stop(nano360.config.USAGE, "one\ntwo"), 2, "error: one\nerror: two\n"),
    (Stop(nano360.config.DATA, "x"), 3, "error: x\n"),
    (Stop(nano360.config.CHECKPOINT, "x"), 4, "error: x\n"),
    (Stop(nano360.config.NUMERICAL, "x"), 5, "error: x\n"),
    (Stop(nano360.config.ENVIRONMENT, "x"), 6, "error: x\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (Stop(143, "x"), 143, "x\n"),
    (OSError(28, "No space left on device", "data/x"), 4,
     "error: data/x: No space left on device\n"),
    (OSError("odd"), 4, "error: storage: odd\n"),
])
def test_exit_codes(error, code, said, capsys):
    assert ends(error) == code
    assert capsys.readouterr() == ("", said)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def test_debug_adds_the_traceback_and_reaches_no_stage(capsys):
    seen = []
    assert nano360.config.run(seen.append, "", [], ["a.py", "--debug", "--x=1"]) == 0
    assert seen == [["a.py", "--x=1"]]
    assert ends(Stop(3, "what"), ("--debug",)) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: what\n") and "Traceback" in err and "raise error" in err


def test_ranks_sign_their_errors(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ends(Stop(5, "nan\nagain")) == 5
    assert capsys.readouterr().err == "[rank 3] error: nan\n[rank 3] error: again\n"


def test_a_reader_that_had_enough_is_no_error():
    """python sample.py ... | head -1"""
    code = ("import nano360.config, sys\n"
            "def main(argv):\n"
            "    for _ in range(100_000): print('x' * 100)\n"
            "sys.exit(nano360.config.run(main, '', [], []))")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert (child.wait(timeout=30), err) == (0, b"")
