"""Registered memory as a whole, apart from the caches in it."""

from __future__ import annotations

from enum import Enum

from vllm_datadist_connector.llm_datadist.utils.utils import ValueObject, check_isinstance


class Memtype(Enum):
    """Kind of a MemInfo's memory (LLM-DataDist Python: Memtype)."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class RegisterMemStatus(Enum):
    """How far a comm's preparation is (LLM-DataDist Python: RegisterMemStatus)."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class MemInfo(ValueObject):
    """A region for remap_registered_memory (LLM-DataDist Python: MemInfo). `size` in bytes. TypeError."""

    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        check_isinstance("mem_type", mem_type, Memtype, allow_none=False)
        check_isinstance("addr", addr, int, allow_none=False)
        check_isinstance("size", size, int, allow_none=False)
        self._mem_type = mem_type
        self._addr = addr
        self._size = size

    @property
    def mem_type(self) -> Memtype:
        return self._mem_type

    @property
    def addr(self) -> int:
        return self._addr

    @property
    def size(self) -> int:
        return self._size

    def _fields(self) -> tuple[object, ...]:
        return self._mem_type, self._addr, self._size

    def __repr__(self) -> str:
        return f"MemInfo({self._mem_type}, addr={self._addr:#x}, size={self._size})"
