"""Tests inside vllm-ascend: tests/ascend_vllm.py runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

if importlib.util.find_spec("vllm_ascend") is not None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A plain `pytest` in an environment without vllm-ascend finds nothing here."""
    del collection_path
    return None if importlib.util.find_spec("vllm_ascend") is not None else True
