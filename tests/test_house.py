"""The house: what may import what, how much a reader meets, and what no file may hold."""

import ast
import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import measure
from conftest import REPO
from measure import STAGES, WINGS, rooms, size_of, traced, wing_of
from small import words

# No wing is imported but in the branch that asks for it. analyze.py is the one door to analysis.
DOORS = {"analyze": {"analysis"}}
# Ceilings: figures that are reached, and that only get smaller. The last column of nodes is that of
# the function that has most; train.py's loop has a ceiling of its own.
NODES, GOLF, VAGUE = 92_400, 421, 868  # of the whole house
CODE = {"stage": 465, "other": 411}  # lines of code of one file
PARAMETERS, FUNCTION, LOOP = 12, 850, 1_629
TRACES = {  # files and functions called; modules loaded, and their nodes
    "prepare": dict(files=9, functions=102, modules=10, nodes=23_600),
    "train": dict(files=10, functions=153, modules=11, nodes=29_750, step_files=5,
                  step_functions=35),
    "evaluate": dict(files=9, functions=78, modules=13, nodes=34_400),
    "sample": dict(files=6, functions=58, modules=7, nodes=15_150),
}
TINY = ["--vocab_size=300", "--seq_len=32", "--n_chunks=2", "--valid_rows=8"]
PREPARED = {"dataset": "own", "input": "own.txt", "workers": 1, "rows_per_chunk": "none"}
MODEL = dict(n_layer=1, n_head=1, n_embd=32, n_inner=64, dtype="float32", device="cpu")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def imports(body: list[ast.stmt] | ast.AST) -> set[str]:
    """The modules of this repository that statements import, or that a whole tree does."""
    every = ast.walk(body) if isinstance(body, ast.AST) else body
    names = itertools.chain.from_iterable(
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for node in every if isinstance(node, ast.Import | ast.ImportFrom))
    return {name for name in names if name.split(".")[0] in {*STAGES, "nano360", "configs"}}


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in rooms()}


def wing(module: str) -> str:
    return parts[1] if len(parts := module.split(".")) > 2 else ""


# ---- what may import what ------------------------------------------------------------------------

@pytest.mark.parametrize("name", trees())
def test_imports_go_one_way(name):
    """Stages stand on nano360/. They import no other stage but model.py, which nano360/ stands on
    too; analysis imports train.py, to train a visit again."""
    everywhere, top = imports(trees()[name]), imports(trees()[name].body)
    stages = {"model"} | ({"train"} if name == "analyze" or wing(name) == "analysis" else set())
    assert everywhere & {*STAGES} <= stages
    assert not any(module.startswith("configs") for module in everywhere)
    wings = {wing(module) for module in top} - {"", wing(name)}
    assert wings <= DOORS.get(name, set()), f"{name} imports {wings} at its top"


def test_imports_make_no_circle():
    tops = {name: imports(tree.body) for name, tree in trees().items()}
    while free := [name for name, needs in tops.items() if not needs & tops.keys()]:
        for name in free:
            del tops[name]
    assert not tops


def test_configuration_and_files_need_no_package():
    for name in ("config", "files"):
        tree = ast.parse((REPO / f"nano360/{name}.py").read_text(encoding="utf-8"))
        named = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
                 .split(".")[0] for node in ast.walk(tree)
                 if isinstance(node, ast.Import | ast.ImportFrom)}
        assert named <= {*sys.stdlib_module_names, "nano360"}


def test_configs_holds_run_files_alone():
    for path in REPO.glob("configs/*"):
        if path.name == "__init__.py":  # so that no package of this name elsewhere is meant
            assert not path.stat().st_size
        elif path.name != "__pycache__":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert {type(node) for node in tree.body} <= {ast.Expr, ast.Assign, ast.ImportFrom}


# ---- how much a reader meets ---------------------------------------------------------------------

@pytest.mark.parametrize("path", rooms(), ids=name_of)
def test_a_room(path):
    """The file fits one sitting, its functions fit the head."""
    size, text = size_of(path), path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert size.code <= CODE["stage" if path.parent == REPO else "other"]
    assert max(map(len, text.splitlines())) <= 100
    assert ast.get_docstring(tree), "no docstring"
    for function in size.functions:
        assert function.parameters <= PARAMETERS, function
        loop = (path.name, function.name) == ("train.py", "train")
        assert function.nodes <= (LOOP if loop else FUNCTION), function
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert not node.args.kwarg, f"{node.name} passes **{node.args.kwarg} on"
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in named if not a.annotation and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare} without a type"


def test_the_whole_house():
    sizes = [size_of(path) for path in rooms()]
    assert sum(size.nodes for size in sizes) <= NODES
    assert sum(size.golf for size in sizes) <= GOLF
    assert sum(size.vague for size in sizes) <= VAGUE


@pytest.mark.parametrize("text, counted", [
    ("x = 1", 5), ("x: int = 1", 5), ('"""A text."""\nx = 1', 5),
    ("def f(a: int) -> int:\n    'what'\n    return a", 7), ("class A:\n    'what'\n    c = 1", 6)])
