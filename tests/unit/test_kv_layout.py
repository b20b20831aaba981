"""KV cache tensors to caches, with the shapes that vLLM's CPU backend really hands over."""

from __future__ import annotations

import pytest
import torch

from vllm_datadist_connector.worker.kv_layout import MAX_TENSORS_PER_CACHE, CacheSpec, LayoutError, describe_caches

BLOCKS, HEADS, TOKENS, CONTENT = 6, 2, 16, 32
BLOCK_BYTES = HEADS * TOKENS * CONTENT * 2


def tensor(blocks: int = BLOCKS) -> torch.Tensor:
    return torch.zeros(blocks, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)


def describe(kv_caches: dict[str, torch.Tensor], num_blocks: int = BLOCKS) -> list[CacheSpec]:
    return describe_caches(kv_caches, dict.fromkeys(kv_caches, 0), num_blocks)


def test_layers_in_the_order_of_their_numbers_whatever_the_dict_order() -> None:
    layers = {f"model.layers.{i}.self_attn": tensor() for i in (10, 2, 0)}
    (spec,) = describe(layers)
    assert spec.layers == ("model.layers.0.self_attn", "model.layers.2.self_attn", "model.layers.10.self_attn")
    assert spec.addrs == tuple(layers[name].data_ptr() for name in spec.layers)
    assert (spec.num_blocks, spec.block_bytes) == (BLOCKS, BLOCK_BYTES)
    assert describe(dict(reversed(layers.items()))) == [spec]


def test_several_layers_in_one_storage() -> None:
    both = torch.zeros(2, BLOCKS, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    (spec,) = describe({"layers.0": both[0], "layers.1": both[1]})
    assert spec.addrs == (both.data_ptr(), both.data_ptr() + BLOCKS * BLOCK_BYTES)


def test_shared_layers_once() -> None:
    first = tensor()
    (spec,) = describe({"layers.1": first, "layers.0": tensor(), "layers.7": first})
    assert spec.layers == ("layers.0", "layers.1")


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 3, 2)])
def test_any_order_inside_a_block_that_is_one_run(order: tuple[int, ...]) -> None:
    (spec,) = describe({"layers.0": tensor().permute(order)})
    assert spec.block_bytes == BLOCK_BYTES


def test_dimensions_of_one_may_have_any_stride() -> None:
    view = torch.zeros(BLOCKS, 40, dtype=torch.uint8).as_strided((BLOCKS, 1, 40), (40, 999, 1))
    (spec,) = describe({"layers.0": view})
    assert spec.block_bytes == 40


def test_kernel_blocks_finer_than_the_tables() -> None:
    (spec,) = describe({"layers.0": tensor(BLOCKS * 4)})
    assert (spec.num_blocks, spec.block_bytes) == (BLOCKS, BLOCK_BYTES * 4)


def test_one_cache_per_group_and_block_size() -> None:
    layers = {"layers.0": tensor(), "layers.1": tensor(BLOCKS * 2), "layers.2": tensor(), "layers.3": tensor()}
    specs = describe_caches(layers, {"layers.0": 0, "layers.1": 0, "layers.2": 1, "layers.3": 0}, BLOCKS)
    assert [(spec.group, spec.block_bytes, spec.layers) for spec in specs] == [
        (0, BLOCK_BYTES, ("layers.0", "layers.3")),
        (0, BLOCK_BYTES * 2, ("layers.1",)),
        (1, BLOCK_BYTES, ("layers.2",)),
    ]


def test_more_tensors_than_one_registration_takes() -> None:
    whole = torch.zeros(MAX_TENSORS_PER_CACHE + 1, BLOCKS, 8, dtype=torch.uint8)
    specs = describe({f"layers.{i}": whole[i] for i in range(len(whole))})
    assert [len(spec.addrs) for spec in specs] == [MAX_TENSORS_PER_CACHE, 1]
    assert specs[1].layers == (f"layers.{MAX_TENSORS_PER_CACHE}",)


REFUSED = {
    "blocks apart": tensor(BLOCKS * 2)[::2],
    "hole in a block": tensor()[:, :, :, :16],
    "K and V apart": torch.zeros(2, BLOCKS, 64).transpose(0, 1),
    "tokens shared": torch.zeros(BLOCKS, 64).as_strided((BLOCKS, 2, 32), (64, 0, 1)),
    "not a multiple of the blocks": tensor(BLOCKS + 1),
    "no block": tensor(0),
    "one dimension": torch.zeros(BLOCKS),
    "not on the host": torch.zeros(BLOCKS, 4, device="meta"),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_layer_and_shape(value: torch.Tensor) -> None:
    with pytest.raises(LayoutError, match=r"layer 'layers\.5'.*shape \(\d+"):
        describe({"layers.5": value})


def test_layer_of_no_group() -> None:
    with pytest.raises(LayoutError, match=r"'layers\.0' belongs to no KV cache group"):
        describe_caches({"layers.0": tensor()}, {"layers.1": 0}, BLOCKS)
