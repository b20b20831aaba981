"""data/ascend_layouts.json is what vllm-ascend allocates: a version that allocates otherwise is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import vllm_ascend.utils
from allocation import record
from shapes import recorded_models
from vllm_ascend.utils import AscendDeviceType

FILE = Path(__file__).parents[1] / "data" / "ascend_layouts.json"


def as_text(recorded: dict[str, Any]) -> str:
    """A layer a line."""
    models = []
    for name, model in recorded.items():
        layers = ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in model["layers"].items())
        models.append(
            f"  {json.dumps(name)}: {{\n"
            f'    "groups": {json.dumps(model["groups"])},\n'
            f'    "storages": {json.dumps(model["storages"])},\n'
            f'    "layers": {{\n{layers}\n    }}\n'
            "  }"
        )
    return "{\n" + ",\n".join(models) + "\n}\n"


def test_what_is_recorded_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {}
    for name, model in recorded_models().items():
        device = AscendDeviceType.A5 if name.endswith("A5") else AscendDeviceType.A2
        monkeypatch.setattr(vllm_ascend.utils, "_ascend_device_type", device)
        recorded[name] = record(model)
    stored = json.loads(FILE.read_text())
    assert recorded.keys() == stored.keys()
    for name, model in recorded.items():
        assert model == stored[name], name
    assert as_text(recorded) == FILE.read_text()
