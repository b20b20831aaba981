"""transfer_cache_async writes the right bytes and no other: by address and by key, rows and blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.arenas import OURS, PEER, Arena, link_with_itself, managed, move_rows

from vllm_datadist_connector.llm_datadist.status import LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

TENSORS, ROWS, ROW_BYTES = 8, 5, 40
SUCCESS, INVALID = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_PARAM_INVALID


class Computing(LayerSynchronizer):
    """Each layer's content comes into being only when the task asks whether it is ready."""

    def __init__(self, compute: Callable[[int], None] = lambda _: None) -> None:
        self._compute = compute

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        self._compute(layer_index)
        return True


@contextmanager
def manager(transport: str, remote_accessible: bool) -> Iterator[tuple[CacheManager, Callable[[], object]]]:
    """A manager, and what links it once its caches are registered."""
    options = {"datadist.Transport": transport, "llm.EnableRemoteCacheAccessible": "1" if remote_accessible else "0"}
    with managed(options) as engine:
        caches = CacheManager(engine, OURS, remote_accessible=remote_accessible, pools=frozenset())
        yield caches, lambda: link_with_itself(engine)
        caches._finalize()


def arena(seed: int, row_bytes: int = ROW_BYTES) -> Arena:
    return Arena(seed, TENSORS, ROWS, row_bytes)


def layer_pairs(src: Sequence[int], dst: Sequence[int]) -> list[tuple[int, int]]:
    return [(2 * s + k, 2 * d + k) for s, d in zip(src, dst, strict=True) for k in range(2)]


def test_rows_to_addresses(transport: str) -> None:
    with manager(transport, False) as (caches, link):
        src, dst = arena(1), arena(2)
        src_cache = caches.register_cache(src.desc(), src.addrs)
        caches.register_cache(dst.desc(), dst.addrs)
        link()
        # Row 3 of the destination, layers 1 and 2 to 0 and 1; row 1 of it, all layers.
        configs = [
            TransferConfig(PEER, [addr + 3 * ROW_BYTES for addr in dst.addrs[:4]], range(1, 3), 4),
            TransferConfig(PEER, [addr + 1 * ROW_BYTES for addr in dst.addrs]),
        ]
        expected = dst.copy()

        def compute(layer: int) -> None:
            for tensor in (2 * layer, 2 * layer + 1):
                src[tensor][:] = arena(3)[tensor]

        task = caches.transfer_cache_async(src_cache, Computing(compute), configs)
        assert task.get_results(60_000) == [SUCCESS, SUCCESS]
        move_rows(arena(3), expected, layer_pairs([1, 2], [0, 1]), [(4, 3)])
        move_rows(arena(3), expected, layer_pairs(range(4), range(4)), [(0, 1)])
        assert dst == expected
        assert src == arena_like(arena(3), arena(1))


def arena_like(content: Arena, guards: Arena) -> Arena:
    """The rows of one arena between the guards of another."""
    for tensor in range(TENSORS):
        guards[tensor][:] = content[tensor]
    return guards


def test_blocks_to_addresses(transport: str) -> None:
    with manager(transport, False) as (caches, link):
        src, dst = arena(1), arena(2)
        src_cache = caches.register_blocks_cache(src.desc(), src.addrs)
        caches.register_blocks_cache(dst.desc(), dst.addrs)
        link()
        expected = dst.copy()
        configs = [TransferConfig(PEER, dst.addrs[2:6], range(2))]
        task = caches.transfer_cache_async(src_cache, Computing(), configs, [0, 1, 4], [2, 3, 0])
        assert task.synchronize(60_000) == SUCCESS
        move_rows(src, expected, layer_pairs([0, 1], [1, 2]), [(0, 2), (1, 3), (4, 0)])
        assert (src, dst) == (arena(1), expected)


@pytest.mark.parametrize("remote_accessible", [False, True])
@pytest.mark.parametrize(("block_bytes", "dst_blocks"), [(16, [4, 0, 2]), (16, [3, 1]), (20, [2, 3])])
def test_a_row_to_blocks(transport: str, remote_accessible: bool, block_bytes: int, dst_blocks: list[int]) -> None:
    with manager(transport, remote_accessible) as (caches, link):
        src, dst = arena(1), arena(2, block_bytes)
        src_cache = caches.register_cache(src.desc(), src.addrs)
        caches.register_blocks_cache(dst.desc(), dst.addrs, BlocksCacheKey(OURS, 3))
        link()
        expected = dst.copy()
        config = (
            TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(PEER, src_cache.cache_id + 1), range(2, 4), range(2), 3)
            if remote_accessible
            else TransferConfig(PEER, dst.addrs[:4], range(2, 4), 3)
        )
        task = caches.transfer_cache_async(src_cache, Computing(), [config], None, dst_blocks, block_bytes)
        assert task.synchronize(60_000) == SUCCESS
        for src_tensor, dst_tensor in layer_pairs([2, 3], [0, 1]):
            for piece, block in enumerate(dst_blocks):
                data = src[src_tensor][3, piece * block_bytes : (piece + 1) * block_bytes]
                expected[dst_tensor][block, : len(data)] = data
        assert (src, dst) == (arena(1), expected)


