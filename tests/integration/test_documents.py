"""Every command of a document works in the folder that the document names: the root of a clone.

Bash runs them, block by block, in a copy of the sources, where the clone's own folder of the package lies in the way of
the installed one, as it does for a newcomer. It finds the programs of this file's tables only: RUN says which calls are
made in earnest, CHECKED what is looked at of those that would cost minutes, or change this machine. A program that is
in neither table is not found, so a new command fails until it is in one.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.cpp import ROOT, tool

from vllm_datadist_connector import plugin, role

TIMEOUT_S = 900
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("tools/**/*.md")]
)
SOURCES = sorted(
    path
    for pattern in ("benchmarks/**/*.py", "docs/**/*.py", "tests/*.py", "tools/*.py", "vllm_datadist_connector/**/*.py")
    for path in ROOT.glob(pattern)
)
FENCE_LANGUAGES = {"sh", "text", "cmake"}
NOT_CLONED = shutil.ignore_patterns(".*", "build", "dist", "logs", "models", "results", "shared", "__pycache__")


# ---- what becomes of a program's call: (arguments, folder) of those that are not made ----


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout


def flags_of(words: list[str]) -> set[str]:
    return {flag for word in words for flag in re.findall(r"^\[?(--[a-z][a-z-]+)", word)}


def check_script(arguments: list[str], folder: Path) -> None:
    """The script is there, and knows the flags; of `--only a,b` also the parts."""
    script, *rest = arguments
    assert (folder / script).is_file(), script
    if flags := flags_of(rest):
        text = help_of(sys.executable, script)
        assert all(flag in text for flag in flags), f"{script} does not know all of {flags}"
        values = [rest[i + 1].split(",") for i, word in enumerate(rest[:-1]) if word == "--only"]
        assert all(part in text for parts in values for part in parts)


def check_pip(arguments: list[str], folder: Path) -> None:
    assert arguments[0] == "install"
    for word in (each for each in arguments[1:] if not each.startswith("-")):
        path, _, extra = word.partition("[")
        if path != ".":
            assert Requirement(word).specifier, f"{word} has no version"
        else:
            project = (folder / "pyproject.toml").read_text()
            assert not extra or re.search(rf"^{extra.rstrip(']')} = \[", project, re.MULTILINE), word


def check_apt(arguments: list[str], folder: Path) -> None:
    """tools/test.py installs the same."""
    assert arguments[0] == "install"
    used = (folder / "tools" / "test.py").read_text()
    assert all(f'"{package}"' in used for package in arguments[1:])


@functools.cache
def serve_parser() -> argparse.ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


def check_vllm(arguments: list[str], _: Path) -> None:
    assert arguments[0] == "serve"
    serve_parser().parse_args(arguments[1:])
    if "--kv-transfer-config" in arguments:
        config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
        assert config["kv_connector"] == plugin.NAME


def check_router(arguments: list[str], _: Path) -> None:
    text = help_of(tool("vllm-router"))
    assert all(re.search(rf"{flag}[ \]]", text) for flag in flags_of(arguments))
    if "--kv-connector" in arguments:
        connectors = re.search(r"--kv-connector \{(.*?)\}", text)
        assert connectors
        assert arguments[arguments.index("--kv-connector") + 1] in connectors[1].split(",")


def check_curl(arguments: list[str], folder: Path) -> None:
    """It asks what a document starts at that port, and what it sends is JSON."""
    (port,) = (match[1] for word in arguments if (match := re.match(r"http://127\.0\.0\.1:(\d+)/", word)))
    assert f"--port {port} " in (folder / "README.md").read_text(encoding="utf-8")
    if "-d" in arguments:
        assert json.loads(arguments[arguments.index("-d") + 1])["prompt"]


def check_cmake(arguments: list[str], folder: Path) -> None:
    """By preset; or as test_cpp_examples.py::test_installation_without_python_can_be_moved does it."""
    if "--preset" in arguments:
        kind = {"--workflow": "workflow", "--preset": "test"}[arguments[0]]
        presets = json.loads((folder / "CMakePresets.json").read_text())[f"{kind}Presets"]
        assert arguments[arguments.index("--preset") + 1] in {preset["name"] for preset in presets}
    else:
        assert "build/native" in arguments
    if "-R" in arguments:
        test = arguments[arguments.index("-R") + 1]
        assert any(test in path.read_text() for path in (folder / "tests").glob("*.cc")), test


def check_role(arguments: list[str], folder: Path) -> None:
    """Whoever it names is not here; alone it is the command's name."""
    del folder
    parser = argparse.ArgumentParser()
    role.add_arguments(parser)
    if arguments != ["role"]:
        parser.parse_args(arguments[1:])


RUN = {
    "cmake": "*build/examples*",
    "g++": "*",
    "mkdir": "*",
    "cat": "*",
    "pkg-config": "*",
    "python": "-m\\ vllm_datadist_connector.*",
    "vllm-datadist": "!(role*)",
}
CHECKED: dict[str, Callable[[list[str], Path], None]] = {
    "apt-get": check_apt,
    "cmake": check_cmake,
    "ctest": check_cmake,
    "curl": check_curl,
    "pip": check_pip,
    "python": check_script,
    "python3": check_script,
    "vllm": check_vllm,
    "vllm-datadist": check_role,
    "vllm-router": check_router,
}
COMMAND = re.compile(rf"(?:{'|'.join(re.escape(name) for name in sorted({*RUN, *CHECKED}))}) ")
SCRIPT = re.compile(r"(?:tools|tests|benchmarks|docs)/[\w/]+\.py")


