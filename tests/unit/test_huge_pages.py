"""Huge pages under the KV cache: asked for before vLLM writes its zeros, and what the log says of the rest."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engine_config import vllm_config
from support.huge_pages import huge_bytes, needs_huge_pages
from support.vllm_caches import NUM_BLOCKS, Heads, Side, start
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_datadist_connector._native import LLM_FAILED, HugePagesReport
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.first_touch import FirstTouch
from vllm_datadist_connector.worker import build
from vllm_datadist_connector.worker.huge_pages import log_when_done

EDGES = 4 << 20
"""At either end of memory that does not begin and end with a huge page."""


@needs_huge_pages
def test_zeros_lie_in_huge_pages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with FirstTouch():
        zeros = torch.zeros(8 << 20, 2, dtype=torch.float32, device=torch.device("cpu"))
    assert (zeros.shape, zeros.dtype) == ((8 << 20, 2), torch.float32)
    assert not zeros.any()
    assert huge_bytes(zeros.data_ptr(), zeros.nbytes) >= zeros.nbytes - EDGES
    assert "huge pages were asked for before 0.06 GiB were zeroed" in caplog.text


@needs_huge_pages
def test_a_kv_cache_of_vllms_lies_in_huge_pages() -> None:
    def spec(heads: int, block_size: int) -> FullAttentionSpec:
        return FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=128, dtype=torch.float32)

    with FirstTouch():
        (rank,) = start([Heads("layers.0", 0, 8, spec)], Side(block_sizes=(256,)))
    (memory,) = rank.memory()
    assert memory.nbytes == NUM_BLOCKS * 8 * 256 * 2 * 128 * 4
    assert huge_bytes(memory.data_ptr(), memory.nbytes) >= memory.nbytes - EDGES


def test_everything_else_is_torchs_own() -> None:
    with FirstTouch():
        assert torch.zeros(3, device="meta").device.type == "meta"
        assert torch.zeros((2, 0)).shape == (2, 0)
        assert torch.ones(3).sum() == 3
        assert torch.zeros(4, requires_grad=True).requires_grad


class Engine:
    def __init__(self, *report: Any) -> None:
        self._report = report

    def wait_for_huge_pages(self) -> tuple[Any, ...]:
        return self._report


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (
            (0, HugePagesReport(True, 4 << 30, 3 << 30, 1.25)),
            "huge pages under 3.00 of 4.00 GiB in 1.25 s",
        ),
        ((0, HugePagesReport(False, 0, 0, 0.0)), "transparent_hugepage/enabled says never"),
        ((LLM_FAILED, None), ""),
    ],
)
def test_the_log_tells_what_came_of_it(report: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_when_done(Engine(*report)).join()  # type: ignore[arg-type]
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("wanted", [True, False])
def test_vllm_is_told_only_if_they_are_wanted(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """get_mem_pool_context() is vLLM's name for what its allocation of the KV cache is to happen in."""
    monkeypatch.setattr(build, "build_worker", lambda *_: None)
    config = vllm_config("kv_consumer")
    config.kv_transfer_config.kv_connector_extra_config = {"huge_pages": wanted}
    connector = DataDistConnector(config, KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=()))
    assert isinstance(connector.get_mem_pool_context(), FirstTouch) == wanted
