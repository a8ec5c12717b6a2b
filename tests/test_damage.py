"""What was damaged is named, left as it is, and never gone on from; a disk without room costs the
save that did not fit and nothing else.

Damage is a flipped bit in any file of a checkpoint or a data set, a byte too few or too many, a
file that is missing or another's.
"""
# ruff: noqa: F811 (fixtures of test_resume.py)

import contextlib
import ctypes
import json
import random
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prepare
import train
from model import Transformer
from nano360 import checkpoints
from nano360.config import CHECKPOINT, Stop, run
from nano360.files import locked, sha256_file, write_sealed
from soak_kill import checkpoints as checkpoint_folders, faults
from test_resume import (  # noqa: F401
    REPO, assert_same, go, inside, launch, lines, room, slow_script, small,
    started, step_of)
from test_train import hashes

OUT = Path("out/tiny")
FILES = ["config.json", "model.safetensors", "optimizer/adamw.safetensors",
         "optimizer/random.safetensors", "state.json", "state.json.sha256", "tokenizer.json",
         "tokenizer.model", "tokenizer_config.json"]
READ = [name for name in FILES if "/" not in name]  # by those who want the weights alone


def facts() -> dict:
    """What makes a checkpoint this run's."""
    return {"data_hash": prepare.read_manifest(Path("data/tiny"))["data_hash"], "seed": 1337}


@pytest.fixture(scope="session")
def halted(small) -> Path:
    """A run that was stopped after step 14: ckpt_000 to ckpt_002, and last/."""
    with inside(small):
        assert go("--run=halted", "--max_steps=14", "--epochs=1") == 0
    return small / "out/halted"


@pytest.fixture
def stopped(room, halted) -> Path:
    """The same, in a folder of its own, as out/tiny."""
    shutil.copytree(halted, OUT)
    record = OUT / "run.json"
    record.write_text(record.read_text().replace('"run": "halted"', '"run": "tiny"'))
    return OUT


