"""What a rank does when vLLM hands over its KV cache, by what its provider can do."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from support.ascend_layouts import NUM_BLOCKS, Memory
from support.pd import make_contract
from support.providers import ENGINE
from support.providers import HARDWARE as NPU

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import parse_config
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.protocol.handshake import RankGeometry, decode_geometry
from vllm_datadist_connector.worker.caches import EngineError, RegisteredCaches
from vllm_datadist_connector.worker.kv_layout import LayoutError, describe_caches
from vllm_datadist_connector.worker.plan import BlockPull
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

HARDWARE = NPU._replace(peer_drops_half=True)
"""Without the thread that ends P's halves of links: that needs an endpoint with native calls."""


PULLED = ENGINE._replace(grants_writes=False)
"""Without the driver of a P that pushes: that needs one as well."""


class Provider:
    """Notes what it is asked for, in order."""

    cluster_id = 7

    def __init__(self, capabilities: _native.Capabilities) -> None:
        self.capabilities = capabilities
        self.calls: list[tuple[Any, ...]] = []

    def initialize(self, options: dict[str, str]) -> int:
        self.calls.append(("initialize", options))
        return _native.LLM_SUCCESS

    def enter_thread(self) -> int:
        self.calls.append(("enter_thread",))
        return _native.LLM_SUCCESS

    def register_kv_cache(self, *arguments: Any) -> tuple[int, int]:
        self.calls.append(("register", *arguments))
        return _native.LLM_SUCCESS, len(self.calls)

    def listen_port(self) -> tuple[int, int]:
        return _native.LLM_SUCCESS, 4711

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


def start(capabilities: _native.Capabilities, model: str = "sparse C8 index", **extra: Any) -> tuple[Provider, Any]:
    memory, provider = Memory(model, seed=1), Provider(capabilities)
    worker = ConnectorWorker(
        parse_config({"huge_pages": False} | extra),
        cast("_native.LlmDataDist", provider),
        make_contract(),
        RankPlace(1, 0, 2, 1, 1),
        memory.layers(),
        memory.block_sizes,
        duties=Duties(gives=True, takes=False),
    )
    try:
        worker.register_kv_caches(memory.tensors, NUM_BLOCKS)
    except LayoutError as error:
        return provider, error
    encoded = worker.handshake()
    assert encoded is not None
    return provider, decode_geometry(encoded)


def test_every_view_is_registered_before_anybody_can_know_of_us() -> None:
    provider, geometry = start(HARDWARE)
    assert provider.names()[:3] == ["initialize", "enter_thread", "register"]
    assert isinstance(geometry, RankGeometry)
    assert geometry.port == 4711
    assert provider.names().count("register") == sum(len(cache.views) for cache in geometry.caches)


@pytest.mark.parametrize(("capabilities", "placement"), [(PULLED, 1), (HARDWARE, 0)])
def test_memory_of_the_host_is_called_so_where_a_device_has_other_memory(
    capabilities: _native.Capabilities, placement: int
) -> None:
    provider, _ = start(capabilities)
    assert {call[4] for call in provider.calls if call[0] == "register"} == {placement}


def test_too_many_regions_are_refused_before_the_library_starts() -> None:
    provider, error = start(HARDWARE._replace(max_regions=8))
    assert "this provider registers at most 8" in str(error)
    assert provider.calls == []


def test_an_index_and_its_scales_are_one_registration_if_need_be() -> None:
    provider, geometry = start(HARDWARE._replace(max_regions=9))
    shared = [cache.views[0].cache_id for cache in geometry.caches[2:]]
    assert shared[0] == shared[1]
    assert [cache.views[0].first for cache in geometry.caches[2:]] == [0, NUM_BLOCKS * 16384 // 256]
    assert provider.names().count("register") == sum(len(cache.views) for cache in geometry.caches) - 1


def test_no_more_tensors_in_a_cache_than_the_provider_takes() -> None:
    _, geometry = start(HARDWARE._replace(max_addrs_per_cache=2), "mla")
    assert sorted(len(cache.layers) for cache in geometry.caches) == [1, 1, 2, 2]


def test_a_port_that_the_provider_does_not_tell_is_the_one_it_was_given() -> None:
    _, geometry = start(HARDWARE._replace(reports_port=False), engine_port=9000)
    assert geometry.port == 9001


def test_own_blocks_on_a_device_are_not_copied_by_the_host() -> None:
    """Their addresses are none of its own: it would end the process."""
    memory = Memory("mla", seed=1)
    specs = describe_caches(memory.tensors, memory.layers(), NUM_BLOCKS)
    caches = RegisteredCaches(cast("_native.LlmDataDist", Provider(HARDWARE)), specs, memory_is_host=False)
    blocks = np.array([1], np.int64)
    pull = BlockPull(1, 0, 64, blocks, blocks + 1, (0, 0), (0, 0))
    before = [storage.clone() for storage in memory.storages]
    with pytest.raises(EngineError, match="which are on a device, is not supported"):
        caches.copy(pull, deadline=float("inf"))
    assert all(map(torch.equal, memory.storages, before))
