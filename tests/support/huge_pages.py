"""Memory in small pages, and which memory of this process lies in huge ones, as the kernel says."""

from __future__ import annotations

import math
import mmap
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOWED = _ENABLED.exists() and "[never]" not in _ENABLED.read_text(encoding="ascii")
needs_huge_pages = pytest.mark.skipif(not ALLOWED, reason=f"{_ENABLED} says never")

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def huge_bytes(address: int, length: int) -> int:
    """Bytes in huge pages of the mappings that [address, +length) touches."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if mapping := _MAPPING.match(line):
            inside = int(mapping[1], 16) < address + length and address < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


def in_small_pages(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy in memory that was touched before anybody asked for huge pages; numpy itself asks for its own."""
    memory = mmap.mmap(-1, math.prod(values.shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    copy = np.frombuffer(memory, dtype=np.uint8).reshape(values.shape)
    copy[:] = values
    assert huge_bytes(copy.ctypes.data, copy.nbytes) == 0
    return copy
