"""Memory to move: one private anonymous mapping per tensor, as torch's CPU allocator gives, and block lists."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
TENSORS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """What one transfer moves: `blocks` of each tensor's `block_bytes`-sized blocks."""

    block_bytes: int
    blocks: int
    scattered: bool
    tensors: int = TENSORS

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.blocks * self.tensors

    def block_lists(self) -> tuple[Ids, Ids]:
        """(source ids, destination ids): equal and ascending, or two independent random permutations."""
        if not self.scattered:
            ids = np.arange(self.blocks, dtype=np.int64)
            return ids, ids
        random = np.random.default_rng(self.block_bytes + self.blocks)
        return random.permutation(self.blocks).astype(np.int64), random.permutation(self.blocks).astype(np.int64)


class Pool:
    """`tensors` regions of `tensor_bytes` each, on huge pages if wanted (as the engine's option HugePages gives)."""

    def __init__(self, tensors: int, tensor_bytes: int, huge_pages: bool) -> None:
        self.tensor_bytes = tensor_bytes
        self._maps = [mmap.mmap(-1, tensor_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(tensors)]
        for mapping in self._maps:
            mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        self.tensors = [np.frombuffer(m, dtype=np.uint8) for m in self._maps]
        self.addrs = [int(tensor.ctypes.data) for tensor in self.tensors]

    def fill(self) -> None:
        """Bytes that differ between places and are the same in every process."""
        for index, tensor in enumerate(self.tensors):
            words = tensor.view(np.uint64)
            words[:] = np.arange(words.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(index)

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor[:] = 0


class Memcpy:
    """Single-thread reference, compiled on the spot."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("memcpy.c")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "memcpy.so"
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
            self._copy = ctypes.CDLL(str(library)).copy_blocks
        self._copy.restype = None

    def bind(self, case: Case, dst: Pool, src: Pool) -> Any:
        """A call without arguments that copies the case's blocks."""
        src_ids, dst_ids = case.block_lists()
        pointers = ctypes.c_void_p * case.tensors
        arguments = (
            pointers(*dst.addrs[: case.tensors]),
            pointers(*src.addrs[: case.tensors]),
            ctypes.c_int64(case.tensors),
            ctypes.c_void_p(dst_ids.ctypes.data),
            ctypes.c_void_p(src_ids.ctypes.data),
            ctypes.c_int64(case.blocks),
            ctypes.c_int64(case.block_bytes),
        )
        copy = self._copy

        def run(_keep_alive: tuple[Ids, Ids] = (src_ids, dst_ids)) -> None:
            copy(*arguments)

        return run


def find_wrong_block(case: Case, dst: Pool, src: Pool) -> str | None:
    """Names the first block whose bytes are not the source's; None if all are."""
    src_ids, dst_ids = case.block_lists()
    used = case.blocks * case.block_bytes
    for index in range(case.tensors):
        got = dst.tensors[index][:used].reshape(case.blocks, case.block_bytes)
        want = src.tensors[index][:used].reshape(case.blocks, case.block_bytes)
        for source, target in zip(src_ids, dst_ids, strict=True):
            if not np.array_equal(got[target], want[source]):
                return f"tensor {index}, block {source} -> {target}"
    return None
