"""The table of known vulnerabilities in README.md: every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| ((?:CVE|vLLM|llm-d|ReDMArk)[^|]*) \|[^|]*\| ([^|]*) \|")
ROWS = ROW.findall(Path(__file__).with_name("README.md").read_text())
RECORDS = {record: holds.split(", ") for records, holds in ROWS for record in records.split(", ")}
NATIVE_TEST = re.compile(r"\bTEST(?:_F|_P)?\((\w+), (\w+)\)")


def exists(test: str) -> bool:
    if test.startswith("fuzz_"):
        return (ROOT / "native" / "fuzz" / f"{test.removeprefix('fuzz_')}_fuzz.cc").is_file()
    if "::" not in test:
        suite, _, name = test.partition(".")
        sources = (ROOT / "native" / "tests").glob("*_test.cc")
        return any((suite, name) in NATIVE_TEST.findall(source.read_text()) for source in sources)
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))


@pytest.mark.parametrize("record", RECORDS)
def test_is_held_off(record: str) -> None:
    assert [test for test in RECORDS[record] if not exists(test)] == []


def test_no_row_is_overlooked() -> None:
    assert len(ROWS) == Path(__file__).with_name("README.md").read_text().count("\n| ") - 1
    assert len(RECORDS) >= 28


@pytest.mark.parametrize("test", ["fuzz_nothing", "Suite.Name", "tests/security/test_records.py::test_nothing"])
def test_a_test_that_is_gone_is_noticed(test: str) -> None:
    assert not exists(test)
