"""Memory of a party: a pattern that tells every byte's place, and host or device memory that holds it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import random
from typing import Any, Protocol

from vllm_datadist_connector.selftest.work import HostWork, StreamWork, Work

_PERIOD = 65521
"""A prime: two blocks of equal bytes are as many bytes apart, which no two of a test are."""
_PIECE = 1 << 24
"""Bytes that are read or written at once."""
_SEGMENT = 2 << 20
_PROT_NONE = 0


@functools.lru_cache(maxsize=8)
def _period(seed: int) -> bytes:
    text = random.Random(seed).randbytes(_PERIOD)  # noqa: S311 - to compare, no secret
    return text * (_PIECE // _PERIOD + 2)


def pattern(seed: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of the pattern; at most _PIECE of them."""
    start = offset % _PERIOD
    return _period(seed)[start : start + length]


class Memory(Protocol):
    address: int
    size: int

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def begin_work(self, offset: int, length: int, value: int) -> Work:
        """A step in flight that ends with such bytes there."""

    def grow(self) -> None:
        """As much again is allocated and used: where its allocator can, behind this."""


class HostMemory:
    """Freed with the process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._mapped = mmap.mmap(-1, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))

    def read(self, offset: int, length: int) -> bytes:
        return self._mapped[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self._mapped[offset : offset + len(data)] = data

    def begin_work(self, offset: int, length: int, value: int) -> Work:
        return HostWork(self, offset, bytes([value]) * length)

    def grow(self) -> None:
        self._more = mmap.mmap(-1, self.size)
        self._more[:] = b"\1" * self.size


class SegmentedMemory:
    """Host memory as an allocator with expandable segments has it: addresses are reserved, and pages come piece by
    piece. Freed with the process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        reserved = self._libc.mmap(None, 2 * size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if reserved in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.address = int(reserved)
        self._commit(0)

    def _commit(self, start: int) -> None:
        for offset in range(start, start + self.size, _SEGMENT):
            length = min(_SEGMENT, start + self.size - offset)
            if self._libc.mprotect(self.address + offset, length, mmap.PROT_READ | mmap.PROT_WRITE):
                raise OSError(ctypes.get_errno(), "mprotect")
            ctypes.memset(self.address + offset, 1, length)

    def read(self, offset: int, length: int) -> bytes:
        return ctypes.string_at(self.address + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.address + offset, data, len(data))

    def begin_work(self, offset: int, length: int, value: int) -> Work:
        return HostWork(self, offset, bytes([value]) * length)

    def grow(self) -> None:
        self._commit(self.size)


class DeviceMemory:
    """A tensor of torch's, as vLLM's KV cache is one: also what torch's allocator does to it is tested."""

    def __init__(self, size: int, device: str) -> None:
        import torch

        self.size = size
        self._torch: Any = torch
        self._tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        self.address = int(self._tensor.data_ptr())

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._tensor[offset : offset + length].cpu().numpy())

    def write(self, offset: int, data: bytes) -> None:
        source = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        self._tensor[offset : offset + len(data)].copy_(source)
        if self._tensor.device.type != "cpu":
            # The provider's transfers are not ordered with torch's stream.
            getattr(self._torch, self._tensor.device.type).synchronize()

    def begin_work(self, offset: int, length: int, value: int) -> Work:
        if self._tensor.device.type == "cpu":
            return HostWork(self, offset, bytes([value]) * length)
        return StreamWork(self._torch, self._tensor[offset : offset + length], value)

    def grow(self) -> None:
        self._more = self._torch.ones(self.size, dtype=self._torch.uint8, device=self._tensor.device)


def fill(memory: Memory, seed: int) -> None:
    for offset in range(0, memory.size, _PIECE):
        memory.write(offset, pattern(seed, offset, min(_PIECE, memory.size - offset)))


def fill_with(memory: Memory, value: int) -> None:
    for offset in range(0, memory.size, _PIECE):
        memory.write(offset, bytes([value]) * min(_PIECE, memory.size - offset))


def count_other_than(memory: Memory, value: int) -> int:
    """Bytes that are not `value`."""
    wrong = 0
    for offset in range(0, memory.size, _PIECE):
        length = min(_PIECE, memory.size - offset)
        wrong += length - memory.read(offset, length).count(value)
    return wrong


def count_wrong(memory: Memory, seed: int, source_seed: int, moves: list[tuple[int, int, int]]) -> int:
    """Bytes that are not what is left when the moves (source offset, offset here, length) are done, in their order."""
    expected = bytearray()
    for offset in range(0, memory.size, _PIECE):
        expected += pattern(seed, offset, min(_PIECE, memory.size - offset))
    for source, here, length in moves:
        for done in range(0, length, _PIECE):
            size = min(_PIECE, length - done)
            expected[here + done : here + done + size] = pattern(source_seed, source + done, size)
    wrong = 0
    for offset in range(0, memory.size, _PIECE):
        length = min(_PIECE, memory.size - offset)
        ours, theirs = memory.read(offset, length), bytes(expected[offset : offset + length])
        if ours != theirs:
            wrong += sum(a != b for a, b in zip(ours, theirs, strict=True))
    return wrong
