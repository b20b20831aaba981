"""Registration plan: which memory is registered in blocks of how many bytes, settled before anybody can link.

    cache ──> views, the coarsest first: whole blocks, chunks of tokens, shards, rows
              all of one (address, size) per tensor, which a library registers once

Where the regions of a provider do not suffice, caches whose tensors lie behind one another in the same storages (an
index and its scales) are registered as one, in blocks that divide both. Pure: no engine, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from vllm_datadist_connector.worker.granules import granules_of
from vllm_datadist_connector.worker.kv_layout import CacheSpec, LayoutError

MAX_GAP_BYTES = 4096
"""Between two tensors of a storage that are registered as one: alignment, and not somebody else's memory."""


class Registration(NamedTuple):
    addrs: tuple[int, ...]
    num_blocks: int
    granule: int

    @property
    def regions(self) -> set[tuple[int, int]]:
        return {(addr, self.num_blocks * self.granule) for addr in self.addrs}


class PlannedView(NamedTuple):
    registration: Registration
    first: int
    """The block of the registration at which the cache begins."""


Plan: TypeAlias = tuple[tuple[PlannedView, ...], ...]
"""The views of each cache, the coarsest first."""


def plan_registrations(specs: Sequence[CacheSpec], max_regions: int = 0) -> Plan:
    """
    Args:
        max_regions: distinct (address, size) pairs that the provider registers; 0: any number.

    Raises:
        LayoutError: there are more, even with caches of one storage registered together.
    """
    plan = [_views(spec, granules_of(spec.layout)) for spec in specs]
    if not max_regions:
        return tuple(plan)
    separate = _count(plan)
    for first, second in _neighbours(specs):
        before, behind = specs[first], specs[second]
        granule = _common_granule(before, behind)
        if separate > max_regions:
            plan[first], plan[second] = _together(before, behind, granule)
        else:
            # A peer with more layers in a rank may have had to register them as one.
            plan[first], plan[second] = (
                _views(spec, sorted({granule, *granules_of(spec.layout)}, reverse=True)) for spec in (before, behind)
            )
    if (count := _count(plan)) > max_regions:
        tensors = sum(len(spec.addrs) for spec in specs)
        raise LayoutError(
            f"{tensors} KV cache tensors in {separate} regions, {count} with neighbours registered as one; this"
            f" provider registers at most {max_regions}: spread the layers over more ranks (--pipeline-parallel-size)"
        )
    return tuple(plan)


def _views(spec: CacheSpec, granules: Sequence[int]) -> tuple[PlannedView, ...]:
    length = _length(spec)
    return tuple(PlannedView(Registration(spec.addrs, length // granule, granule), 0) for granule in granules)


def _length(spec: CacheSpec) -> int:
    """Of one tensor, without what follows the last block."""
    layout = spec.layout
    return (layout.num_blocks - 1) * layout.block_stride + layout.block_bytes


def _count(plan: Sequence[tuple[PlannedView, ...]]) -> int:
    return len({region for views in plan for view in views for region in view.registration.regions})


def _neighbours(specs: Sequence[CacheSpec]) -> Iterator[tuple[int, int]]:
    """Caches of which each tensor of the second lies behind that of the first; each cache once."""
    taken: set[int] = set()
    for first, before in enumerate(specs):
        for second, behind in enumerate(specs):
            if first == second or taken & {first, second} or before.storages != behind.storages:
                continue
            gaps = {b - a - _length(before) for a, b in zip(before.addrs, behind.addrs, strict=True)}
            if len(gaps) == 1 and 0 <= gaps.pop() <= MAX_GAP_BYTES:
                taken |= {first, second}
                yield first, second


def _common_granule(before: CacheSpec, behind: CacheSpec) -> int:
    offset = behind.addrs[0] - before.addrs[0]
    return math.gcd(offset, granules_of(before.layout)[0], granules_of(behind.layout)[0])


def _together(
    before: CacheSpec, behind: CacheSpec, granule: int
) -> tuple[tuple[PlannedView, ...], tuple[PlannedView, ...]]:
    offset = behind.addrs[0] - before.addrs[0]
    both = Registration(before.addrs, (offset + _length(behind)) // granule, granule)
    return (PlannedView(both, 0),), (PlannedView(both, offset // granule),)