def test_to_caches_by_key(transport: str) -> None:
    with manager(transport, True) as (caches, link):
        src, dst, src_blocks, dst_blocks = (arena(seed) for seed in range(4))
        src_cache = caches.register_cache(src.desc(), src.addrs)
        dst_id = caches.register_cache(dst.desc(), dst.addrs).cache_id
        src_blocks_cache = caches.register_blocks_cache(src_blocks.desc(), src_blocks.addrs)
        caches.register_blocks_cache(dst_blocks.desc(), dst_blocks.addrs, BlocksCacheKey(OURS, 3))
        link()
        rows, blocks = dst.copy(), dst_blocks.copy()
        config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(PEER, dst_id, 2), range(1, 3), range(2, 4), 4)
        assert caches.transfer_cache_async(src_cache, Computing(), [config]).synchronize(60_000) == SUCCESS
        move_rows(src, rows, layer_pairs([1, 2], [2, 3]), [(4, 2)])
        keyed = TransferWithCacheKeyConfig(BlocksCacheKey(PEER, 3), range(3, 4), range(1))
        task = caches.transfer_cache_async(src_blocks_cache, Computing(), [keyed], [3, 1], [0, 4])
        assert task.synchronize(60_000) == SUCCESS
        move_rows(src_blocks, blocks, layer_pairs([3], [0]), [(3, 0), (1, 4)])
        assert (src, dst, src_blocks, dst_blocks) == (arena(0), rows, arena(2), blocks)


def test_what_does_not_fit_writes_nothing(transport: str) -> None:
    """Addresses beside the peer's caches are its own business: it never writes there."""
    with manager(transport, False) as (caches, link):
        src, dst, foreign = arena(1), arena(2), arena(3)
        src_cache = caches.register_cache(src.desc(), src.addrs)
        caches.register_cache(dst.desc(), dst.addrs)
        link()
        last_row = (ROWS - 1) * ROW_BYTES
        wrong = [
            TransferConfig(PEER, foreign.addrs[:2], range(1)),
            TransferConfig(PEER, [addr + last_row + 1 for addr in dst.addrs[:2]], range(1)),
            TransferConfig(PEER, [addr - 1 for addr in dst.addrs[:2]], range(1)),
            TransferConfig(PEER, [0, 0], range(1)),
            TransferConfig(PEER, dst.addrs[:2], range(1), ROWS),
        ]
        for config in wrong:
            assert caches.transfer_cache_async(src_cache, Computing(), [config]).get_results(60_000) == [INVALID]
        for dst_blocks, size in (([0, 1, 2], 20), ([ROWS], ROW_BYTES - 1), ([0], 2**64 - 1)):
            config = TransferConfig(PEER, dst.addrs[:2], range(1))
            task = caches.transfer_cache_async(src_cache, Computing(), [config], None, dst_blocks, size)
            assert task.get_results(60_000) == [INVALID], (dst_blocks, size)
        unlinked = TransferConfig(3, dst.addrs[:2], range(1))
        task = caches.transfer_cache_async(src_cache, Computing(), [unlinked])
        assert task.synchronize(60_000) == LLMStatusCode.LLM_NOT_YET_LINK
        assert (src, dst, foreign) == (arena(1), arena(2), arena(3))


EXITS_WITH_A_RUNNING_TASK = """
import atexit, sys, threading
import numpy as np

src, dst = np.arange(40, dtype=np.uint8).reshape(4, 10), np.zeros((4, 10), np.uint8)
atexit.register(lambda: print("copied" if (src == dst).all() else "not copied"))  # runs after the package's own

from vllm_datadist_connector.llm_datadist import *

class Held(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        return bool(sys.stdin.readline())

datadist = LLMDataDist(LLMRole.MIX, 1)
datadist.init({"llm.EnableCacheManager": "1", "ge.exec.deviceId": "0"})
desc = CacheDesc(4, [1, 10], DataType.DT_UINT8)
cache = datadist.cache_manager.register_cache(desc, [row.ctypes.data for row in src])
datadist.cache_manager.register_cache(desc, [row.ctypes.data for row in dst])
comm = datadist.link("exit", {1: 0, 2: 1}, "{}")
while datadist.query_register_mem_status(comm) == RegisterMemStatus.PREPARING:
    threading.Event().wait(0.002)
config = TransferConfig(2, [row.ctypes.data for row in dst])
task = datadist.cache_manager.transfer_cache_async(cache, Held(), [config])
print("main thread ends", flush=True)
"""


def test_the_interpreter_waits_for_a_task_and_then_finalizes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", EXITS_WITH_A_RUNNING_TASK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,  # not the repository: its package has no extension
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "main thread ends\n"
        try:
            out, err = process.communicate("layer 0\nlayer 1\n", timeout=300)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "copied\n", "")
