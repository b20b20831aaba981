"""vLLM's plugins, vllm-ascend's and ours, in either order: processes of their own, which load each once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("plugins.py")
THEIRS = "ascend,ascend_kv_connector,ascend_model,ascend_model_loader,ascend_service_profiling"


def load(where: str = "last", only: str = "") -> dict[str, Any]:
    environment = {**os.environ, **({"VLLM_PLUGINS": only} if only else {})}
    environment.pop("AUTO_USE_UC_MEMORY", None)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), where], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def without_us() -> dict[str, Any]:
    return load(only=THEIRS)


@pytest.mark.parametrize(
    ("where", "only"),
    [("first", ""), ("last", ""), ("last", "ascend,ascend_kv_connector,datadist")],
    ids=["ours first", "ours last", "as the documents list them"],
)
def test_nobody_takes_anything_from_the_other(where: str, only: str, without_us: dict[str, Any]) -> None:
    found = load(where, only)
    assert found.pop("ours") == "vllm_datadist_connector.connector"
    assert found["connectors"].pop("DataDistConnector") == ["DataDistConnector", "vllm_datadist_connector.connector"]
    assert found.pop("AUTO_USE_UC_MEMORY") == "0"
    assert without_us["AUTO_USE_UC_MEMORY"] is None
    assert found == {name: value for name, value in without_us.items() if name != "AUTO_USE_UC_MEMORY"}


def test_what_it_is_that_nobody_has_taken(without_us: dict[str, Any]) -> None:
    assert (without_us["platform"], without_us["provider"]) == ("NPUPlatform", "cann")
    theirs = [name for name, origin in without_us["connectors"].items() if any("vllm_ascend." in at for at in origin)]
    assert {"MultiConnector", "MooncakeConnectorV1", "AscendStoreConnector", "RecomputeCPUOffloadConnector"} <= {
        *theirs
    }
    assert without_us["scheduler"][:3] == ["AsyncScheduler", "BalanceScheduler", "Scheduler"]