def test_nodes(text, counted):
    """By hand: module, assignment, name, that it is stored, constant; and so on."""
    assert measure.nodes(ast.parse(text)) == counted


@pytest.mark.parametrize("text, golf", [
    ("a, b = 1, 2", 1), ("a, b = c", 0), ("if (n := f()): pass", 1), ("x = [1] * (a > b)", 1),
    ("x = 'a' * (not b)", 1), ("x = f'{a}' * (a and b)", 1), ("x = [1] * 3", 0),
    ("x = [a for a in b], {c for c in d}", 1), ("x = [a for a in [c for c in d]]", 1),
    ("for a in [b for b in c]:\n    x = [d for d in e]", 0)])
def test_golf(text, golf):
    assert sum(map(measure.is_golf, ast.walk(ast.parse(text)))) == golf


def test_sizes_are_those_of_another_program():
    """Lines, code, nodes, golf, vague names, parameters and the biggest function of each file."""
    path = REPO.parent / "shared" / "tools" / "house.py"
    if not path.is_file():
        pytest.skip("no ../shared/tools/house.py beside the repository")
    spec = importlib.util.spec_from_file_location("house", path)
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    for room in rooms() + sorted(REPO.glob("tests/**/*.py")):
        theirs, ours = house.measure(room), size_of(room)
        assert (ours.lines, ours.code, ours.nodes, ours.golf, ours.vague) == (
            theirs["lines"], theirs["code"], theirs["nodes"], sum(theirs["golf"].values()),
            theirs["words"]), room
        assert max([f.parameters for f in ours.functions], default=0) == theirs["params"][1]
        assert max([f.nodes for f in ours.functions], default=0) == theirs["biggest"][1]


# ---- what a command runs -------------------------------------------------------------------------

def flags(**keys: object) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, dict]:
    """What each stage calls and loads, on a set and a run that are made here."""
    folder, config = tmp_path_factory.mktemp("traced"), str(REPO / "configs/demo.py")
    (folder / "own.txt").write_text(words(20_000, 1))
    checkpoint = "out/own/last"
    return {
        "prepare": traced(folder, "-", "prepare.py", config, *TINY, *flags(**PREPARED)),
        "train": traced(folder, "lr_at", "train.py", config, *TINY, "--dataset=own", "--run=own",
                        "--max_steps=4", "--warmup_steps=2", *flags(**MODEL)),
        "evaluate": traced(folder, "-", "evaluate.py", checkpoint, "--tasks=valid"),
        "sample": traced(folder, "-", "sample.py", checkpoint, "--max_new_tokens=5")}


@pytest.mark.parametrize("stage", TRACES)
def test_what_a_reader_has_to_open(traces, stage):
    over = {what: (traces[stage][what], ceiling) for what, ceiling in TRACES[stage].items()
            if traces[stage][what] > ceiling}
    assert not over, f"{stage}: {over}"
    assert traces[stage]["functions"] > 20  # so it was seen at all


def test_what_is_not_opened(traces):
    """No wing, so no network either, where nobody asked; no text where ids are enough; and no plan
    where a run is a run."""
    for stage, trace in traces.items():
        assert f"{stage}.py" in trace["names"]
        assert not [name for name in trace["names"] if name.count("/") > 1], stage
    for stage in ("train", "sample", "evaluate"):
        assert not {"nano360/sources.py", "nano360/tokens.py"} & {*traces[stage]["names"]}
    assert not {"nano360/tokenizers.py", "nano360/tokenizer_json.py"} & {*traces["train"]["names"]}


# ---- what no file may hold -----------------------------------------------------------------------

def test_nothing_that_was_promised_not_to_be():
    """No pickle, no swallowed error, no promise unkept, no path of one machine."""
    listed = subprocess.run(["git", "-C", str(REPO), "ls-files", "-co", "--exclude-standard"],
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    bad = [r"import pickle", r"weights_only=False", r"allow_pickle=True", r"NotImplementedError",
           r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"except( Exception)?:\s*pass", r"/(root|home)/\w"]
    for name in listed.stdout.split():
        path = REPO / name
        if path.suffix in (".py", ".md", ".toml", "") and path.is_file() and path.name != "LICENSE":
            if path.name == "test_house.py":
                continue
            text = path.read_text(encoding="utf-8")
            found = [pattern for pattern in bad if re.search(pattern, text)]
            assert not found, f"{name}: {found}"


def test_readme_names_every_room():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for path in [*rooms(), *REPO.glob("configs/[!_]*.py")]:
        assert path.name in text, f"README.md does not name {path.name}"
    for folder in WINGS:
        assert f"{folder}/" in text
    for word in ("make demo", "make test", "torchrun"):
        assert word in text


def test_every_wing_is_known():
    assert {wing_of(path) for path in rooms()} == {"", *WINGS}
