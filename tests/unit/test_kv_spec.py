"""What vLLM's configuration says about heads: which ranks hold different ones, and which hold copies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engine_config import group_of
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import PLAIN
from vllm_datadist_connector.worker.kv_spec import Shards, TokenKV, describe_layers


@pytest.fixture(autouse=True)
def platform_that_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "kv_packing", lambda *_: PLAIN)


def config(heads: int, draft: int | None = None, **names: object) -> Any:
    def model(count: int, **values: object) -> Any:
        return SimpleNamespace(get_total_num_kv_heads=lambda: count, hf_text_config=SimpleNamespace(**values))

    speculative = SimpleNamespace(draft_model_config=model(draft)) if draft is not None else None
    return SimpleNamespace(model_config=model(heads, **names), speculative_config=speculative)


def shards(vllm_config: Any, local: int, tp_rank: int, tp_size: int, **changes: Any) -> Shards | None:
    values = {"block_size": 16, "num_kv_heads": local, "head_size": 8, "dtype": torch.float16, **changes}
    groups = [group_of(FullAttentionSpec(**values), "layers.0")]
    kv = describe_layers(vllm_config, groups, tp_rank, tp_size)["layers.0"]
    assert isinstance(kv, TokenKV)
    return kv.heads


@pytest.mark.parametrize(
    ("heads", "local", "tp_size", "expected"),
    [
        (8, 8, 1, [(0, 8)]),
        (8, 4, 2, [(0, 4), (4, 4)]),
        (4, 1, 4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (2, 1, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_of_each_rank(heads: int, local: int, tp_size: int, expected: list[tuple[int, int]]) -> None:
    vllm_config = config(heads, num_key_value_heads=heads)
    assert [shards(vllm_config, local, rank, tp_size) for rank in range(tp_size)] == [
        Shards(heads, first, count) for first, count in expected
    ]


SEVERAL: dict[str, Any] = {
    "windows have more": config(2, num_key_value_heads=2, swa_num_key_value_heads=8),
    "full attention has fewer": config(8, num_key_value_heads=8, num_global_key_value_heads=2),
    "a draft model has its own": config(2, draft=8, num_key_value_heads=2),
}


@pytest.mark.parametrize("vllm_config", SEVERAL.values(), ids=SEVERAL.keys())
def test_a_layer_of_a_model_with_several_numbers_of_heads(vllm_config: Any) -> None:
    """Four ranks with one head each may hold four or two: to say four can only refuse a peer, never mislead it."""
    assert [shards(vllm_config, 1, rank, 4) for rank in range(4)] == [Shards(4, rank, 1) for rank in range(4)]
    # Two heads on each rank are eight, whatever the model's number.
    assert [shards(vllm_config, 2, rank, 4) for rank in range(4)] == [Shards(8, 2 * rank, 2) for rank in range(4)]


def test_what_the_layer_tells_counts() -> None:
    vllm_config = config(8, num_key_value_heads=8, swa_num_key_value_heads=2)
    assert [shards(vllm_config, 1, rank, 4, max_tp_shards=2) for rank in range(4)] == [
        Shards(2, 0, 1),
        Shards(2, 0, 1),
        Shards(2, 1, 1),
        Shards(2, 1, 1),
    ]


def test_a_latent_is_on_every_rank() -> None:
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float16)
    for rank in range(2):
        kv = describe_layers(config(8), [group_of(spec, "layers.0")], rank, 2)["layers.0"]
        assert isinstance(kv, TokenKV)
        assert (kv.heads, kv.rank) == (Shards(1, 0, 1), Shards(1, 0, 1))


def test_slots_that_are_not_heads_hide_them() -> None:
    assert shards(config(8), 4, 1, 2, num_head_slots=8, state_content_bytes=16) is None
    assert shards(config(8), 4, 1, 2, num_head_slots=4) == Shards(8, 4, 4)
