#!/usr/bin/env python3
"""Breaks the sources on purpose, one way at a time, and checks that a test notices: the mutants of tools/mutations/.

    tools/mutants.py [--list] [--only TEXT] [--python PYTHON]

A mutant is one or more edits: a file, an exact text that occurs in it once, and what stands there instead. `suites` are
run in order until a test fails: a *_test of native/tests, a file of tests/integration/llm_datadist, or a path.

Works on a copy of HEAD (a git worktree in a temporary folder) with a build folder of its own, so that a mutant costs
what it changes. PYTHON needs pytest, hypothesis, numpy, pybind11, cmake and ninja. Run by hand: it takes a while.
Ends with 0 only if every mutant was built and killed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tomllib
from console import StepError, run_step, stop_group

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = Path(__file__).resolve().parent / "mutations"
PYTEST_SUITES = "tests/integration/llm_datadist"
SUITE_TIMEOUT_S = 300.0
# That a test fails is all there is to know: finding its smallest example would take minutes.
NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""
LISTED_FAILURE = re.compile(r"^(?:FAILED (?P<pytest>\S+)|\[  FAILED  \] (?P<gtest>[\w/.]+))", re.MULTILINE)


class Edit(NamedTuple):
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    group: str
    """Its file, without the suffix."""
    name: str
    suites: tuple[str, ...]
    edits: tuple[Edit, ...]


class Verdict(NamedTuple):
    mutant: str
    outcome: str
    """killed, SURVIVED, or NOT BUILT, which is a defect of the mutant."""
    by: str
    seconds: float


@dataclass(frozen=True)
class Copy:
    """A copy of the sources, and what it is built and tested with."""

    tree: Path
    build: Path
    python: Path
    log: Path

    def variables(self) -> dict[str, str]:
        tools = f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**os.environ, "PATH": tools, "PYTHONPATH": f"{self.tree}{os.pathsep}{self.tree / 'tests'}"}

    def configure(self) -> None:
        pybind11 = subprocess.run(
            [str(self.python), "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        ).stdout.strip()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_FLAGS_RELEASE": "-O0",  # what is built is run once
            "DATADIST_BUILD_PYTHON": "ON",
            "DATADIST_BUILD_TESTS": "ON",
            "DATADIST_WERROR": "OFF",  # a mutant leaves variables unused
            "pybind11_DIR": pybind11,
            "Python_EXECUTABLE": str(self.python),
        }
        command = ["cmake", "-S", str(self.tree / "native"), "-B", str(self.build), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in settings.items()]
        run_step("configure", command, self.log, env=self.variables())

    def compile(self, title: str, suites: Sequence[str]) -> None:
        """The Python extension and the native tests among the suites; StepError if that fails."""
        targets = ["_native", *filter(is_native, suites)]
        run_step(title, ["ninja", "-C", str(self.build), *targets], self.log, env=self.variables())
        for extension in self.build.glob("_native*.so"):
            link = self.tree / "vllm_datadist_connector" / extension.name
            if not link.is_symlink():
                link.symlink_to(extension)

    def failure(self, suite: str) -> str:
        """The first test of the suite that failed; empty if all passed."""
        if is_native(suite):
            command = [str(self.build / suite), "--gtest_brief=1"]
        else:
            path = suite if "/" in suite else f"{PYTEST_SUITES}/{suite}"
            command = ["pytest", "-q", "-x", "-p", "no:cacheprovider", path]
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.tree, env=self.variables(), stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(SUITE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return f"{suite}: no end within {SUITE_TIMEOUT_S:.0f} s"
            finally:
                stop_group(process)
        if status == 0:
            return ""
        found = LISTED_FAILURE.search(self.log.read_text(encoding="utf-8", errors="replace"))
        return (found["pytest"] or f"{suite}: {found['gtest']}") if found else f"{suite}: status {status}"


def is_native(suite: str) -> bool:
    return suite.endswith("_test")


@contextmanager
def copy_of_head(python: Path) -> Iterator[Copy]:
    with tempfile.TemporaryDirectory(prefix="datadist-mutants-") as folder:
        top = Path(folder)
        tree = top / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), "HEAD"], check=True)
        try:
            with (tree / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
                conftest.write(NO_SHRINKING)
            yield Copy(tree, top / "build", python, top / "log")
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextmanager
def edited(tree: Path, edits: Sequence[Edit]) -> Iterator[None]:
    originals = {tree / edit.file: (tree / edit.file).read_text(encoding="utf-8") for edit in edits}
    texts = dict(originals)
    for edit in edits:
        texts[tree / edit.file] = texts[tree / edit.file].replace(edit.old, edit.new)
    try:
        write(texts)
        yield
    finally:
        write(originals)


def write(texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def read_mutants() -> list[Mutant]:
    mutants = []
    for path in sorted(MUTATIONS.glob("*.toml")):
        group = tomllib.loads(path.read_text(encoding="utf-8"))
        for mutant in group["mutant"]:
            edits = tuple(Edit(group["folder"] + edit["file"], edit["old"], edit["new"]) for edit in mutant["edit"])
            mutants.append(Mutant(path.stem, mutant["name"], tuple(mutant.get("suites", group["suites"])), edits))
    return mutants


def overtaken(mutants: Sequence[Mutant], tree: Path) -> list[str]:
    """The edits whose old text is not there, or not once."""
    problems = []
    for mutant in mutants:
        for edit in mutant.edits:
            count = (tree / edit.file).read_text(encoding="utf-8").count(edit.old)
            if count != 1:
                problems.append(f"{mutant.name}: {edit.file} has {count} times: {edit.old}")
    return problems


def judge(copy: Copy, mutant: Mutant) -> Verdict:
    start = time.monotonic()
    with edited(copy.tree, mutant.edits):
        try:
            copy.compile(mutant.name, mutant.suites)
        except StepError as error:
            print(error, file=sys.stderr)
            return Verdict(mutant.name, "NOT BUILT", "", time.monotonic() - start)
        by = next(filter(None, map(copy.failure, mutant.suites)), "")
    return Verdict(mutant.name, "killed" if by else "SURVIVED", by, time.monotonic() - start)


def check_unbroken(copy: Copy, mutants: Sequence[Mutant]) -> None:
    """A test that fails anyway would kill every mutant."""
    suites = sorted({suite for mutant in mutants for suite in mutant.suites})
    copy.compile("build", suites)
    for suite in suites:
        print(f"  unbroken: {suite}", flush=True)
        if failure := copy.failure(suite):
            raise StepError(f"{failure} fails without any mutant")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="name the mutants, check that they fit the sources, and end"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the mutants of TEXT.toml, and those whose name has this in it"
    )
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="what runs pytest, this one otherwise"
    )
    arguments = parser.parse_args()
    mutants = [each for each in read_mutants() if arguments.only in each.name or arguments.only == each.group]
    if arguments.list:
        print("\n".join([mutant.name for mutant in mutants] + overtaken(mutants, ROOT)))
        return 1 if overtaken(mutants, ROOT) else 0
    with copy_of_head(arguments.python) as copy:
        if problems := overtaken(mutants, copy.tree):
            raise SystemExit("\n".join(problems))
        copy.configure()
        check_unbroken(copy, mutants)
        verdicts = [report(judge(copy, mutant)) for mutant in mutants]
    print(f"\n{'mutant':<60} {'outcome':<10} by")
    for verdict in verdicts:
        print(f"{verdict.mutant:<60} {verdict.outcome:<10} {verdict.by}")
    alive = sum(verdict.outcome != "killed" for verdict in verdicts)
    print(f"{len(verdicts) - alive} killed, {alive} not")
    return 1 if alive else 0


def report(verdict: Verdict) -> Verdict:
    print(f"    {verdict.outcome} {verdict.by} ({verdict.seconds:.0f} s)", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
