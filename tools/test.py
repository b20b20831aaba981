#!/usr/bin/env python3
"""Sets up .venv and runs every test: lint, native, unit, integration, faults, soak, e2e.

    tools/test.py [--only PART,PART] [-- PYTEST_ARGUMENTS]

Paths among the arguments of pytest select: `-- tests/unit/test_config.py` runs that file and nothing else. Parts run
beside one another. Ends with 0 only if every selected part ran and passed; a part that finds nothing to run has failed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bootstrap import ROOT, Environment, ensure_environment
from console import SHOWN_GRACE_S, StepError, exit_status_of, run_step, stop_group, tail

LOGS = ROOT / "logs" / "test"
NATIVE = ROOT / "native"
# The optimized build is what all Python tests run; of the native ones it would see little that these two do not.
PRESETS = ("asan", "tsan")
PYTEST_PARTS = ("unit", "integration", "faults", "soak", "e2e")
# What a part runs besides tests/PART.
MORE_FOLDERS = {"unit": ("tests/security",)}
PARTS = ("lint", "native", *PYTEST_PARTS)
# They run side by side, each its parts in turn. Every lane leaves cores idle at some time: servers and their tests wait
# for one another, faults and soak for deadlines to pass, and compilers fill what is left. Faults stop processes in the
# middle of a copy, which servers beside them would make a matter of luck.
LANES = (("lint", "unit", "integration"), ("native",), ("faults", "soak", "e2e"))
NO_TESTS_COLLECTED = 5  # pytest's exit status
POLL_S = 0.1


@dataclass(frozen=True)
class Step:
    """One command of a part. With a log, its output goes there; without one, to the terminal."""

    name: str
    command: tuple[str, ...]
    cwd: Path = ROOT
    log: Path | None = None


@dataclass
class Outcome:
    name: str
    seconds: float
    problem: str = ""
    cpu_seconds: float | None = None
    """Of the step's processes, as far as they waited for one another."""


@dataclass
class Lane:
    """Steps that run one after another, also after a failure."""

    environment: Environment
    steps: deque[Step]
    outcomes: list[Outcome] = field(default_factory=list)
    _step: Step | None = None
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0

    def advance(self) -> bool:
        """Takes note of a step that has ended and starts the next; False when none is left."""
        if self._step is not None and self._process is not None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid == 0:
                return True
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self._end(self._step, self._process.returncode, usage.ru_utime + usage.ru_stime)
        if not self.steps:
            self._step = self._process = None
            return False
        self._begin(self.steps.popleft())
        return True

    def stop(self) -> None:
        if self._process is not None:
            stop_group(self._process, SHOWN_GRACE_S)

    def _begin(self, step: Step) -> None:
        self._step, self._started = step, time.monotonic()
        print(f"\n== {step.name}: {' '.join(step.command)}{f' > {step.log}' if step.log else ''}", flush=True)
        # Ninja's own choice is two more than there are cores.
        variables = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)} | self.environment.variables()
        if step.log is None:
            self._process = _start(step, variables, None)
            return
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with step.log.open("wb") as log:
            self._process = _start(step, variables, log.fileno())

    def _end(self, step: Step, status: int, cpu_seconds: float) -> None:
        problem = ""
        if status == NO_TESTS_COLLECTED and step.name in PYTEST_PARTS:
            problem = "no test ran"
        elif status != 0:
            problem = f"exit status {status}"
        outcome = Outcome(step.name, time.monotonic() - self._started, problem, cpu_seconds)
        self.outcomes.append(outcome)
        if step.log is not None:
            print(f"\n== {step.name}: {_ctest_summary(step.log)} ({outcome.seconds:.0f} s)", flush=True)
            if problem:
                print(f"{problem}; the end of {step.log}:\n{tail(step.log)}", flush=True)


def _start(step: Step, variables: dict[str, str], output: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        step.command,
        cwd=step.cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def _ctest_summary(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if "tests passed" in line), "no summary by ctest")


