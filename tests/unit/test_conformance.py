"""docs/conformance.md against the sources, and the check itself against tables that must not pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import conformance  # noqa: E402

DOCUMENT = (ROOT / conformance.TABLE).read_text(encoding="utf-8")
PULL = "`LlmDataDist::PullKvCache`"
SOURCE = "`native/src/engine/llm_datadist.cc::LlmDataDist::PullKvCache`"
TEST = "`docs/examples/cpp/pull.cc`"


def test_the_document_says_what_the_sources_say() -> None:
    assert conformance.problems(conformance.read_table(DOCUMENT)) == []


@pytest.mark.parametrize(
    "name",
    [
        "LlmDataDist::SetRole",
        "OPTION_DEVICE_ID",
        "OPTION_MAX_LINKS",
        "LLM_EXIST_LINK",
        "DT_BF16",
        "llm_datadist::KvCacheExtParam",
        "GetLastErrorText",
        "LLMDataDist",
        "LLMDataDist.link",
        "LLMStatusCode.LLM_TIMEOUT",
        "LLMConfig.device_id",
        "TransferConfig.dst_layer_range",
        "CacheManager.register_cache",
        "KvCache.cache_id",
    ],
)
def test_a_name_without_a_row_is_missed(name: str) -> None:
    without = "\n".join(line.replace(f"`{name}`", "") for line in DOCUMENT.splitlines())
    assert f"`{name}` has no row" in conformance.problems(conformance.read_table(without))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (f"| {PULL} | {SOURCE} | {TEST} |", "3 cells"),
        (f"| {PULL} | - | {TEST} | |", "is implemented nowhere"),
        (f"| {PULL} | {SOURCE} | - | |", "is tested nowhere"),
    ],
)
def test_an_incomplete_row_is_refused(row: str, problem: str) -> None:
    (found,) = conformance.read_table(row).problems
    assert problem in found


@pytest.mark.parametrize(
    "reference",
    [
        "native/src/engine/llm_datadist.cc::LlmDataDist::PullKvCache",
        "native/include/llm_datadist/llm_datadist.h::LLM_TIMEOUT",
        "native/include/llm_datadist/llm_datadist.h::LlmRole",
        "native/include/llm_datadist/llm_datadist.h::CacheDesc",
        "native/include/llm_datadist/ge_types.h::DT_BF16",
        "tools/conformance.py::Row",
        "tools/conformance.py::Table.problems",
        "tools/conformance.py::problems",
    ],
)
def test_a_declaration_is_found(reference: str) -> None:
    assert conformance.implementation_problem(reference) == ""


@pytest.mark.parametrize(
    "reference",
    [
        "native/src/engine/llm_datadist.cc",
        "native/src/engine/no_such_file.cc::Engine",
        "native/src/engine/llm_datadist.cc::LlmDataDist::PullNothing",
        "native/src/engine/llm_datadist.cc::NoSuchOwner::PullKvCache",
        "native/include/llm_datadist/llm_datadist.h::hexadecimal",
        "native/include/llm_datadist/llm_datadist.h::brace",  # in a comment only
        "tools/conformance.py::Row.problems",
        "tools/conformance.py::no_such_function",
    ],
)
def test_what_is_not_declared_is_refused(reference: str) -> None:
    assert reference in conformance.implementation_problem(reference)


@pytest.mark.parametrize(
    ("reference", "exists"),
    [
        ("docs/examples/cpp/pull.cc", True),
        ("docs/examples/cpp/teleport.cc", False),
        ("native/tests/limits_test.cc::Limits.LinksOfTheServer", True),
        ("native/tests/limits_test.cc::Limits.NoSuchTest", False),
        ("native/tests/limits_test.cc", False),
        ("tests/unit/test_conformance.py::test_the_document_says_what_the_sources_say", True),
        ("tests/unit/test_conformance.py::test_nothing", False),
        ("tests/unit/test_conformance.py::DOCUMENT", False),
    ],
)
def test_a_test_is_found_where_it_is(reference: str, exists: bool) -> None:
    assert (conformance.test_problem(reference) == "") == exists
