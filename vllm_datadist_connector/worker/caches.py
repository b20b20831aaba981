"""RegisteredCaches: this rank's KV cache as the engine knows it, in whatever block sizes transfers need.

One memory, several registrations: PullKvBlocks moves whole blocks of equal size on both sides, so what is less than a
block of vLLM's is addressed through a *view*, the same tensors registered as blocks of a finer granule.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import CacheLayout, View
from vllm_datadist_connector.worker.kv_layout import CacheSpec
from vllm_datadist_connector.worker.pairing import granules_of
from vllm_datadist_connector.worker.plan import BlockPull

_DT_UINT8 = 4


class EngineError(RuntimeError):
    """The engine refused; carries its code's name and reason."""


def check(status: int, what: str) -> None:
    """Raises EngineError unless `status` is LLM_SUCCESS."""
    if status != _native.LLM_SUCCESS:
        raise EngineError(f"{what}: {_native.status_name(status)} (0x{status:08X}): {_native.last_error()}")


class RegisteredCaches:
    """Registers views and keeps them. Used at start-up, then by the driver thread alone, but for copy()."""

    def __init__(self, datadist: _native.LlmDataDist, specs: Sequence[CacheSpec]) -> None:
        self._datadist = datadist
        self._specs = tuple(specs)
        self._views: dict[tuple[int, int], int] = {}

    def view(self, index: int, granule: int) -> int:
        """Cache id of cache `index` in blocks of `granule` bytes; the granule divides the distance of its blocks.

        Raises:
            EngineError: the engine refused the registration.
        """
        known = self._views.get((index, granule))
        if known is not None:
            return known
        spec = self._specs[index]
        layout = spec.layout
        length = (layout.num_blocks - 1) * layout.block_stride + layout.block_bytes
        shape = [length // granule, granule]
        status, cache_id = self._datadist.register_kv_cache(shape, _DT_UINT8, list(spec.addrs))
        check(status, f"RegisterKvCache of {len(spec.addrs)} tensors in blocks of {granule} bytes")
        self._views[index, granule] = cache_id
        return cache_id

    def copy(self, pull: BlockPull, deadline: float) -> bool:
        """Carries out a planned pull from our own blocks, in any thread; PullKvBlocks refuses the own cluster.

        Returns False if it was given up at the deadline, in time.monotonic().
        """
        src, dst = pull.src_blocks, pull.dst_blocks
        starts = np.flatnonzero(np.concatenate(([True], (np.diff(src) != 1) | (np.diff(dst) != 1))))
        lengths = np.diff(np.append(starts, len(src)))
        runs = (np.stack((src[starts], dst[starts], lengths), axis=1) * pull.granule).tolist()
        for addr in self._specs[pull.dst_index].addrs[pull.dst_layers[0] : pull.dst_layers[1] + 1]:
            if time.monotonic() >= deadline:
                return False
            for src_offset, dst_offset, length in runs:
                # Lets other threads run meanwhile, unlike an assignment of numpy's.
                ctypes.memmove(addr + dst_offset, addr + src_offset, length)
        return True

    def layouts(self) -> tuple[CacheLayout, ...]:
        """What peers are told, with a view of every granule that a pull between us and one of usual shape may need.

        These are registered here, at start-up: a first request is not to wait for it.

        Raises:
            EngineError: the engine refused a registration.
        """
        return tuple(self._with_views(index) for index in range(len(self._specs)))

    def _with_views(self, index: int) -> CacheLayout:
        layout = self._specs[index].layout
        views = tuple(View(granule=g, cache_id=self.view(index, g)) for g in granules_of(layout))
        return msgspec.structs.replace(layout, views=views)