class Clone:
    """The sources without anything built, and a PATH of this file's programs alone."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        shutil.copytree(ROOT, self.root, ignore=NOT_CLONED)
        # Placeholders of the documents, as the files that they stand for.
        (self.root / "SCRIPT").write_text("import sys, llm_datadist\nprint(llm_datadist.LLMDataDist, sys.argv)\n")
        (self.root / "MODULE.py").write_text("import llm_datadist.v2\n")
        self._programs, self._record = folder / "bin", folder / "record"
        self._programs.mkdir()
        for name in {*RUN, *CHECKED}:
            self._stand_in(name)

    def _stand_in(self, name: str) -> None:
        """Does it, or notes the folder, the name and the arguments. Not a link: Python would lose its environment."""
        lines = ["#!/bin/bash"]
        if name in RUN:
            program = sys.executable if name == "python" else tool(name)
            path = shlex.quote(f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin")
            lines += [f'if [[ "$*" == {RUN[name]} ]]; then', f'  PATH={path} exec {program} "$@"', "fi"]
        lines.append(f"""printf '%s\\x1f' "$PWD" {name} "$@" >> {self._record}; printf '\\x1e' >> {self._record}""")
        path = self._programs / name
        path.write_text("\n".join([*lines, ""]))
        path.chmod(0o755)

    def run(self, command: str) -> None:
        """Runs it, with what it leaves in the background, and checks the calls that were not made."""
        host = ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])  # a loopback address of our own
        command = command.replace("127.0.0.1:260", f"{host}:260")
        self._record.unlink(missing_ok=True)
        script = f"set -eo pipefail\n{command}\nfor job in $(jobs -p); do wait $job; done\n"
        done = subprocess.run(
            [tool("bash"), "-c", script],
            cwd=self.root,
            env={"PATH": str(self._programs), "HOME": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        for call in self._record.read_text().split("\x1e")[:-1] if self._record.exists() else []:
            folder, name, *arguments = call.split("\x1f")[:-1]
            assert name in CHECKED, f"{name} runs only as {RUN.get(name)}: {arguments}"
            CHECKED[name](arguments, Path(folder))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("documents"))


def substitutions(text: str) -> Iterator[str]:
    """$(commands) where they only illustrate something."""
    yield from (inner for inner in re.findall(r"\$\(([^()]+)\)", text) if COMMAND.match(inner))


def commands_of(document: str) -> Iterator[str]:
    """Blocks of shell, and commands between backticks."""
    for language, block, code in re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", document, re.MULTILINE | re.DOTALL):
        if code:
            command = " ".join(code.split())
            if COMMAND.match(command):
                yield command
            elif SCRIPT.fullmatch(command):
                yield f"python {command}"
        elif language == "sh":
            yield block
        else:
            assert language in FENCE_LANGUAGES, f"the block {block[:60]!r} has no language of {FENCE_LANGUAGES}"
            yield from substitutions(block)


def usages_of(docstring: str) -> Iterator[str]:
    """Indented lines of a module's docstring that begin with a program or script, up to a remark."""
    for line in docstring.splitlines():
        usage = re.split(r"   +| > ", line.strip())[0].removeprefix(".venv/bin/")
        if line.startswith("    ") and (COMMAND.match(usage) or SCRIPT.match(usage)):
            yield usage
        else:
            yield from substitutions(line)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_document(path: Path, clone: Clone) -> None:
    for command in commands_of(path.read_text(encoding="utf-8")):
        clone.run(command)


USAGES = [
    (f"{path.relative_to(ROOT)}", usage)
    for path in SOURCES
    for usage in usages_of(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or "")
]


@pytest.mark.parametrize(("path", "usage"), USAGES, ids=[path for path, _ in USAGES])
def test_usage_in_a_docstring(path: str, usage: str, clone: Clone) -> None:
    """Usage lines have brackets that no shell takes: the script is there, can be started so, and knows the flags."""
    first, *rest = usage.split()
    if SCRIPT.fullmatch(first):
        assert first == path, "whose usage is that?"
        assert (ROOT / first).stat().st_mode & 0o111, f"{first} cannot be started without a `python` before it"
        check_script([first, *rest], clone.root)
    elif rest[0] == "-m":
        clone.run(usage)
    else:
        CHECKED[first](rest, clone.root)


def test_flags_in_prose() -> None:
    """A flag that stands alone between backticks is one of the programs that the documents are about."""
    programs = [
        *((sys.executable, f"tools/{name}.py") for name in ("demo", "test")),
        *((tool("vllm-datadist"), name) for name in ("doctor", "role", "selftest")),
        (tool("vllm-router"),),
    ]
    texts = "".join(help_of(*program) for program in programs)
    known = {*serve_parser()._option_string_actions, *re.findall(r"--[a-z][a-z-]+", texts)}
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`(--[a-z][^`]*)`", text):
            assert flags_of(code.split()) <= known, f"{path.name}: {code}"


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf build",
        "python -m vllm_datadist_connector.no_such_module",
        "python3 tools/no_such_tool.py",
        "python3 tools/test.py --no-such-flag",
        "python3 tools/test.py --only lint,no-such-part",
        "pip install '.[no-such-extra]'",
        "vllm serve MODEL --no-such-flag",
        'vllm serve MODEL --kv-transfer-config "$(cat configs/no-such-file.json)"',
        "vllm-router --no-such-flag",
        "vllm-datadist role no-such-role 10.0.0.7:5600",
        "curl http://127.0.0.1:9/v1/completions",
        "cd native && cmake --workflow --preset no-such-preset",
        "python -m vllm_datadist_connector.llm_datadist no_such_script.py & true",
    ],
)
def test_a_command_that_does_not_work_fails(command: str, clone: Clone) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        clone.run(command)


def test_a_block_of_no_language_fails() -> None:
    with pytest.raises(AssertionError, match="has no language"):
        list(commands_of("```\nrm -rf build\n```\n"))
