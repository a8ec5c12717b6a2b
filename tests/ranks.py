"""The ranks of a run without torchrun, whose agent would end the others where one is lost.

    server = forkserver("test_damage")
    started = start(server, trains, ["tiny.py"], world=2)
    assert ended(started) == [0, 0]          # and out.0, err.0, out.1, err.1 are in this folder

Processes are forked from one that has torch, and a module: they start in no time.
"""

import functools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from unittest import mock

import train
from nano360.config import run

GOOD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500"}
trains = functools.partial(run, train.main, "", [])  # a command line -> an exit code


def forkserver(module: str) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "torch._dynamo"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):  # it has no sys.path
        (first := context.Process(target=print)).start()
    first.join()
    return context


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def environs(world: int) -> list[dict[str, str]]:
    """The variables of each of so many ranks; a process alone has none."""
    common = GOOD | {"WORLD_SIZE": str(world), "MASTER_PORT": free_port()}
    return [common | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}
            for r in range(world)]


def in_child(folder: str, environ: dict[str, str], before: Callable[[], None] | None,
             code: Callable[[list[str]], int], argv: list[str]) -> None:
    """A rank, after something was done to it; its output in files."""
    os.chdir(folder)
    os.environ.update(environ)
    signal.alarm(100)  # ends what hangs
    for handle, end in ((1, "out"), (2, "err")):
        name = f"{end}.{environ.get('RANK', '0')}"
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), handle)
    if before:
        before()
    sys.exit(code(argv))


def start(server: ForkServerContext, code: Callable[[list[str]], int], argv: list[str],
          world: int = 1, before: Callable[[], None] | None = None) -> list[BaseProcess]:
    """The ranks of a run, in this folder."""
    started = [server.Process(target=in_child, args=(os.getcwd(), one, before, code, argv))
               for one in environs(world)]
    for process in started:
        process.start()
    return started


def ended(started: list[BaseProcess], seconds: float = 100) -> list[int]:
    """Exit codes; a process that does not end is killed, and counts as that."""
    until = monotonic() + seconds
    for process in started:
        process.join(max(0.0, until - monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]
