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
from vllm_datadist_connector.worker.plan import BlockPull
from vllm_datadist_connector.worker.registrations import Plan, PlannedView, Registration, plan_registrations

HOST, DEVICE = 0, 1
"""Placements of caches. Our engine, for which vLLM's memory is the device's, has it on the host."""
_DT_UINT8 = 4


class EngineError(RuntimeError):
    """The engine refused; carries its code's name and reason."""


def check(status: int, what: str) -> None:
    """Raises EngineError unless `status` is LLM_SUCCESS."""
    if status != _native.LLM_SUCCESS:
        raise EngineError(f"{what}: {_native.status_name(status)} (0x{status:08X}): {_native.last_error()}")


class RegisteredCaches:
    """Registers views and keeps them. Used at start-up, then by the driver thread alone, but for copy()."""

    def __init__(
        self,
        datadist: _native.LlmDataDist,
        specs: Sequence[CacheSpec],
        plan: Plan | None = None,
        placement: int = DEVICE,
        memory_is_host: bool = True,
    ) -> None:
        """
        Args:
            plan: of the specs, if it was made before; its views are registered by layouts().
        """
        self._datadist = datadist
        self._specs = tuple(specs)
        self._plan = plan_registrations(specs) if plan is None else plan
        self._placement = placement
        self._memory_is_host = memory_is_host
        self._registered: dict[Registration, int] = {}
        self._views: dict[tuple[int, int], int] = {}

    def view(self, index: int, granule: int) -> int:
        """Cache id of cache `index` in blocks of `granule` bytes; the granule divides the distance of its blocks.

        Raises:
            EngineError: the engine refused the registration, or a peer that is linked already would not see it.
        """
        known = self._views.get((index, granule))
        if known is not None:
            return known
        if self._datadist.capabilities.register_before_link:
            raise EngineError(f"cache {index} was not registered in blocks of {granule} bytes before the first link")
        spec = self._specs[index]
        layout = spec.layout
        length = (layout.num_blocks - 1) * layout.block_stride + layout.block_bytes
        self._views[index, granule] = cache_id = self._register(Registration(spec.addrs, length // granule, granule))
        return cache_id

    def _register(self, wanted: Registration) -> int:
        known = self._registered.get(wanted)
        if known is not None:
            return known
        shape = [wanted.num_blocks, wanted.granule]
        status, cache_id = self._datadist.register_kv_cache(shape, _DT_UINT8, list(wanted.addrs), self._placement)
        check(status, f"RegisterKvCache of {len(wanted.addrs)} tensors in blocks of {wanted.granule} bytes")
        self._registered[wanted] = cache_id
        return cache_id

    def copy(self, pull: BlockPull, deadline: float) -> bool:
        """Carries out a planned pull from our own blocks, in any thread; PullKvBlocks refuses the own cluster.

        Returns False if it was given up at the deadline, in time.monotonic().

        Raises:
            EngineError: the memory is a device's, at whose addresses the host has nothing.
        """
        if not self._memory_is_host:
            raise EngineError("a pull from our own blocks, which are on a device, is not supported")
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
        return tuple(self._with_views(index, views) for index, views in enumerate(self._plan))

    def _with_views(self, index: int, planned: Sequence[PlannedView]) -> CacheLayout:
        views = []
        for each in planned:
            granule = each.registration.granule
            self._views[index, granule] = cache_id = self._register(each.registration)
            views.append(View(granule=granule, cache_id=cache_id, first=each.first))
        return msgspec.structs.replace(self._specs[index].layout, views=tuple(views))
