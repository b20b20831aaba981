"""Nothing that builds objects out of bytes, anywhere: pickle is how most engines of this kind were taken over."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vllm_datadist_connector", "tests", "tools", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj", "torch.load", "read_pickle", "unsafe_load"}


def unsafe_in(source: str) -> list[str]:
    """What in a program makes objects, or code, of bytes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if {function, function.rpartition(".")[2]} & UNSAFE_CALLS:
                found.append(f"line {node.lineno}: {function}()")
            if any(each.arg == "allow_pickle" for each in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
        found += [f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cve_2025_32444_and_its_copies_nothing_loads_objects(path: Path) -> None:
    """Tests and tools too: that is where the next copy comes from."""
    assert unsafe_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import a, marshal as b",
        "def f(s):\n    return s.recv_pyobj()",
        "import torch\ntorch.load(p)",
        "eval(text)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import pandas\npandas.read_pickle(p)",
    ],
)
def test_the_search_finds_each_way(source: str) -> None:
    assert unsafe_in(source)
