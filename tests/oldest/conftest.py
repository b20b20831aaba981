"""Tests that need a vLLM older than the newest: tests/oldest_vllm.py runs them, with the oldest."""

from __future__ import annotations

from pathlib import Path

from vllm_datadist_connector import compat


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A plain `pytest` in the newest environment finds nothing here."""
    del collection_path
    return True if compat.TransferResults is not None else None
