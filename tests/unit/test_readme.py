"""The README's tables say what the code says."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vllm_datadist_connector.config import ConnectorConfig, parse_config
from vllm_datadist_connector.metrics import FAMILIES, PREFIX

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """First cell, without its backticks, to second cell of the table under a heading."""
    section = README.partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
    return {name: second.strip() for name, second in rows}


def test_configuration_table_is_the_dataclass() -> None:
    written = {name: json.loads(cell.strip("`")) for name, cell in table("Configuration").items()}
    assert written == msgspec.to_builtins(ConnectorConfig())


def test_metrics_table_is_what_is_exposed() -> None:
    """Under the names that Prometheus has."""
    exposed = {
        PREFIX + name + ("_total" if family.kind == "counter" else ""): family.kind
        + (f", `{family.label.name}`" if family.label is not None else "")
        for name, family in FAMILIES.items()
    }
    assert table("Metrics") == exposed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["kv_connector"] == "DataDistConnector"
    parse_config(config["kv_connector_extra_config"])


def test_configurations_on_command_lines_are_the_shipped_ones() -> None:
    """In full: a file that is not found would start vLLM without any. What is a default anyway may be left out."""
    written = [json.loads(text) for text in re.findall(r"--kv-transfer-config '([^']*)'", README)]
    shipped = [
        json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8")) for name in ("prefill", "decode")
    ]
    for config in shipped:
        assert parse_config(config.pop("kv_connector_extra_config")) == ConnectorConfig()
        assert config in written
    assert all(config in shipped for config in written)
    assert "$(cat" not in README.replace('Do not write `"$(cat prefill.json)"`', "")


def test_the_connector_has_the_name_that_the_readme_gives_to_routers() -> None:
    text = re.search(r'"kv_connector": "(\w+)", "kv_connector_module_path": "([\w.]+)"', README)
    assert text is not None
    assert hasattr(importlib.import_module(text[2]), text[1])


def named_tests() -> list[str]:
    """Test ids in the support matrix, with the shorthand `[id]` for another case of the test before it."""
    section = README.partition("## What it carries\n")[2].partition("\n### ")[0]
    names: list[str] = []
    for token in re.findall(r"`([^`]+)`", section):
        if re.match(r"(e2e|integration|unit)/", token):
            names.append(token)
        elif re.match(r"(\*|\[)", token) and names:
            names.append(names[-1].partition("::")[0] + "::" + (token if token[0] == "*" else f"*{token}"))
    return names


def test_every_row_of_the_support_matrix_names_tests_that_exist() -> None:
    names = named_tests()
    assert len(names) > 25
    files = sorted({name.partition("::")[0] for name in names})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *(f"tests/{file}" for file in files)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300).stdout
    collected = [line.partition("tests/")[2] for line in listed.splitlines() if "::" in line]
    for name in names:
        # `*` stands for anything, brackets for themselves.
        pattern = re.escape(name).replace(r"\*", ".*") + ("" if name.endswith("]") else r"(\[.*|::.*)?")
        assert any(re.fullmatch(pattern, each) or each.startswith(f"{name}::") for each in collected), name
