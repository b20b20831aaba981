"""KV caches as vllm-ascend hands them over: K and V, latents, and states each in tensors of their own.

One level below end to end: there is no Ascend device, and vllm-ascend does not install without its toolkit. Shapes are
those of its model runner; the specs are vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.vllm_caches import NUM_BLOCKS, Heads, Layer, Side, States, Tables, check_transfer, start
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import PLAIN

TOKENS = 75
PARALLEL = {
    "1 > 2": ({}, {"tp": 2}),
    "2 > 1": ({"tp": 2}, {}),
    "2 > 2": ({"tp": 2}, {"tp": 2}),
    "PP 2 > TP 2": ({"pp": 2}, {"tp": 2}),
}
parallel = pytest.mark.parametrize(("p_ranks", "d_ranks"), PARALLEL.values(), ids=PARALLEL.keys())


@pytest.fixture(autouse=True)
def platform_that_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "kv_packing", lambda *_: PLAIN)


def allocate(
    side: Side, specs: Mapping[str, KVCacheSpec], widths: tuple[int, ...], scale: int = 1, shared: bool = False
) -> dict[str, Any]:
    """`widths`: content of each part, per head. `scale`: kernel blocks in a block. `shared`: every second layer has the
    memory of the one before."""
    del side
    caches: dict[str, Any] = {}
    for index, (name, spec) in enumerate(specs.items()):
        if shared and index % 2:
            caches[name] = list(caches.values())[-1]
        elif isinstance(spec, MambaSpec):
            caches[name] = [
                torch.zeros(NUM_BLOCKS, *shape, dtype=dtype)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            ]
        else:
            assert isinstance(spec, FullAttentionSpec)
            shape = (NUM_BLOCKS * scale, spec.block_size // scale, spec.num_kv_heads)
            caches[name] = tuple(torch.zeros(*shape, width, dtype=spec.dtype) for width in widths)
    return caches


def full(heads: int, block_size: int) -> KVCacheSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=8, dtype=torch.bfloat16)


def latent(heads: int, block_size: int) -> KVCacheSpec:
    assert heads == 1
    return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


def model(make_spec: Any, heads: int, layers: int = 3) -> list[Layer]:
    return [Heads(f"model.layers.{i}.attn", 0, heads, make_spec) for i in range(layers)]


def check(layers: list[Layer], p: Side, d: Side, states: tuple[int, ...] = ()) -> int:
    return check_transfer(layers, p, d, Tables.of(p, d, states, TOKENS, {}))


ATTENTIONS: dict[str, tuple[list[Layer], tuple[int, ...]]] = {
    "K, V": (model(full, 4), (8, 8)),
    "latent, rope": (model(latent, 1), (512, 64)),
    "latent, rope, index": (model(latent, 1), (512, 64, 128)),
}
attentions = pytest.mark.parametrize(("layers", "widths"), ATTENTIONS.values(), ids=ATTENTIONS.keys())


@attentions
@parallel
@pytest.mark.parametrize("scale", [1, 2])
def test_parts(
    layers: list[Layer], widths: tuple[int, ...], p_ranks: dict[str, int], d_ranks: dict[str, int], scale: int
) -> None:
    side = Side((16,), allocate=partial(allocate, widths=widths, scale=scale))
    check(layers, replace(side, **p_ranks), replace(side, **d_ranks))


@attentions
@pytest.mark.parametrize(("p_scale", "d_scale"), [(4, 1), (1, 4), (2, 4)])
def test_kernel_blocks_on_either_side(layers: list[Layer], widths: tuple[int, ...], p_scale: int, d_scale: int) -> None:
    p, d = (Side((128,), allocate=partial(allocate, widths=widths, scale=scale)) for scale in (p_scale, d_scale))
    check_transfer(layers, p, replace(d, tp=2), Tables.of(p, d, (), 300, {}))


@attentions
def test_blocks_of_other_sizes(layers: list[Layer], widths: tuple[int, ...]) -> None:
    allocation = partial(allocate, widths=widths)
    check(layers, Side((64,), allocate=allocation), Side((16,), tp=2, allocate=allocation))


@attentions
def test_as_many_tokens_as_heads(layers: list[Layer], widths: tuple[int, ...]) -> None:
    """Only the order of dimensions tells which are which."""
    heads = 16 if widths == (8, 8) else 1
    many = [replace(layer, heads=heads) for layer in layers if isinstance(layer, Heads)]
    side = Side((16,), allocate=partial(allocate, widths=widths))
    check([*many], side, replace(side, tp=2))


@attentions
def test_layers_that_share_memory_move_once(layers: list[Layer], widths: tuple[int, ...]) -> None:
    """Otherwise a byte would be written twice, which check_transfer() does not allow."""
    side = Side((16,), allocate=partial(allocate, widths=widths, shared=True))
    (rank,) = start(layers, side)
    told = [name for spec in rank.model.specs for name in spec.layout.layers]
    assert sorted(told) == [f"model.layers.{i}.attn:{part}" for i in (0, 2) for part in range(len(widths))]


STATES = States(
    "", 1, MambaAttentionBackendEnum.GDN_ATTN, (("Q", 16, False), ("K", 16, False), ("V", 32, False)), (8, 4, 4)
)


@parallel
@pytest.mark.parametrize("first", [False, True], ids=["SD", "DS"])
def test_states_in_a_tensor_each(
    monkeypatch: pytest.MonkeyPatch, first: bool, p_ranks: dict[str, int], d_ranks: dict[str, int]
) -> None:
    monkeypatch.setattr(compat, "is_conv_state_dim_first", lambda: first)
    layers: list[Layer] = [
        Heads(f"layers.{i}", 0, 4, full) if i % 2 else replace(STATES, name=f"layers.{i}", channels_first=first)
        for i in range(4)
    ]
    side = Side((16, 512), allocate=partial(allocate, widths=(8, 8)))
    check(layers, replace(side, **p_ranks), replace(side, **d_ranks), states=(1,))


def test_states_that_share_a_page() -> None:
    """vllm-ascend cuts one allocation into the parts of each state; blocks of a part then lie a page apart."""

    def pages(side: Side, specs: Mapping[str, KVCacheSpec]) -> dict[str, Any]:
        del side
        caches: dict[str, Any] = {}
        for name, spec in specs.items():
            assert isinstance(spec, MambaSpec)
            raw, parts, at = torch.zeros(NUM_BLOCKS, 4096, dtype=torch.uint8), [], 0
            for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
                size = math.prod(shape) * dtype.itemsize
                parts.append(raw[:, at : at + size].view(dtype).unflatten(1, shape))
                at += size
            caches[name] = parts
        return caches

    layers = [replace(STATES, name=f"layers.{i}", group=0) for i in range(2)]
    side = Side((512,), allocate=pages)
    assert check_transfer(layers, replace(side, tp=2), side, Tables.of(side, side, (0,), TOKENS, {})) == 2
