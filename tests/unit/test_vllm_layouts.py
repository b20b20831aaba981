"""Attention as vLLM 0.32 lays it out for other platforms, from its specs and its allocation to bytes on D.

One level below end to end: the CPU platform serves LBHNC (MLA: LBNHC) of unpadded, unsplit, unquantised pages only, in
an order of its own (test_plan.py); all else takes a device. Here vLLM allocates what it would allocate there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.vllm_caches import Heads, Layer, Side, Tables, check_transfer, start
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import PLAIN
from vllm_datadist_connector.worker.kv_layout import LayoutError
from vllm_datadist_connector.worker.pairing import MismatchError

TOKENS = 75
LAYOUTS = [layout for layout in KVCacheLayout if layout is not KVCacheLayout.LHBNC]
PARALLEL = {
    "1 > 2": ({}, {"tp": 2}),
    "2 > 1": ({"tp": 2}, {}),
    "2 > 2": ({"tp": 2}, {"tp": 2}),
    "1 > 4, copies of heads": ({}, {"tp": 4}),
    "4 > 1, copies of heads": ({"tp": 4}, {}),
    "PP 2 > 1": ({"pp": 2}, {}),
    "1 > PP 2 x TP 2": ({}, {"pp": 2, "tp": 2}),
}
parallel = pytest.mark.parametrize(("p_ranks", "d_ranks"), PARALLEL.values(), ids=PARALLEL.keys())
some_parallel = pytest.mark.parametrize(
    ("p_ranks", "d_ranks"), [({}, {"tp": 2}), ({"tp": 2}, {}), ({"pp": 2}, {"tp": 2})]
)
MakeSpec = Callable[[int, int], KVCacheSpec]


@pytest.fixture(autouse=True)
def platform_that_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "kv_packing", lambda *_: PLAIN)


def full(heads: int, block_size: int, **changes: object) -> FullAttentionSpec:
    values = {"block_size": block_size, "num_kv_heads": heads, "head_size": 8, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(values | changes))


def model(make_spec: MakeSpec = full, heads: int = 2, layers: int = 3) -> list[Layer]:
    return [Heads(f"model.layers.{i}.attn", 0, heads, make_spec) for i in range(layers)]


def check(layers: list[Layer], p: Side, d: Side, windows: dict[int, int] | None = None) -> int:
    return check_transfer(layers, p, d, Tables.of(p, d, (), TOKENS, windows or {}))


BASE = Side(block_sizes=(16,))


@parallel
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts(layout: KVCacheLayout, p_ranks: dict[str, int], d_ranks: dict[str, int]) -> None:
    """Other than LBHNC only with a device: layouts are chosen by the attention backend of a GPU, or packed by models
    that need one."""
    side = replace(BASE, layout=layout)
    check(model(), replace(side, **p_ranks), replace(side, **d_ranks))


@pytest.mark.parametrize("p_layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("d_layout", LAYOUTS, ids=lambda layout: layout.name)
def test_any_layout_to_any_other(p_layout: KVCacheLayout, d_layout: KVCacheLayout) -> None:
    """Two attention backends, of which the CPU platform has one."""
    check(model(), replace(BASE, layout=p_layout), replace(BASE, layout=d_layout, tp=2))


def test_equal_layouts_take_one_call() -> None:
    for layout in LAYOUTS:
        assert check(model(), replace(BASE, layout=layout), replace(BASE, layout=layout)) == 1


def test_heads_outside_of_blocks_are_refused_at_start() -> None:
    """LHBNC, which ROCm's attention may choose: the parts of one block lie farther apart than the blocks."""
    with pytest.raises(LayoutError, match=r"layer 'model\.layers\.0\.attn'.*farther apart than"):
        start(model(), replace(BASE, layout=KVCacheLayout.LHBNC))


@some_parallel
@pytest.mark.parametrize(("p_kernel", "d_kernel"), [(32, 32), (32, None), (None, 32), (64, 32)])
def test_kernel_blocks(
    p_kernel: int | None, d_kernel: int | None, p_ranks: dict[str, int], d_ranks: dict[str, int]
) -> None:
    """Blocks of 128 tokens, which a GPU's kernels split in 4; CPU attention takes a block of any size whole."""
    sides = [
        Side(block_sizes=(128,), kernel_block_sizes=(kernel,) if kernel else None) for kernel in (p_kernel, d_kernel)
    ]
    layers = model(layers=2)
    p, d = replace(sides[0], **p_ranks), replace(sides[1], **d_ranks)
    check_transfer(layers, p, d, Tables.of(p, d, (), 300, {}))


