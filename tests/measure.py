"""How much a reader meets: the size of every file, and what a command runs of it.

    python tests/measure.py                                   # each file, and the sums
    python tests/measure.py trace lr_at train.py CONFIG ...   # what a stage calls and loads

Sizes are AST nodes, so that no typing makes a file smaller: annotations and docstrings, which are
there for the reader, are not counted. `trace` runs a stage in this process and prints json: files
and functions of ours that it calls, modules of ours that it loads and their nodes, and of these
calls those between the second and the third call of a function that is named ("-": none).
tests/test_house.py holds the figures to their ceilings.
"""

import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

REPO = Path(__file__).resolve().parent.parent
STAGES = ("prepare", "model", "train", "sample", "evaluate", "analyze")
WINGS = ("hub", "scale", "analysis")
VAGUE = {"one", "found", "mine", "at"}  # names that do not say what a thing is
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def rooms() -> list[Path]:
    """The files of the house: stages, and what they stand on; neither run files nor tests."""
    return [path for path in sorted([*REPO.glob("*.py"), *REPO.glob("nano360/**/*.py")])
            if path.stat().st_size]


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes right below a node, but for annotations and docstrings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            text = child.value if isinstance(child, ast.Expr) else None
            is_doc = isinstance(text, ast.Constant) and isinstance(text.value, str)
            if isinstance(child, ast.AST) and not (field == "body" and is_doc):
                yield child


def nodes(tree: ast.AST) -> int:
    return 1 + sum(map(nodes, children(tree)))


def is_condition(node: ast.AST) -> bool:
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negated or isinstance(node, (ast.Compare, ast.BoolOp))


def is_golf(node: ast.AST) -> int:
    """How many of four ways to say two things at once a node is: a tuple assigned to a tuple, a
    walrus, a list or text times a condition, two comprehensions in a statement."""
    if isinstance(node, ast.NamedExpr):
        return 1
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        packed = text or isinstance(node.left, (ast.List, ast.JoinedStr))
        return int(packed and is_condition(node.right))
    if not isinstance(node, ast.stmt):
        return 0
    pairs = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(
        node.value, ast.Tuple)
    several = not hasattr(node, "body") and 1 < sum(
        isinstance(part, COMPREHENSIONS) for part in ast.walk(node))
    return pairs + several


@dataclass(frozen=True)
class Function:
    name: str
    parameters: int
    nodes: int


@dataclass(frozen=True)
class Size:
    """Of one file."""
    lines: int
    code: int  # lines that are neither blank nor comment nor docstring
    nodes: int
    golf: int
    vague: int
    functions: list[Function]


def size_of(path: Path) -> Size:
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs, functions = set(), []
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            docs |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
        if isinstance(node, documented[2:]):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [arg for arg in named if arg.arg not in ("self", "cls")]
            functions.append(Function(node.name, len(own), nodes(node)))
    code = sum(n not in docs and not re.match(r"\s*(#|$)", line)
               for n, line in enumerate(lines, 1))
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return Size(len(lines), code, nodes(tree), sum(map(is_golf, ast.walk(tree))),
                sum(name in VAGUE for name in names), functions)


def wing_of(path: Path) -> str:
    """The wing that a file lies in; "" for a stage, and for what several of them stand on."""
    folder = path.relative_to(REPO).parent.name
    return folder if folder in WINGS else ""


# ---- what a command runs -------------------------------------------------------------------------

def ours(name: str) -> bool:
    path = Path(name)
    return path.is_relative_to(REPO) and path.relative_to(REPO).parts[0] not in (".venv", "tests")


def trace(window: str, stage: str, argv: list[str]) -> dict:
    """Run a stage in this process, and in the folder it is started in."""
    called: set[tuple[str, str, int]] = set()  # (file, function, line)
    inside: set[tuple[str, str, int]] = set()
    opened = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal opened
        code = frame.f_code
        if event != "call" or not ours(code.co_filename):
            return
        opened += code.co_name == window
        # neither lambdas and comprehensions, nor modules and bodies of classes
        if not code.co_name.startswith("<") and code.co_flags & inspect.CO_OPTIMIZED:
            key = (code.co_filename, code.co_name, code.co_firstlineno)
            called.add(key)
            if opened == 2:
                inside.add(key)
    sys.path[0] = str(REPO)
    sys.argv = [stage, *argv]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        runpy.run_path(str(REPO / stage), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{stage} ended with {end.code}"
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    names = [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
    loaded = {Path(name) for name in names if ours(name)} | {REPO / stage}
    found = {"files": len({name for name, *_ in called}), "functions": len(called),
             "modules": len(loaded), "names": sorted(
                 path.relative_to(REPO).as_posix() for path in loaded), "nodes": sum(
                 nodes(ast.parse(path.read_text(encoding="utf-8"))) for path in loaded
                 if path.stat().st_size)}
    if opened:
        found |= {"step_files": len({name for name, *_ in inside}), "step_functions": len(inside)}
    return found


def traced(folder: Path, window: str, stage: str, *argv: str) -> dict:
    """trace() in a process and folder of its own."""
    done = subprocess.run([sys.executable, __file__, "trace", window, stage, *argv], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- what is printed -----------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    if argv[:1] == ["trace"]:
        print(json.dumps(trace(argv[1], argv[2], argv[3:])))
        return
    print(f"{'file':<34}{'lines':>6}{'code':>6}{'nodes':>7}{'golf':>6}{'vague':>6}"
          "  most parameters; biggest function (nodes)")
    sizes = {path: size_of(path) for path in rooms()}
    for path, size in sizes.items():
        widest = max(size.functions, key=lambda f: f.parameters, default=Function("-", 0, 0))
        biggest = max(size.functions, key=lambda f: f.nodes, default=Function("-", 0, 0))
        print(f"{path.relative_to(REPO).as_posix():<34}{size.lines:>6}{size.code:>6}"
              f"{size.nodes:>7}{size.golf:>6}{size.vague:>6}"
              f"  {widest.name} {widest.parameters}; {biggest.name} {biggest.nodes}")
    for what, some in (("all", sizes.values()),
                       ("without wings", [sizes[path] for path in sizes if not wing_of(path)])):
        print(f"{what:<34}{sum(s.lines for s in some):>6}{sum(s.code for s in some):>6}"
              f"{sum(s.nodes for s in some):>7}{sum(s.golf for s in some):>6}"
              f"{sum(s.vague for s in some):>6}")


if __name__ == "__main__":
    main(sys.argv[1:])
