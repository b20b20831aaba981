"""Registration plans: how many regions a model takes, and what is done where they do not suffice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.ascend_layouts import NUM_BLOCKS, Memory

from vllm_datadist_connector.worker.granules import granules_of
from vllm_datadist_connector.worker.kv_layout import CacheSpec, LayoutError, describe_caches
from vllm_datadist_connector.worker.registrations import Plan, plan_registrations

LIMIT = 256


def specs_of(model: str) -> list[CacheSpec]:
    memory = Memory(model, seed=1)
    return describe_caches(memory.tensors, memory.layers(), NUM_BLOCKS)


def with_layers(specs: list[CacheSpec], layers: int) -> list[CacheSpec]:
    """The caches of so many such layers, each in storages of its own: of addresses only the sums matter here."""
    made = []
    for spec in specs:
        first = [spec.addrs[0] + (i << 40) for i in range(layers)]
        storages = [spec.storages[0] + (i << 40) for i in range(layers)]
        made.append(replace(spec, addrs=tuple(first), storages=tuple(storages)))
    return made


def regions(plan: Plan) -> int:
    return len({region for views in plan for view in views for region in view.registration.regions})


@pytest.mark.parametrize(
    ("model", "layers", "count"),
    [("mla", 62, 124), ("sparse", 62, 186), ("sparse C8 index", 62, 248), ("sparse C8 index", 80, 240)],
)
def test_regions_of_models(model: str, layers: int, count: int) -> None:
    """Of the last one 320 by themselves."""
    assert regions(plan_registrations(with_layers(specs_of(model), layers), LIMIT)) == count


def test_views_of_a_cache_are_one_region_for_each_tensor() -> None:
    for model in ("dense", "mla", "GDN hybrid", "DeepSeek V4"):
        specs = specs_of(model)
        for spec, views in zip(specs, plan_registrations(specs), strict=True):
            assert [view.registration.granule for view in views] == granules_of(spec.layout)
            assert len({region for view in views for region in view.registration.regions}) == len(spec.addrs)


def test_layers_of_several_groups_in_one_memory_share_their_regions() -> None:
    """Of the hybrid K, and the state of the other group, begin at one address and are as long."""
    specs = specs_of("GDN hybrid")
    addresses = sum(len(spec.addrs) for spec in specs)
    assert (addresses, regions(plan_registrations(specs))) == (8, 6)


def test_too_many_are_refused_with_what_to_do() -> None:
    told = (
        "^344 KV cache tensors in 344 regions, 258 with neighbours registered as one; this provider registers at most"
        r" 256: .*--pipeline-parallel-size"
    )
    with pytest.raises(LayoutError, match=told):
        plan_registrations(with_layers(specs_of("sparse C8 index"), 86), LIMIT)
    with pytest.raises(LayoutError, match=r"^258 KV cache tensors in 258 regions, 258 with neighbours"):
        plan_registrations(with_layers(specs_of("mla"), 129), LIMIT)


def test_only_what_is_needed_is_registered_as_one() -> None:
    specs = specs_of("sparse C8 index")
    plan = plan_registrations(specs, 12)
    assert all(view.first == 0 for views in plan for view in views)
    index, scales = plan_registrations(specs, 11)[2:]
    assert [view.registration for view in index] == [view.registration for view in scales]
    assert (index[0].first, scales[0].first) == (0, NUM_BLOCKS * 16384 // 256)


def test_neighbours_by_chance_are_not_registered_as_one() -> None:
    """A region over two allocations would be refused, or worse."""
    specs = specs_of("sparse C8 index")
    apart = [*specs[:3], replace(specs[3], storages=tuple(each + 1 for each in specs[3].storages))]
    with pytest.raises(LayoutError):
        plan_registrations(apart, 11)
    far = [*specs[:3], replace(specs[3], addrs=tuple(each + 4098 for each in specs[3].addrs))]
    with pytest.raises(LayoutError):
        plan_registrations(far, 11)


def test_chunks_of_tokens_before_heads_are_one_block() -> None:
    """As 16384 rows of 256 bytes they would take milliseconds to list."""
    layout = specs_of("dense")[0].layout
    rows = layout.segments[0].count * layout.segments[0].row_bytes
    assert {64 * rows, 32 * rows, 16 * rows} <= set(granules_of(layout))
    assert torch.bfloat16.itemsize * 2 * 64 == rows
