#!/usr/bin/env python3
"""Sets up .venv and runs every test: lint, native, unit, integration, e2e.

    tools/test.py [--only PART,PART] [-- PYTEST_ARGUMENTS]

Ends with 0 only if every selected part ran and passed; a part that finds nothing to run has failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bootstrap import ROOT, Environment, ensure_environment
from console import StepError, run_shown, run_step

LOGS = ROOT / "logs" / "test"
NATIVE = ROOT / "native"
# Order of the runs: what fails fastest comes first.
SANITIZERS = ("default", "asan", "tsan")
NO_TESTS_COLLECTED = 5  # pytest's exit status


class PartError(RuntimeError):
    """A part failed; the message says how."""


@dataclass(frozen=True)
class Run:
    environment: Environment
    pytest_arguments: tuple[str, ...]


def shown(run: Run, command: Sequence[str]) -> int:
    return run_shown(command, run.environment.variables(), ROOT)


def lint(run: Run) -> None:
    ruff, mypy = str(run.environment.tool("ruff")), str(run.environment.tool("mypy"))
    python_sources = ["vllm_datadist_connector", "tests", "tools", "benchmarks"]
    commands = [
        [ruff, "check", *python_sources],
        [ruff, "format", "--check", *python_sources],
        [mypy],
        [mypy, "--config-file", "tools/mypy.ini"],
    ]
    failed = [command for command in commands if shown(run, command) != 0]
    if failed:
        raise PartError(f"{len(failed)} of {len(commands)} checks failed")


def native(run: Run) -> None:
    ensure_googletest()
    for preset in SANITIZERS:
        log = LOGS / f"native-{preset}.log"
        command = [str(run.environment.tool("cmake")), "--workflow", "--preset", preset]
        run_step(f"native tests, {preset}", command, log, env=run.environment.variables(), cwd=NATIVE)
        print(f"    {ctest_summary(log)}", flush=True)


def ensure_googletest() -> None:
    """GoogleTest comes from the system; where we may, we install it."""
    probe = "#include <gmock/gmock.h>\n#include <gtest/gtest.h>\n"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=probe, text=True, capture_output=True, check=False).returncode == 0:
        return
    packages = ["libgtest-dev", "libgmock-dev"]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PartError(f"GoogleTest is not installed; on Debian and Ubuntu: apt-get install {' '.join(packages)}")
    run_step("apt-get update", ["apt-get", "update"], LOGS / "apt-update.log")
    run_step("install GoogleTest", ["apt-get", "install", "-y", *packages], LOGS / "apt-install.log")


def ctest_summary(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if "tests passed" in line), "no summary by ctest")


def pytest_part(folder: str) -> Callable[[Run], None]:
    def part(run: Run) -> None:
        # Not `python -m pytest`, which would put the sources before the installed package on the path.
        status = shown(run, [str(run.environment.tool("pytest")), f"tests/{folder}", *run.pytest_arguments])
        if status == NO_TESTS_COLLECTED:
            raise PartError("no test ran")
        if status != 0:
            raise PartError(f"pytest ended with status {status}")

    return part


PARTS: dict[str, Callable[[Run], None]] = {
    "lint": lint,
    "unit": pytest_part("unit"),
    "native": native,
    "integration": pytest_part("integration"),
    "e2e": pytest_part("e2e"),
}


def parse_arguments() -> tuple[list[str], tuple[str, ...]]:
    given, rest = split_at_dashes(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    wanted = [name for name in parser.parse_args(given).only.split(",") if name]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        parser.error(f"--only: {','.join(unknown) or 'nothing'}; the parts are {','.join(PARTS)}")
    return [name for name in PARTS if name in wanted], tuple(rest)


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def run_parts(run: Run, names: list[str]) -> list[tuple[str, float, str]]:
    """Runs every part, also after a failure: (name, seconds, what went wrong)."""
    outcomes = []
    for name in names:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        problem = ""
        try:
            PARTS[name](run)
        except (PartError, StepError) as error:
            print(f"{name}: {error}", flush=True)
            problem = str(error).splitlines()[0]
        outcomes.append((name, time.monotonic() - start, problem))
    return outcomes


def main() -> int:
    names, pytest_arguments = parse_arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        print("== set-up", flush=True)
        outcomes = run_parts(Run(ensure_environment(), pytest_arguments), names)
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print("\n== summary")
    for name, seconds, problem in outcomes:
        print(f"  {name:<12} {seconds:7.1f} s  {f'FAILED: {problem}' if problem else 'passed'}")
    failed = sum(bool(problem) for _, _, problem in outcomes)
    total = sum(seconds for _, seconds, _ in outcomes)
    print(f"== {len(outcomes) - failed} passed, {failed} failed in {total:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
