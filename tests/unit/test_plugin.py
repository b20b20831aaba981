"""The plugin in every process of a vLLM, whatever that vLLM is: it never raises."""

from __future__ import annotations

import builtins
import os
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.platforms
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_datadist_connector import compat, plugin


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if importing that module failed."""
    real = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == module:
            raise RuntimeError(f"no {module}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.parametrize("module", ["vllm.distributed.kv_transfer.kv_connector.factory", "vllm.platforms"])
def test_a_vllm_that_lacks_something_starts_all_the_same(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM ends with what a plugin raises."""
    monkeypatch.setattr(plugin._logger, "propagate", True)
    monkeypatch.setattr(compat, "share_logging", lambda: None)
    without(monkeypatch, module)
    plugin.register()
    assert f"no {module}" in caplog.text


def test_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By a vLLM that looks at it differently than its registry says."""

    def refuse(*_: str) -> None:
        raise ValueError("Connector 'DataDistConnector' is already registered.")

    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    monkeypatch.setattr(KVConnectorFactory, "register_connector", refuse)
    monkeypatch.setattr(compat, "share_logging", lambda: None)
    plugin.register()
    assert "already registered" in caplog.text


@pytest.mark.parametrize(
    ("device_type", "before", "after"), [("npu", None, "0"), ("npu", "1", "1"), ("cpu", None, None)]
)
def test_what_cann_reads_at_its_start(
    device_type: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        vllm.platforms, "current_platform", SimpleNamespace(device_type=device_type, is_cpu=lambda: False)
    )
    # Set first, so that what the plugin sets goes when the test ends.
    monkeypatch.setenv("AUTO_USE_UC_MEMORY", before or "")
    if before is None:
        monkeypatch.delenv("AUTO_USE_UC_MEMORY")
    plugin.register()
    assert os.environ.get("AUTO_USE_UC_MEMORY") == after