@pytest.fixture(scope="session")
def whole(small) -> Path:
    """The run that nothing stopped."""
    with inside(small):
        assert go("--run=whole", "--epochs=1") == 0
    return small / "out/whole"


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut(path: Path, _: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path, _: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


DAMAGES = [flip, cut, lengthen, remove]


@contextlib.contextmanager
def damaged(paths: list[Path], damage, dice: random.Random):
    """Files are other than they were, and then as before."""
    kept = {path: path.read_bytes() for path in paths}
    try:
        for path in paths:
            damage(path, dice)
        yield
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def named(path: Path, said: str) -> bool:
    """Whether a file was named. Of a file and its seal both are: either may be the wrong one."""
    return str(path) in said or str(path.parent) in said and path.name in said


# ---- checkpoints ---------------------------------------------------------------------------------

def test_a_hundred_flipped_bits(stopped, capsys):
    """In the newest checkpoint, or in the two newest: the file is named, the one before is taken,
    and said so; nothing is removed or changed."""
    assert sorted(hashes(stopped / "last")) == FILES
    dice, before = random.Random(0), ["last", "ckpt_002", "ckpt_001"]
    for trial in range(100):
        n = 1 + trial % 2
        paths = [stopped / name / FILES[(trial + i) % len(FILES)]
                 for i, name in enumerate(before[:n])]
        with damaged(paths, flip, dice):
            files = hashes(stopped)
            folder, state = checkpoints.newest(OUT, facts())
            assert hashes(stopped) == files
        assert folder == OUT / before[n] and state["step"] == (12, 8)[n - 1]
        said = capsys.readouterr().out
        assert all(named(path, said) for path in paths), (paths, said)
        assert said.splitlines()[-1] == (f"the newest checkpoint that is whole is {folder}, step "
                                         f"{state['step']}; nothing was removed")


@pytest.mark.parametrize("damage", DAMAGES[1:])
def test_other_damage(stopped, capsys, damage):
    """A byte too few, a zero byte too many, a missing file: the same for every file."""
    for name in FILES:
        path = stopped / "last" / name
        with damaged([path], damage, random.Random(0)):
            files = hashes(stopped)
            folder, _ = checkpoints.newest(OUT, facts())
            assert hashes(stopped) == files
        assert folder == OUT / "ckpt_002" and named(path, capsys.readouterr().out)


@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_one_before(stopped, whole, capsys, name):
    """And ends with the undisturbed bits: what was damaged is trained again, nothing else."""
    flip(stopped / "last" / name, random.Random(1))
    flip(stopped / "ckpt_002" / name, random.Random(2))
    assert go("--epochs=1") == 0
    said = capsys.readouterr().out
    assert "going on from out/tiny/ckpt_001, step 8" in said
    assert all(f"out/tiny/{one}/" in said for one in ("last", "ckpt_002"))
    assert_same(stopped, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_readers_refuse(stopped, damage):
    """Whoever wants the weights is told which file of the folder is not what was written."""
    dice = random.Random(3)
    for name in READ:
        path = stopped / "ckpt_001" / name
        with damaged([path], damage, dice), pytest.raises(Stop) as stop:
            Transformer.from_pretrained(path.parent)
        assert stop.value.code == CHECKPOINT and named(path, str(stop.value))
    Transformer.from_pretrained(stopped / "ckpt_001")


def test_only_damaged_ones(stopped, capsys):
    """Exit code 4, every name, and nothing is changed: neither begun anew nor removed."""
    for name in ("last", "ckpt_000", "ckpt_001", "ckpt_002"):
        flip(stopped / name / "model.safetensors", random.Random(4))
    files = hashes(stopped)
    assert go("--epochs=1") == 4
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    for name in ("last", "ckpt_000", "ckpt_001", "ckpt_002"):
        assert f"out/tiny/{name}/model.safetensors" in err
    assert hashes(stopped) == files


@pytest.mark.parametrize("name", ["", "model.safetensors", "optimizer/adamw.safetensors"])
def test_two_that_were_swapped(stopped, whole, capsys, name):
    """The folders of two checkpoints, or the same file of two: neither is gone on from."""
    a, b = stopped / "ckpt_001" / name, stopped / "ckpt_002" / name
    a.rename("kept")
    b.rename(a)
    Path("kept").rename(b)
    shutil.rmtree(stopped / "last")
    assert go("--epochs=1") == 0
    said = capsys.readouterr().out
    assert "going on from out/tiny/ckpt_000, step 4" in said
    assert "ckpt_001" in said and "ckpt_002" in said
    assert_same(stopped, whole)


def rewrite(folder: Path, **changes) -> None:
    """Change state.json and seal it, as another version of the code would."""
    state = json.loads((folder / "state.json").read_text())
    write_sealed(folder / "state.json", state | changes)


def test_a_newer_format(stopped, capsys):
    rewrite(stopped / "ckpt_001", format=checkpoints.FORMAT + 1)
    files = hashes(stopped)
    assert go("--epochs=1") == 4
    err = capsys.readouterr().err
    assert f"format {checkpoints.FORMAT + 1}" in err and f"reads {checkpoints.FORMAT}" in err
    assert "out/tiny/ckpt_001" in err and hashes(stopped) == files


def test_weights_without_an_optimizer(stopped, whole, capsys):
    """The one before is taken; where none has its optimizer's state, they can begin another run."""
    for name in ("last", "ckpt_002", "ckpt_001"):
        shutil.rmtree(stopped / name / "optimizer")
    assert checkpoints.newest(OUT, facts())[0] == OUT / "ckpt_000"
    said = capsys.readouterr().out
    assert all(f"out/tiny/{name} has no optimizer state" in said
               for name in ("last", "ckpt_002", "ckpt_001"))
    shutil.rmtree(stopped / "ckpt_000/optimizer")
    files = hashes(stopped)
    assert go("--epochs=1") == 4
    err = capsys.readouterr().err
    assert "no optimizer state" in err and "--init_from=out/tiny/" in err
    assert hashes(stopped) == files
    assert go("--run=other", "--epochs=1", "--init_from=out/tiny/ckpt_002", "--max_steps=1") == 0


def test_rounded_weights(stopped, capsys):
    """A cast checkpoint, its hashes put right, is for readers: training does not go on from it."""
    folder = stopped / "last"
    for name, code in (("model.safetensors", 0), ("optimizer/adamw.safetensors", 0)):
        path = folder / name
        kept = path.read_bytes()
        tensors = {k: t.to(torch.bfloat16) for k, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        files = json.loads((folder / "state.json").read_text())["files"]
        rewrite(folder, files=files | {name: sha256_file(path)})
        assert faults(folder) == [] and code == 0
        assert checkpoints.newest(OUT, facts())[0] == OUT / "ckpt_002"
        said = capsys.readouterr().out
        assert str(path) in said and "BF16" in said and "float32" in said
        path.write_bytes(kept)
        rewrite(folder, files=files)
    assert checkpoints.newest(OUT, facts())[0] == OUT / "last"


# ---- data ----------------------------------------------------------------------------------------

@pytest.fixture
def own_data(room, small) -> Path:
    """A copy of the data set that may be damaged."""
    Path("data").unlink()
    shutil.copytree(small / "data", "data")
    return Path("data/tiny")


def test_a_hundred_flipped_bits_in_the_data(own_data, capsys):
    """Every file of a data set has its turn: prepare.py --verify names it and ends with 3."""
    dice, names = random.Random(0), sorted(hashes(own_data))
    assert len(names) > 12 and run(prepare.main, "", [], ["tiny.py", "--verify"]) == 0
    for trial in range(100):
        path = own_data / names[trial % len(names)]
        with damaged([path], flip, dice):
            assert run(prepare.main, "", [], ["tiny.py", "--verify"]) == 3
        err = capsys.readouterr().err
        assert path.name in err and err.count("error:") == 1, (path, err)


@pytest.mark.parametrize("damage", [flip, remove])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.sha256", "tokenizer.model",
                                  "train_000.bin", "train_002.bin", "valid_a.bin"])
def test_no_run_on_damaged_data(own_data, small, capsys, damage, name):
    """train.py names the file when it comes to it; what it had by then is the undisturbed run's."""
    with damaged([own_data / name], damage, random.Random(3)):
        assert go("--max_steps=12") == 3
        err = capsys.readouterr().err
        assert named(own_data / name, err) and err.count("error:") == 1
    assert go("--max_steps=12") == 0
    assert hashes(OUT / "ckpt_002") == hashes(small / "out/tiny/ckpt_002")


def test_other_data_than_the_run_began_with(stopped, small, capsys):
    """Both hashes are told."""
    Path("data").unlink()
    shutil.copytree(small / "data", "data")
    manifest = prepare.read_manifest(Path("data/tiny"))
    write_sealed(Path("data/tiny/manifest.json"), manifest | {"data_hash": "e" * 64})
    files = hashes(stopped)
    assert go("--epochs=1") == 3
    err = capsys.readouterr().err
    assert "e" * 64 in err and manifest["data_hash"] in err and "--run=NAME" in err
    assert hashes(stopped) == files


# ---- what a run writes down ----------------------------------------------------------------------

@pytest.mark.parametrize("rest", ['{"kind": "tr', '{"kind": "train", "step": 15, "visit": 3',
                                  "\0\0\0\0", "\udcff\udcfe"])
def test_half_a_last_line(stopped, whole, rest):
    """In metrics.jsonl and incidents.jsonl: it goes, and each step stands there once."""
    assert go("--epochs=1", "--max_steps=15") == 0  # a launch that has an incident: its restart
    for name in ("metrics.jsonl", "incidents.jsonl"):
        with open(stopped / name, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(rest)
    assert go("--epochs=1") == 0
    found = [json.loads(line) for line in (stopped / "incidents.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["step"]) for one in found] == [("restart", 14), ("restart", 15)]
    assert_same(stopped, whole)


@pytest.mark.parametrize("at_end", [True, False], ids=["finished", "inside"])
@pytest.mark.parametrize("left", [0, 1, 50, 120, 121, 122, 200, -2, -1])
def test_held_out_lines_that_were_cut(room, whole, at_end, left):
    """However many of their bytes are left, each source has its line once in the end."""
    shutil.copytree(whole, OUT)
    for name in ("run.json", "metrics.jsonl"):
        path = OUT / name
        path.write_text(path.read_text().replace('"run": "whole"', '"run": "tiny"'))
    if not at_end:
        shutil.rmtree(OUT / "ckpt_003")
    text = path.read_text()
    begin = text.index(f'{{"kind": "valid", "step": {16 if at_end else 12},')
    end = len(text) if at_end else text.index('{"kind": "train", "step": 13,')
    path.write_text(text[:begin + left if left >= 0 else end + left])
    assert go("--epochs=1") == 0
    assert_same(OUT, whole)


def test_two_runs_in_one_folder(room, capsys):
    """The second is told who is at work and since when; when the first is killed it may begin."""
    with locked(OUT):
        assert go("--max_steps=1") == 4
    err = capsys.readouterr().err
    assert re.search(r"out/tiny is in the hands of process \d+ on \S+ since .*\d\d:\d\d:\d\d", err)
    child = started([str(slow_script(room, 3, 60)), "tiny.py"], 2)
    assert go("--max_steps=3") == 4
    assert f"process {child.pid} on" in capsys.readouterr().err
    child.kill()
    child.communicate()
    assert go("--max_steps=3") == 0 and step_of(OUT / "last") == 3


# ---- the disk ------------------------------------------------------------------------------------

def no_large_files(limit: int) -> None:
    """As on a full disk: no file of this process can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_checkpoint_that_cannot_be_written(stopped, whole, server):
    """One line with the path, what it takes and what is free; what was there still loads, nothing
    unfinished stays; with room the same command ends with the undisturbed bits."""
    before = hashes(stopped)
    assert launch(server, "--epochs=1", before=partial(no_large_files, 60_000)) == [4]
    [line] = Path("err.0").read_text().splitlines()
    assert line.startswith("error: out/tiny/ckpt_003 could not be written")
    assert re.search(r"takes [\d.,]+ GB, [\d.,]+ GB are free", line)
    assert {path.name for path in stopped.iterdir()} == {
        "ckpt_000", "ckpt_001", "ckpt_002", "last", "metrics.jsonl", "incidents.jsonl", "run.json"}
    after = hashes(stopped)
    assert all(after[name] == sha for name, sha in before.items() if "/" in name)
    for folder in checkpoint_folders(stopped):
        Transformer.from_pretrained(folder)
    assert launch(server, "--epochs=1") == [0], Path("err.0").read_text()
    assert_same(stopped, whole)


NEW_NAMESPACE, NO_DISK = 0x00020000, 77


def mount(*options: str) -> None:
    """A disk of its own for out/, which this process alone sees, or another size of it."""
    kind = ["-t", "tmpfs"] * (not options[0].startswith("remount"))
    if not Path("out").is_dir():
        Path("out").mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_NAMESPACE) or subprocess.run(
                ["mount", "--make-rprivate", "/"], capture_output=True).returncode:
            sys.exit(NO_DISK)
    if subprocess.run(["mount", *kind, "-o", ",".join(options), "none", "out"],
                      capture_output=True).returncode:
        sys.exit(NO_DISK)


def on_a_small_disk(size: int, more: int) -> None:
    """Train on a disk of `size` bytes until it is full, note what is there, then with `more`."""
    mount(f"size={size}")
    Path("code").write_text(str(go("--epochs=1")))
    shutil.copytree("out", "full")
    mount(f"remount,size={more}")
    code = go("--epochs=1")
    shutil.copytree("out", "room")
    sys.exit(code)


def test_a_full_disk(room, whole, server):
    """The same on a disk that really is full, in the middle of a run that saves often."""
    code = launch(server, before=partial(on_a_small_disk, 1_200_000, 10_000_000))
    if code == [NO_DISK]:
        pytest.skip("no right to mount a small disk here")
    err = Path("err.0").read_text()
    assert Path("code").read_text() == "4", err
    [line] = err.splitlines()
    assert re.search(r"^error: out/tiny/(ckpt_00\d|last) could not be written: .*takes [\d.]+ GB, "
                     r"[\d.]+ GB are free", line), line
    full = Path("full/tiny")
    assert checkpoint_folders(full) and all(not faults(one) for one in checkpoint_folders(full))
    assert not [*full.glob("*.part"), *full.glob("*.old"), *full.glob("*.gone")]
    assert code == [0]
    assert_same(Path("room/tiny"), whole)


def test_no_room_for_two(room, monkeypatch, capsys):
    """Said before the first step; nothing is written."""
    n = sum(t.numel() for t in Transformer(train.load(["tiny.py"])[0].model).parameters())
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 12 * n - 1))
    assert go() == 4
    out = capsys.readouterr()
    assert "two must fit" in out.err and "step" not in out.out and not OUT.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 12 * n))
    assert go("--max_steps=12") == 0  # two fit, three may not
    assert "3 checkpoints take" in capsys.readouterr().out


def test_out_is_a_file(room, capsys):
    Path("out").write_text("a file")
    assert go() == 4
    out = capsys.readouterr()
    assert "out/tiny" in out.err and "step" not in out.out and out.err.count("error:") == 1


def test_a_folder_that_may_not_be_written(room, server):
    """Told before the first step."""
    code = launch(server, before=partial(mount, "ro"))
    if code == [NO_DISK]:
        pytest.skip("no right to mount a disk here")
    [line] = Path("err.0").read_text().splitlines()
    assert code == [4] and "out/tiny" in line and "Read-only file system" in line
    assert "step" not in Path("out.0").read_text()


# ---- what a checkpoint holds ---------------------------------------------------------------------

def test_two_optimizer_states_are_kept(room, small, monkeypatch):
    """The newest two, at no moment fewer; the older ones keep their weights and load."""
    discard, seen = checkpoints.discard, []

    def counted(path):
        discard(path)
        if path.name == "optimizer":
            seen.append(sorted(one.parent.name for one in OUT.glob("ckpt_*/optimizer")))
    monkeypatch.setattr(checkpoints, "discard", counted)
    assert go("--keep_optimizer=2", "--max_steps=20") == 0
    assert seen == [[f"ckpt_{v:03d}", f"ckpt_{v + 1:03d}"] for v in (1, 2, 3)]
    for v in range(5):
        folder, straight = OUT / f"ckpt_{v:03d}", hashes(small / f"out/tiny/ckpt_{v:03d}")
        kept = {k: sha for k, sha in straight.items() if v > 2 or "/" not in k}
        assert hashes(folder) == kept
        Transformer.from_pretrained(folder)
    assert go("--keep_optimizer=2", "--max_steps=22") == 0  # goes on from one of them


def test_no_checkpoint_of_what_is_no_number(room, capsys):
    """A weight that is infinite, in spite of finite losses: exit code 5, the one before stays."""
    take = checkpoints.Saver.take

    def spoiled(saver, *args):
        take(saver, *args)
        if (OUT / "ckpt_000").is_dir():
            next(iter(saver.copy["weights"].values()))[0, 0] = torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Saver, "take", spoiled)
        assert go("--save_steps=2") == 5
    err = capsys.readouterr().err
    assert "is not written" in err and "model.embed_tokens.weight" in err
    assert [one.name for one in checkpoint_folders(OUT)] == ["ckpt_000"]
    assert faults(OUT / "ckpt_000") == [] and not list(OUT.glob("*.part"))


# ---- in which order ------------------------------------------------------------------------------

def assert_synced(calls: list[tuple[str, str]], out: Path) -> None:
    """Every file of ckpt_000, its optimizer folder and itself are on the disk before it has its
    name, and the name is before anything else happens."""
    part, files = out / "ckpt_000.part", {name for name in hashes(out / "ckpt_000")}
    named = calls.index(("rename", str(part)))
    before = {path for kind, path in calls[:named] if kind == "fsync"}
    direct = {str(part / name) for name in files if not name.startswith("state.json")}
    sealed = {str(part / f"{name}.part") for name in ("state.json", "state.json.sha256")}
    needs = direct | sealed | {str(part), str(part / "optimizer"), str(out / "metrics.jsonl")}
    assert needs <= before, needs - before
    last = max(i for i, call in enumerate(calls[:named]) if call[0] == "rename")
    assert ("fsync", str(part)) in calls[last:named]  # the seal's name is in it, too
    assert calls[named + 1] == ("fsync", str(out))


def test_synced_before_it_has_a_name(room, monkeypatch):
    """By the calls that Python makes."""
    import os
    calls, fsync, rename = [], os.fsync, Path.rename

    def synced(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(self, to):
        calls.append(("rename", str(self.absolute())))
        return rename(self, to)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    assert go("--max_steps=4") == 0
    first = next(i for i, (_, path) in enumerate(calls) if "ckpt_000.part" in path)
    assert_synced(calls[first:], OUT.absolute())


@pytest.mark.skipif(not shutil.which("strace") or subprocess.run(
    ["strace", "-o", "/dev/null", "true"], capture_output=True).returncode, reason="no strace")
def test_synced_before_it_has_a_name_by_the_kernel(room):
    """By the system calls that the kernel sees, of a process of its own."""
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o",
         "calls", sys.executable, str(REPO / "train.py"), "tiny.py", "--max_steps=4"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, here = [], Path.cwd()
    for line in Path("calls").read_text().splitlines():
        if found := re.search(r"f(?:data)?sync\(\d+<([^>]*)>", line):
            calls.append(("fsync", found[1]))
        elif found := re.search(r'rename\w*\((?:AT_FDCWD[^,]*, )?"([^"]*)"', line):
            calls.append(("rename", str(here / found[1])))
    first = next(i for i, (_, path) in enumerate(calls) if "ckpt_000.part" in path)
    assert_synced(calls[first:], OUT.absolute())
