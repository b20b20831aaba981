"""What may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_datadist_connector.connector import DataDistConnector

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_datadist_connector"


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it is loaded: what TYPE_CHECKING guards does not count."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


FORBIDDEN = {
    "protocol": {"vllm", "torch", "vllm_datadist_connector.worker", "vllm_datadist_connector.scheduler"},
    "side_channel": {"vllm", "torch", "vllm_datadist_connector.worker", "vllm_datadist_connector.scheduler"},
    "scheduler": {"torch", "vllm_datadist_connector.worker", "vllm_datadist_connector._native"},
    # No torch: tensors are vLLM's business, and looked into in kv_layout.py only, by what they have themselves.
    "worker": {"torch", "vllm_datadist_connector.scheduler", "vllm_datadist_connector.connector"},
    # Run where vLLM may be broken or absent; torch is looked for by the parties of a selftest, if they need it.
    **{
        where: {
            "vllm",
            *(("torch",) if where != "selftest" else ("vllm_datadist_connector.doctor",)),
            *(f"vllm_datadist_connector.{other}" for other in ("compat", "connector", "scheduler")),
            # What these say of a configuration is what a worker would say.
            *(
                f"vllm_datadist_connector.worker.{path.stem}"
                for path in (PACKAGE / "worker").glob("*.py")
                if path.stem not in ("options", "comm_res")
            ),
        }
        for where in ("doctor", "doctor/ascend", "selftest")
    },
    # Both sides' view of vLLM's configuration.
    "kv_groups.py": {"torch", "vllm_datadist_connector.worker", "vllm_datadist_connector.scheduler"},
    **{
        # Pure functions of geometries and block tables.
        f"worker/{name}.py": {
            "vllm",
            "vllm_datadist_connector._native",
            "vllm_datadist_connector.side_channel",
            "vllm_datadist_connector.config",
            *(f"vllm_datadist_connector.worker.{other}" for other in ("driver", "peers", "transfers", "caches")),
        }
        for name in ("granules", "pairing", "plan")
    },
}


@pytest.mark.parametrize("where", FORBIDDEN)
def test_layers(where: str) -> None:
    place = PACKAGE / where
    paths = list(place.glob("*.py")) if place.is_dir() else [place]
    assert paths
    for path in paths:
        for name in imports_of(path):
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN[where]), f"{path}: {name}"


NATIVE_LAYERS = {
    "base": set[str](),
    "memory": {"base"},
    "cache": {"base", "memory"},
    "transfer": {"base", "memory", "cache"},
    "transport": {"base", "memory"},
    "control": {"base", "memory", "cache"},
    "channel": {"base", "control"},
    "link": {"base", "memory", "cache", "control", "transport"},
    "comm": {"base", "control", "link"},
}
"""What a folder of native/src may include of the others; those above the engine's are free."""


@pytest.mark.parametrize("layer", NATIVE_LAYERS)
def test_native_layers(layer: str) -> None:
    paths = sorted((ROOT / "native/src" / layer).rglob("*.[ch]*"))
    assert paths
    for path in paths:
        included = re.findall(r'^#include "(\w+)/', path.read_text(), re.MULTILINE)
        assert set(included) <= NATIVE_LAYERS[layer] | {layer, "llm_datadist"}, path


def test_only_the_registry_knows_the_kinds_of_transport() -> None:
    folders = [path.name for path in (ROOT / "native/src/transport").iterdir() if path.is_dir()]
    kinds = re.compile(rf'#include "transport/({"|".join(folders)})/')
    knowing = {
        str(path.relative_to(ROOT / "native/src"))
        for path in (ROOT / "native/src").rglob("*.[ch]*")
        if kinds.search(path.read_text()) and path.parent.name not in folders
    }
    assert sorted(folders) == ["cma", "local", "tcp"]
    assert knowing == {"transport/registry.cc"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vllm_datadist_connector", ["vllm", "torch", "vllm_datadist_connector._native"]),
        ("vllm_datadist_connector.plugin", ["vllm", "torch", "vllm_datadist_connector._native"]),
        (
            "vllm_datadist_connector.cli",
            ["vllm", "torch", *(f"vllm_datadist_connector.{name}" for name in ("_native", "doctor", "selftest"))],
        ),
        ("vllm_datadist_connector.doctor.command", ["vllm", "torch", "vllm_datadist_connector._native"]),
        ("vllm_datadist_connector.selftest.command", ["vllm", "torch"]),
        ("vllm_datadist_connector.connector", ["vllm_datadist_connector._native", "vllm_datadist_connector.worker"]),
    ],
)
def test_what_an_import_loads(module: str, absent: list[str]) -> None:
    script = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=900)
    assert done.stdout.split() == []


def test_plugin_registers_once_however_often_it_is_called() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_datadist_connector import plugin

    for _ in range(2):
        plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(plugin.NAME) is DataDistConnector
    assert DataDistConnector.__name__ == plugin.NAME


def test_the_name_that_routers_know_means_ours_by_module_path_alone() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    asked = SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path="vllm_datadist_connector.nixl")
    ours = KVConnectorFactory.get_connector_class(asked)
    assert issubclass(ours, DataDistConnector)
    assert ours.__name__ == asked.kv_connector
