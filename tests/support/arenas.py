"""Cache memory with canaries, an oracle beside it, and a manager whose peer is itself."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from support.endpoints import check
from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.v2.llm_types import CacheDesc, Placement

Bytes = npt.NDArray[np.uint8]

OURS = 1
PEER = 2
"""Cluster id of the loopback peer: its caches are ours."""

_GUARD = 64
_LINK_DEADLINE_S = 60


class Arena:
    """Random tensors of `rows` rows, guard bytes on both sides. Equal if every byte is, the guards' too."""

    def __init__(self, seed: int, tensors: int = 8, rows: int = 6, row_bytes: int = 40) -> None:
        random = np.random.default_rng(seed)
        self._whole: list[Bytes] = [
            random.integers(0, 256, rows * row_bytes + 2 * _GUARD, dtype=np.uint8) for _ in range(tensors)
        ]
        self._shape = (rows, row_bytes)

    def __getitem__(self, tensor: int) -> Bytes:
        """[row, byte], a view."""
        return self._whole[tensor][_GUARD:-_GUARD].reshape(self._shape)

    def __len__(self) -> int:
        return len(self._whole)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Arena):
            return NotImplemented
        return all(np.array_equal(ours, theirs) for ours, theirs in zip(self._whole, other._whole, strict=True))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def copy(self) -> Arena:
        twin = Arena(0, 0)
        twin._whole = [tensor.copy() for tensor in self._whole]
        twin._shape = self._shape
        return twin

    @property
    def addrs(self) -> list[int]:
        return [self[tensor].ctypes.data for tensor in range(len(self))]

    def desc(self, placement: Placement = Placement.DEVICE) -> CacheDesc:
        return CacheDesc(len(self), self._shape, DataType.DT_UINT8, placement)


def view(addrs: Sequence[int], rows: int, row_bytes: int) -> list[Bytes]:
    """Per address the memory of one tensor, [row, byte]."""
    size = rows * row_bytes
    memories = [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addr)) for addr in addrs]
    return [memory.reshape(rows, row_bytes) for memory in memories]


def move_rows(src: Arena, dst: Arena, pairs: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]) -> None:
    """The oracle: for each (source tensor, destination tensor) whole rows or blocks, in order."""
    for src_tensor, dst_tensor in pairs:
        for src_row, dst_row in rows:
            dst[dst_tensor][dst_row] = src[src_tensor][src_row]


@contextmanager
def managed(options: Mapping[str, str]) -> Iterator[_native.ManagedDataDist]:
    """An engine for OURS, finalized at the end."""
    engine = _native.ManagedDataDist(OURS, 3)
    check(engine.initialize({"llm.DeviceId": "0", "llm.SyncKvCacheWaitTime": "20000"} | dict(options)))
    try:
        yield engine
    finally:
        engine.finalize()


def link_with_itself(engine: _native.ManagedDataDist) -> int:
    """The comm id of a loopback link with PEER that is up. Register remote-accessible caches before."""
    status, comm_id = engine.link_comm("loopback", [(OURS, 0, "", 0), (PEER, 1, "", 0)])
    check(status)
    deadline = time.monotonic() + _LINK_DEADLINE_S
    while True:
        status, state, reason = engine.query_comm(comm_id)
        check(status)
        if state == _native.COMM_OK:
            return comm_id
        if state == _native.COMM_FAILED or time.monotonic() > deadline:
            raise RuntimeError(f"no loopback link: state {state}, {reason}")
        threading.Event().wait(0.002)  # the only way to learn of it is to ask again
