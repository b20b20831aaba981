"""A CacheManager over a RecordingEngine, and caches that the engine need not know."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.recording_engine import RecordingEngine
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import Cache, CacheDesc, CacheKeyByIdAndIndex, Placement

NONE = 2**64 - 1
INVALID = LLMStatusCode.LLM_PARAM_INVALID
BOTH_POOLS = frozenset(Placement)
DEVICE_DESC = CacheDesc(4, [4, 16], DataType.DT_INT32)
HOST_DESC = CacheDesc(4, [4, 16], DataType.DT_INT32, Placement.HOST)
ADDRS = [16, 32, 48, 64]
ROWS = Cache(7, DEVICE_DESC, ADDRS, is_blocks_cache=False)
BLOCKS = Cache(8, DEVICE_DESC, ADDRS, is_blocks_cache=True)
HOST_ROWS = Cache(9, HOST_DESC, ADDRS, is_blocks_cache=False)
CPU = Cache.create_cpu_cache(HOST_DESC, ADDRS)
BY_ID = CacheKeyByIdAndIndex(3, 9, 2)
Do = Callable[[CacheManager], object]


def manager(
    engine: RecordingEngine, remote_accessible: bool = False, pools: frozenset[Placement] = BOTH_POOLS
) -> CacheManager:
    return CacheManager(engine.native, 1, remote_accessible=remote_accessible, pools=pools)


def refusal(engine: RecordingEngine, do: Do, *, remote_accessible: bool = False) -> LLMException:
    """The exception of a call that must not reach the engine."""
    with pytest.raises(LLMException) as caught:
        do(manager(engine, remote_accessible))
    assert engine.calls == []
    return caught.value