def steps_of(part: str, environment: Environment, pytest_arguments: Sequence[str]) -> list[Step]:
    def tool(name: str, *arguments: str) -> tuple[str, ...]:
        return (str(environment.tool(name)), *arguments)

    if part == "lint":
        sources = ("vllm_datadist_connector", "tests", "tools", "benchmarks")
        return [
            Step("ruff check", tool("ruff", "check", *sources)),
            Step("ruff format", tool("ruff", "format", "--check", *sources)),
            Step("mypy", tool("mypy")),
            Step("mypy tools", tool("mypy", "--config-file", "tools/mypy.ini")),
        ]
    if part == "native":
        return [
            Step(f"native {preset}", tool("cmake", "--workflow", "--preset", preset), NATIVE, LOGS / f"{preset}.log")
            for preset in PRESETS
        ]
    paths = [each for each in pytest_arguments if part_of(each)]
    rest = [each for each in pytest_arguments if not part_of(each)]
    chosen = [path for path in paths if part_of(path) == part] if paths else folders_of(part)
    return [Step(part, tool("pytest", *chosen, *rest))]


def folders_of(part: str) -> list[str]:
    return [f"tests/{part}", *MORE_FOLDERS.get(part, ())]


def part_of(argument: str) -> str | None:
    """The part that a path of pytest's (`tests/unit/test_x.py::test_y`) belongs to; None for what is no such path."""
    path = (ROOT / argument.split("::")[0]).resolve()
    folders = {ROOT / folder: part for part in PYTEST_PARTS for folder in folders_of(part)}
    return next((part for folder, part in folders.items() if path.is_relative_to(folder) and path.exists()), None)


def parse_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts to run, and pytest's arguments."""
    given, rest = split_at_dashes(list(arguments))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)} (default: all, or those of the paths)")
    only = parser.parse_args(given).only
    selected = {part for part in map(part_of, rest) if part is not None}
    if only is None:
        return [part for part in PARTS if part in (selected or PARTS)], rest
    wanted = [name for name in only.split(",") if name]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        parser.error(f"--only: {','.join(unknown) or 'nothing'}; the parts are {','.join(PARTS)}")
    if selected and not selected.issuperset(part for part in wanted if part in PYTEST_PARTS):
        parser.error(f"--only {only}: the paths after -- are of {','.join(sorted(selected))}")
    return [part for part in PARTS if part in wanted], rest


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def ensure_googletest() -> None:
    """GoogleTest comes from the system; where we may, we install it."""
    probe = "#include <gmock/gmock.h>\n#include <gtest/gtest.h>\n"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=probe, text=True, capture_output=True, check=False).returncode == 0:
        return
    packages = ["libgtest-dev", "libgmock-dev"]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise StepError(f"GoogleTest is not installed; on Debian and Ubuntu: apt-get install {' '.join(packages)}")
    run_step("apt-get update", ["apt-get", "update"], LOGS / "apt-update.log")
    run_step("install GoogleTest", ["apt-get", "install", "-y", *packages], LOGS / "apt-install.log")


def run_lanes(lanes: list[Lane]) -> list[Outcome]:
    try:
        while [lane for lane in lanes if lane.advance()]:
            time.sleep(POLL_S)
    finally:
        for lane in lanes:
            lane.stop()
    return [outcome for lane in lanes for outcome in lane.outcomes]


def run_parts(environment: Environment, parts: list[str], pytest_arguments: list[str]) -> list[Outcome]:
    def steps_of_all(lane: tuple[str, ...]) -> deque[Step]:
        return deque(step for part in lane if part in parts for step in steps_of(part, environment, pytest_arguments))

    return run_lanes([Lane(environment, steps_of_all(lane)) for lane in LANES])


def show_summary(outcomes: list[Outcome], seconds: float) -> int:
    print("\n== summary (lanes run side by side: their seconds overlap, those of the cores do not)")
    for outcome in outcomes:
        verdict = f"FAILED: {outcome.problem}" if outcome.problem else "passed"
        cores = f"{outcome.cpu_seconds:7.0f} s of a core" if outcome.cpu_seconds is not None else " " * 19
        print(f"  {outcome.name:<16} {outcome.seconds:7.1f} s {cores}  {verdict}")
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    print(f"== {len(outcomes) - failed} passed, {failed} failed in {seconds:.1f} s")
    return 1 if failed else 0


def run_all() -> int:
    parts, pytest_arguments = parse_arguments(sys.argv[1:])
    start = time.monotonic()
    print("== set-up", flush=True)
    environment = ensure_environment()
    if "native" in parts:
        ensure_googletest()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    setup = Outcome("set-up", time.monotonic() - start, cpu_seconds=used.ru_utime + used.ru_stime)
    outcomes = [setup, *run_parts(environment, parts, pytest_arguments)]
    return show_summary(outcomes, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(exit_status_of(run_all))
