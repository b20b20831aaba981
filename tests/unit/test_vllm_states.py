"""States of linear attention as vLLM 0.32 keeps them, from its specs and pages to bytes on D.

One level below end to end: the CPU platform serves Mamba 2 and gated delta nets (e2e/test_models.py), with equally
many ranks on both sides, in the time that tests may take; Mamba 1, other parallelism and padding are only seen here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.vllm_caches import Heads, Layer, Side, States, Tables, check_transfer, start
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import PLAIN
from vllm_datadist_connector.worker.pairing import MismatchError, pair

PAGE = 4096
TOKENS = 75
PARALLEL = {
    "1 > 1": ({}, {}),
    "1 > 2": ({}, {"tp": 2}),
    "2 > 1": ({"tp": 2}, {}),
    "2 > 2": ({"tp": 2}, {"tp": 2}),
    "4 > 2": ({"tp": 4}, {"tp": 2}),
    "2 > 4": ({"tp": 2}, {"tp": 4}),
    "PP 2 > TP 2": ({"pp": 2}, {"tp": 2}),
    "PP 2 x TP 2 > PP 3": ({"pp": 2, "tp": 2}, {"pp": 3}),
}


@pytest.fixture(autouse=True)
def platform_that_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "kv_packing", lambda *_: PLAIN)


@pytest.fixture(params=["SD", "DS"])
def channels_first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """VLLM_SSM_CONV_STATE_LAYOUT."""
    first = request.param == "DS"
    monkeypatch.setattr(compat, "is_conv_state_dim_first", lambda: first)
    return first


KINDS: dict[str, States] = {
    "Mamba 1": States("", 1, MambaAttentionBackendEnum.MAMBA1, (("x", 16, False),), (16, 4)),
    "Mamba 2, one group": States(
        "",
        1,
        MambaAttentionBackendEnum.MAMBA2,
        (("x", 32, False), ("B", 8, True), ("C", 8, True)),
        (8, 4, 8),
        config={"n_groups": 1},
    ),
    "Mamba 2, eight groups": States(
        "",
        1,
        MambaAttentionBackendEnum.MAMBA2,
        (("x", 32, False), ("B", 16, False), ("C", 16, False)),
        (8, 4, 2),
        config={"mamba_n_groups": 8},
    ),
    "gated delta net": States(
        "", 1, MambaAttentionBackendEnum.GDN_ATTN, (("Q", 16, False), ("K", 16, False), ("V", 32, False)), (8, 4, 4)
    ),
}


def attention(heads: int, block_size: int) -> KVCacheSpec:
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=8, dtype=torch.bfloat16, page_size_padded=PAGE
    )


def hybrid(kind: States, **changes: object) -> list[Layer]:
    """States and attention share memory, and with it the size of their pages: both are padded."""
    states = replace(kind, page_size=PAGE, **changes)
    layers = [Heads(f"layers.{i}", 0, 4, attention) if i % 2 else replace(states, name=f"layers.{i}") for i in range(4)]
    return [*layers, replace(states, name="layers.10")]


def check(layers: list[Layer], p: Side, d: Side) -> None:
    check_transfer(layers, p, d, Tables.of(p, d, (1,), TOKENS, {}))


@pytest.mark.parametrize(("p_ranks", "d_ranks"), PARALLEL.values(), ids=PARALLEL.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_parallelism(kind: States, channels_first: bool, p_ranks: dict[str, int], d_ranks: dict[str, int]) -> None:
    """Mamba 1 has no CPU kernel; the others would need up to eight processes for a case."""
    side = Side((16, 512))
    check(hybrid(kind, channels_first=channels_first), replace(side, **p_ranks), replace(side, **d_ranks))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.BLHNC], ids=lambda layout: layout.name)
def test_layouts(kind: States, layout: KVCacheLayout) -> None:
    """A choice of attention backends that the CPU platform lacks; also with attention in blocks of other sizes."""
    p, d = Side((32, 512), layout=layout), Side((16, 128), layout=layout, tp=2)
    check(hybrid(kind), p, d)


@pytest.mark.parametrize("page_size", [None, 2048])
def test_pages_of_states_alone(page_size: int | None) -> None:
    """A model of nothing but states keeps them without padding, or with some; the CPU platform has no such model."""
    kind = replace(KINDS["Mamba 1"], group=0, page_size=page_size)
    layers = [replace(kind, name=f"layers.{i}") for i in range(3)]
    p, d = Side((512,), tp=2), Side((512,))
    check_transfer(layers, p, d, Tables.of(p, d, (0,), TOKENS, {}))


def test_groups_that_the_ranks_do_not_divide_move_whole() -> None:
    """Two groups on four ranks: vLLM deals out copies in a way that is not followed here."""
    kind = replace(
        KINDS["Mamba 2, one group"],
        channels=(("x", 32, False), ("B", 32, False), ("C", 32, False)),
        config={"n_groups": 2},
    )
    four, two = Side((16, 512), tp=4), Side((16, 512), tp=2)
    check(hybrid(kind), four, four)
    with pytest.raises(MismatchError, match=r"layer 'layers\.0'"):
        check(hybrid(kind), four, two)


def test_speculative_tokens_on_one_side_are_refused(channels_first: bool) -> None:
    """They lengthen the convolution's state."""
    layers = [hybrid(KINDS["gated delta net"], channels_first=channels_first, state_len=length)[0] for length in (3, 5)]
    side = Side((16, 512))
    attention_layer = Heads("layers.1", 0, 4, attention)
    (p,), (d,) = (start([attention_layer, layer], side) for layer in layers)
    with pytest.raises(MismatchError, match=r"of layer 'layers\.0': ours \d+, theirs \d+"):
        pair(d.model.geometry(2), p.model.geometry(2))
