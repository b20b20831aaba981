"""_native against its stub, what it exports, and what importing the package loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_datadist_connector
from vllm_datadist_connector import _native

PACKAGE = Path(vllm_datadist_connector.__file__).parent
STUB = ast.parse((PACKAGE / "_native.pyi").read_text(encoding="utf-8"))
ONLY_IN_STUB = {"BlockIds", "CacheRef", "Key", "LayerSpan"}


def _members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    members: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            members[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            members[statement.target.id] = statement
        elif isinstance(statement, ast.Assign):
            members |= {target.id: statement for target in statement.targets if isinstance(target, ast.Name)}
    return members


def _public(names: object) -> set[str]:
    return {name for name in dir(names) if not name.startswith("_")}


STUB_MEMBERS = _members(STUB.body)
STUB_CLASSES = {name: node for name, node in STUB_MEMBERS.items() if isinstance(node, ast.ClassDef)}


def test_module_has_exactly_the_names_of_its_stub() -> None:
    assert _public(_native) == set(STUB_MEMBERS) - ONLY_IN_STUB


@pytest.mark.parametrize("name", STUB_CLASSES)
def test_class_has_exactly_the_members_of_its_stub(name: str) -> None:
    inherited = _public(tuple) if issubclass(getattr(_native, name), tuple) else _public(RuntimeError)
    expected = {member for member in _members(STUB_CLASSES[name].body) if not member.startswith("_")}
    assert _public(getattr(_native, name)) - inherited == expected - inherited


def _functions() -> dict[str, tuple[ast.FunctionDef, object]]:
    functions: dict[str, tuple[ast.FunctionDef, object]] = {}
    for name, node in STUB_MEMBERS.items():
        if isinstance(node, ast.FunctionDef):
            functions[name] = (node, getattr(_native, name))
        elif isinstance(node, ast.ClassDef):
            for member, method in _members(node.body).items():
                if isinstance(method, ast.FunctionDef) and not method.decorator_list:
                    functions[f"{name}.{member}"] = (method, getattr(getattr(_native, name), member))
    return functions


FUNCTIONS = _functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_those_of_the_stub(name: str) -> None:
    node, function = FUNCTIONS[name]
    signature = (function.__doc__ or "").splitlines()[0]
    parameters = re.findall(r"[(,] ?(\w+): ", re.sub(r"\[[^()]*?\]|tuple\[[^\]]*\]", "", signature))
    expected = [argument.arg for argument in node.args.args]
    assert [parameter for parameter in parameters if parameter != "self"] == [
        parameter for parameter in expected if parameter != "self"
    ]


def test_status_codes_have_the_values_of_the_api() -> None:
    assert _native.LLM_SUCCESS == 0
    assert _native.LLM_FAILED == 0xFFFFFFFF
    assert _native.LLM_TIMEOUT == 0x5010B01A
    codes = [name for name in STUB_MEMBERS if name.startswith("LLM_")]
    assert len({getattr(_native, name) for name in codes}) == len(codes) == 18
    assert [_native.status_name(getattr(_native, name)) for name in codes] == codes
    assert _native.status_name(1) == "LLM_UNKNOWN"


@pytest.mark.parametrize("name", ["LinkReport", "HugePagesReport", "Completion", "EndedLease", "ChannelAnswer"])
def test_results_are_named_tuples(name: str) -> None:
    result = getattr(_native, name)
    fields = [member for member in _members(STUB_CLASSES[name].body) if not member.startswith("_")]
    assert list(result._fields) == fields
    assert result.__module__ == _native.__name__


def _exports(library: Path) -> set[str]:
    """Demangled names that other libraries of the process could bind to."""
    listing = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return {line.split(maxsplit=2)[2] for line in listing.splitlines()}


def test_extension_exports_nothing_of_the_engine() -> None:
    assert _exports(Path(_native.__file__)) == {"PyInit__native"}


def test_library_exports_the_public_functions_and_nothing_else() -> None:
    exports = _exports(PACKAGE / "lib" / "libllm_datadist.so")
    methods = {name.split("(")[0] for name in exports}
    assert methods == {
        f"llm_datadist::{name}"
        for name in (
            "GetLastErrorText",
            "GetStatusName",
            "QueryLink",
            "QueryListenPort",
            "WaitForHugePages",
            *(
                f"LlmDataDist::{method}"
                for method in (
                    "LlmDataDist",
                    "~LlmDataDist",
                    "Initialize",
                    "Finalize",
                    "SetRole",
                    "LinkLlmClusters",
                    "UnlinkLlmClusters",
                    "AllocateCache",
                    "DeallocateCache",
                    "PullKvCache",
                    "PullKvBlocks",
                    "CopyKvCache",
                    "CopyKvBlocks",
                    "PushKvCache",
                    "PushKvBlocks",
                    "RegisterKvCache",
                    "UnregisterKvCache",
                )
            ),
        )
    }


def test_public_headers_are_installed() -> None:
    headers = {path.name for path in (PACKAGE / "include" / "llm_datadist").iterdir()}
    assert headers == {"ge_types.h", "llm_datadist.h", "llm_datadist_ext.h"}
    assert [path.name for path in (PACKAGE / "include" / "ge").iterdir()] == ["llm_error_codes.h"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, vllm_datadist_connector as p\n"
        "loaded = {'vllm', 'torch', 'vllm_datadist_connector._native'} & set(sys.modules)\n"
        "print(p.__version__, sorted(loaded))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split(maxsplit=1) == [vllm_datadist_connector.__version__, "[]\n"]
