"""The README's tables say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from vllm_datadist_connector.config import ConnectorConfig, parse_config
from vllm_datadist_connector.metrics import COUNTERS, GAUGES, HISTOGRAMS

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
    exposed = {
        f"vllm:datadist_{name}": kind
        for kind, names in (("histogram", HISTOGRAMS), ("counter", COUNTERS), ("gauge", GAUGES))
        for name in names
    }
    assert {name: cell.partition(",")[0] for name, cell in table("Metrics").items()} == exposed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configuration_is_valid(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["kv_connector"] == "DataDistConnector"
    parse_config(config["kv_connector_extra_config"])
