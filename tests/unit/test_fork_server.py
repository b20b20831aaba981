"""The fork server of the end-to-end tests, with a program that takes no time to import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tools", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import serving  # noqa: E402
from support.fork_client import ForkServer  # noqa: E402
from support.fork_server import MAX_ALIVE  # noqa: E402

WAIT_S = 30.0
# What it has imported shows whether a process shares these imports.
PROGRAM = """
import multiprocessing, os, sys, time
IMPORTED_BY = os.getpid()

def say(*words):
    print(*words, flush=True)

def child():
    say("child", IMPORTED_BY)
    time.sleep(600)

def main():
    command = sys.argv[1]
    if command == "show":
        say("imported by", IMPORTED_BY, "argv", sys.argv, "cwd", os.getcwd(), "late", os.environ.get("LATE"))
        return int(sys.argv[2])
    if command == "family":
        process = multiprocessing.get_context("spawn").Process(target=child)
        process.start()
        say("parent", IMPORTED_BY)
    time.sleep(600)
"""
# A file that is run rather than imported, and what it changes in a module.
CHANGE = "import forked_program\nforked_program.IMPORTED_BY = 'changed'\n"
THREADED = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "forked_program.py").write_text(PROGRAM)
    (tmp_path / "change.py").write_text(CHANGE)
    (tmp_path / "threaded.py").write_text(THREADED)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.defpath, "PYTHONPATH": str(folder)}


def make_fork(folder: Path, *modules: str) -> ForkServer:
    entry, log = "forked_program:main", folder / "fork-server.log"
    return ForkServer(Path(sys.executable), entry, modules, environment(folder), log, ["LATE"])


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def fork(folder: Path, resources: ExitStack) -> ForkServer:
    server = make_fork(folder)
    resources.callback(server.close)
    return server


@pytest.fixture
def make_program(folder: Path, fork: ForkServer, resources: ExitStack) -> Callable[..., serving.Program]:
    def make(*arguments: str, **variables: str) -> serving.Program:
        env = {**environment(folder), **variables}
        log = folder / "runs" / f"{len(os.listdir(folder))}.log"
        program = serving.Program("forked", ["program", *arguments], serving.free_port(), log, env, fork)
        resources.callback(program.kill)
        return program

    return make


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.005)


def said(program: serving.Program) -> dict[str, str]:
    """First word of each line that the program has written to its log, and the rest."""
    lines = program.log.read_text().splitlines()
    return {first: rest for first, _, rest in (line.partition(" ") for line in lines)}


def test_a_forked_program_gets_what_a_spawned_one_gets(
    make_program: Callable[..., serving.Program], folder: Path
) -> None:
    program = make_program("show", "7", LATE="here")
    program.start()
    assert program.pid != os.getpid()
    wait_for(lambda: not program.alive, "the end of the program")
    line = said(program)["imported"]
    assert f"argv ['program', 'show', '7'] cwd {folder / 'runs'} late here" in line
    assert line.split()[1] != str(program.pid), "imported anew"
    with pytest.raises(serving.ServingError, match="ended before it served"):
        program.wait_ready()


def test_the_exit_status_comes_back(fork: ForkServer, folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        started = fork(["program", "show", "7"], environment(folder), folder, log)
        assert started.wait(WAIT_S) == 7
        sleeper = fork(["program", "sleep"], environment(folder), folder, log)
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.wait(0.01)
        assert sleeper.poll() is None
        sleeper.terminate()
        assert sleeper.wait(WAIT_S) == -signal.SIGTERM


def test_its_children_are_forked_and_all_of_them_ended(make_program: Callable[..., serving.Program]) -> None:
    """Whatever they were doing: a stopped one, too."""
    program = make_program("family")
    program.start()
    leader = program.pid
    wait_for(lambda: {"parent", "child"} <= said(program).keys(), "both processes")
    words = said(program)
    assert words["child"] == words["parent"] != str(leader), "a process has imported anew"
    assert len(serving.members_of(leader)) >= 2
    assert os.getpgid(leader) == leader
    assert os.getsid(leader) == os.getsid(0)
    program.pause()
    program.kill()
    assert serving.members_of(leader) == {}


def test_a_file_is_run_before_all_forks(folder: Path, resources: ExitStack) -> None:
    fork = make_fork(folder, str(folder / "change.py"))
    resources.callback(fork.close)
    with (folder / "log").open("wb") as log:
        assert fork(["program", "show", "0"], environment(folder), folder, log).wait(WAIT_S) == 0
    assert "imported by changed" in (folder / "log").read_text()


def test_what_an_import_may_have_read_cannot_be_changed(make_program: Callable[..., serving.Program]) -> None:
    program = make_program("show", "0", EARLY="1")
    with pytest.raises(serving.ServingError, match="EARLY: may be read by imports"):
        program.start()


def test_the_number_of_forks_has_a_limit(fork: ForkServer, folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        started = [fork(["program", "sleep"], environment(folder), folder, log) for _ in range(MAX_ALIVE)]
        with pytest.raises(serving.ServingError, match=f"{MAX_ALIVE} processes are alive, the limit"):
            fork(["program", "sleep"], environment(folder), folder, log)
        started[0].terminate()
        started[0].wait(WAIT_S)
        fork(["program", "sleep"], environment(folder), folder, log)


def test_a_process_with_threads_does_not_fork(folder: Path) -> None:
    server = make_fork(folder, "threaded")
    with (folder / "log").open("wb") as log, pytest.raises(serving.ServingError, match="imports have started threads"):
        server(["program", "show", "0"], environment(folder), folder, log)


def test_no_fork_outlives_the_one_who_asked(folder: Path) -> None:
    """Not even if that one is killed: the fork server sees the socket close."""
    owner = f"""
import sys, time
sys.path[:0] = {[str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]!r}
from pathlib import Path
from test_fork_server import environment, make_fork
folder = Path({str(folder)!r})
server = make_fork(folder)
print(server(["program", "family"], environment(folder), folder, (folder / "log").open("wb")).pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        leader = int(process.stdout.readline())
        wait_for(lambda: len(serving.members_of(leader)) >= 2, "the family")
        process.kill()
    wait_for(lambda: not serving.members_of(leader), "the end of the family")