@pytest.mark.parametrize(("p_size", "d_size"), [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_block_sizes(layout: KVCacheLayout, p_size: int, d_size: int) -> None:
    """Together with layouts that the CPU platform does not serve."""
    check(model(), Side((p_size,), layout=layout), Side((d_size,), layout=layout, tp=2))


def fp8(heads: int, block_size: int) -> FullAttentionSpec:
    return full(heads, block_size, dtype=torch.float8_e4m3fn, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)


def fp8_bytes(heads: int, block_size: int) -> FullAttentionSpec:
    return full(heads, block_size, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)


def scaled(mode: KVQuantMode) -> MakeSpec:
    """With each head's scales behind its data, as Triton attention has it."""
    dtype = torch.float8_e4m3fn if mode is KVQuantMode.FP8_PER_TOKEN_HEAD else torch.int8

    def make(heads: int, block_size: int) -> KVCacheSpec:
        return TritonAttentionBackend.customize_spec(full(heads, block_size, dtype=dtype, kv_quant_mode=mode))

    return make


QUANTISED: dict[str, MakeSpec] = {
    "fp8": fp8,
    "fp8 as bytes": fp8_bytes,
    "int8 with scales": scaled(KVQuantMode.INT8_PER_TOKEN_HEAD),
    "fp8 with scales": scaled(KVQuantMode.FP8_PER_TOKEN_HEAD),
    "int4 with scales": scaled(KVQuantMode.INT4_PER_TOKEN_HEAD),
}


@pytest.mark.parametrize("make_spec", QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC], ids=lambda layout: layout.name)
@some_parallel
def test_quantised(
    make_spec: MakeSpec, layout: KVCacheLayout, p_ranks: dict[str, int], d_ranks: dict[str, int]
) -> None:
    """Needs a CPU with AVX-512 or AMX, or (with scales) a GPU."""
    side = replace(BASE, layout=layout)
    check(model(make_spec, layers=2), replace(side, **p_ranks), replace(side, **d_ranks))


def nvfp4(heads: int, block_size: int) -> FullAttentionSpec:
    """As FlashInfer publishes it: K and V in head slots of their own."""
    return full(heads, block_size, dtype=torch.uint8, num_head_slots=2 * heads, state_content_bytes=8)


def test_pages_of_an_unknown_inside_move_whole() -> None:
    """NVFP4 takes a Blackwell GPU."""
    side = replace(BASE, tp=2)
    check(model(nvfp4), side, side)
    with pytest.raises(MismatchError, match=r"total of layer .*: ours 1, theirs 2"):
        check(model(nvfp4), side, BASE)


@pytest.mark.parametrize("heads", [16, 32])
def test_pages_of_an_unknown_inside_are_not_taken_for_others(heads: int) -> None:
    """Here as many tokens as heads, or as many as half of the head slots."""
    check(model(nvfp4, heads), BASE, BASE)
    with pytest.raises(MismatchError, match=r"of layer .*: ours \d+, theirs \d+"):
        check(model(nvfp4, heads), BASE, replace(BASE, tp=2))


def latent(changes: dict[str, object], scales: bool = False) -> MakeSpec:
    values = {"num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16, "max_tp_shards": 1, **changes}

    def make(heads: int, block_size: int) -> KVCacheSpec:
        assert heads == 1
        spec = MLAAttentionSpec(block_size=block_size, **values)
        return MLACommonBackend.customize_spec(spec) if scales else spec

    return make


QUANT_MODE = {"dtype": torch.int8, "kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD}
DS_MLA = {"dtype": torch.uint8, "state_content_bytes": 584, "cache_dtype_str": "fp8_ds_mla"}
LATENTS: dict[str, MakeSpec] = {
    "bfloat16": latent({}),
    "fp8_ds_mla": latent({"dtype": torch.uint8, "state_content_bytes": 656, "cache_dtype_str": "fp8_ds_mla"}),
    "padded pages": latent({"alignment": 576, **DS_MLA}),
    "4 tokens in a state": latent({"tokens_per_state": 4}),
    "4 tokens in a state, padded pages": latent({"tokens_per_state": 4, "alignment": 576, **DS_MLA}),
    "with scales": latent(QUANT_MODE, scales=True),
}


@pytest.mark.parametrize("make_spec", LATENTS.values(), ids=LATENTS.keys())
@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.BLNHC], ids=lambda layout: layout.name)
@some_parallel
def test_latents(make_spec: MakeSpec, layout: KVCacheLayout, p_ranks: dict[str, int], d_ranks: dict[str, int]) -> None:
    """The CPU platform serves MLA in bfloat16 and float32, in unpadded pages and with a state for each token."""
    side = replace(BASE, layout=layout)
    check(model(make_spec, heads=1, layers=2), replace(side, **p_ranks), replace(side, **d_ranks))


@pytest.mark.parametrize("make_spec", LATENTS.values(), ids=LATENTS.keys())
@pytest.mark.parametrize(("p_size", "d_size"), [(64, 16), (16, 64)])
def test_latents_in_blocks_of_other_sizes(make_spec: MakeSpec, p_size: int, d_size: int) -> None:
    """CPU_MLA has blocks of 16 tokens only."""
    check(model(make_spec, heads=1, layers=2), Side((p_size,)), Side((d_size,), tp=2))


def sparse_model() -> list[Layer]:
    """DeepSeek-V3.2's way: latents and an index of another size, in one block table."""
    return [
        Heads("layers.0.attn", 0, 1, latent({})),
        Heads("layers.0.indexer", 0, 1, latent({"head_size": 132, "dtype": torch.uint8})),
        Heads("layers.1.attn", 0, 1, latent({})),
        Heads("layers.1.indexer", 0, 1, latent({"head_size": 132, "dtype": torch.uint8})),
    ]


@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.BLNHC], ids=lambda layout: layout.name)
@some_parallel
def test_unlike_layers_of_a_group(layout: KVCacheLayout, p_ranks: dict[str, int], d_ranks: dict[str, int]) -> None:
    """Sparse attention needs a GPU: a group with a spec for each layer."""
    side = replace(BASE, layout=layout)
    check(sparse_model(), replace(side, **p_ranks), replace(side, **d_ranks))


def window(heads: int, block_size: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=heads, head_size=8, dtype=torch.bfloat16, sliding_window=32
    )


def wide_window(heads: int, block_size: int) -> SlidingWindowSpec:
    """Half the head: blocks of twice the tokens have equal pages, as vLLM wants them."""
    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=heads, head_size=4, dtype=torch.bfloat16, sliding_window=32
    )


MIXES: dict[str, tuple[MakeSpec, tuple[int, int, int]]] = {
    "equal blocks": (window, (16, 16, 16)),
    "windows in larger blocks": (wide_window, (32, 32, 16)),
}


@pytest.mark.parametrize(("make_window", "sizes"), MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(
    "layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLHNC], ids=lambda x: x.name
)
@some_parallel
def test_groups_in_the_same_memory(
    make_window: MakeSpec,
    sizes: tuple[int, int, int],
    layout: KVCacheLayout,
    p_ranks: dict[str, int],
    d_ranks: dict[str, int],
) -> None:
    """Layers of three groups at the same addresses; with TP 2 to 1 and in layouts that the CPU platform lacks."""
    layers: list[Layer] = [
        Heads(f"model.layers.{i}.attn", i % 3, 2, full if i % 3 == 2 else make_window) for i in range(6)
    ]
    side = Side(sizes, layout=layout)
    check(layers, replace(side, **p_ranks), replace(side, **d_ranks), {0: 32, 1: 32})


def window_latent(heads: int, block_size: int) -> KVCacheSpec:
    assert heads == 1
    return SlidingWindowMLASpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=512,
        dtype=torch.uint8,
        sliding_window=32,
        max_tp_shards=1,
        state_content_bytes=584,
        alignment=576,
    )


@some_parallel
def test_windows_of_latents(p_ranks: dict[str, int], d_ranks: dict[str, int]) -> None:
    """DeepSeek-V4 needs a GPU; its padded pages have no head dimension that tensor parallelism would deal out."""
    layers: list[Layer] = [
        Heads(f"layers.{i}", i % 2, 1, window_latent if i % 2 else latent({"alignment": 576, **DS_MLA}))
        for i in range(4)
    ]
    side = Side((16, 16), layout=KVCacheLayout.BLNHC)
    check(layers, replace(side, **p_ranks), replace(side, **d_ranks), {1: 32})
