"""The models of data/ascend_layouts.json, in vllm-ascend's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from allocation import Model
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm_ascend.core.kv_cache_interface import AscendMLAAttentionSpec

NUM_BLOCKS = 4
PAGE_OF_INDEX = 16384


@dataclass(frozen=True, kw_only=True)
class PaddedIndexSpec(AscendMLAAttentionSpec):
    """An index whose page is as large as that of the latents with which it shares memory."""

    @property
    def page_size_bytes(self) -> int:
        return PAGE_OF_INDEX


def attention(layers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.self_attn.attn" for layer in range(layers))


def full(**sizes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=sizes.pop("block_size", 128), num_kv_heads=2, dtype=torch.bfloat16, **sizes)


def latent(head_size: int, **more: Any) -> AscendMLAAttentionSpec:
    more.setdefault("dtype", torch.bfloat16)
    return AscendMLAAttentionSpec(block_size=128, num_kv_heads=1, head_size=head_size, **more)


def sparse(*head_dim: int, packed: bool = False, c8_index: bool = False) -> Model:
    spec = latent(sum(head_dim), sparse_head_dim=head_dim, cache_sparse_sfa_c8=packed, cache_sparse_li_c8=c8_index)
    return Model({attention(3): spec}, NUM_BLOCKS)


def gdn_hybrid() -> Model:
    """A page of either kind: the convolution, then K and V of 256 tokens, or the state and padding."""
    convolution, state = (3, 96), (4, 64, 16)
    page = 2 * 3 * 96 + 2 * 256 * 2 * 16 * 2
    states = MambaSpec(
        block_size=256, shapes=(convolution, state), dtypes=(torch.bfloat16, torch.float32), page_size_padded=page
    )
    linear = tuple(f"model.layers.{layer}.linear_attn" for layer in (0, 1))
    full_attention = tuple(f"model.layers.{layer}.self_attn.attn" for layer in (3, 7))
    return Model(
        {linear: states, full_attention: full(block_size=256, head_size=16, page_size_padded=page)},
        NUM_BLOCKS,
        shares_memory=True,
    )


def deepseek_v4() -> Model:
    layers = tuple(f"model.layers.{layer}.attn" for layer in (0, 1))
    index = PaddedIndexSpec(
        block_size=128, num_kv_heads=1, head_size=32, dtype=torch.int8, scale_dim=1, scale_dtype=torch.float16
    )
    indices = tuple(f"model.layers.{layer}.indexer.attn" for layer in (0, 1))
    return Model({layers: latent(64), indices: index}, NUM_BLOCKS, shares_memory=True, model_type="deepseek_v4")


def dense(num_blocks: int = 32) -> Model:
    """As the tests' model is configured."""
    return Model({attention(2): full(head_size=32)}, num_blocks)


def windowed(num_blocks: int = 32) -> Model:
    layers = attention(2)
    window = SlidingWindowSpec(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=128)
    return Model({layers[:1]: full(head_size=32), layers[1:]: window}, num_blocks)


def hybrid(num_blocks: int = 64) -> Model:
    """One layer of states and one of tokens, in one memory."""
    convolution, state = (3, 96), (4, 8, 16)
    page = 2 * 3 * 96 + 2 * 128 * 2 * 32 * 2
    states = MambaSpec(
        block_size=128,
        shapes=(convolution, state),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=page,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        mamba_cache_mode="align",
    )
    tokens = full(head_size=32, page_size_padded=page)
    return Model(
        {("model.layers.0.linear_attn",): states, ("model.layers.1.self_attn.attn",): tokens},
        num_blocks,
        shares_memory=True,
    )


def recorded_models() -> dict[str, Model]:
    return {
        "dense": Model(
            {attention(3): full(head_size=64)}, NUM_BLOCKS, aliases={"model.layers.7.self_attn.attn": attention(3)[2]}
        ),
        "mla": Model({attention(3): latent(576)}, NUM_BLOCKS),
        "sparse": sparse(512, 64, 128),
        "sparse without index": sparse(512, 64, 0),
        "sparse C8 index": sparse(512, 64, 128, c8_index=True),
        "sparse packed": sparse(656, 0, 0, packed=True),
        "sparse packed, index": sparse(656, 0, 128, packed=True),
        "sparse packed, C8 index": sparse(656, 0, 128, packed=True, c8_index=True),
        "GDN hybrid": gdn_hybrid(),
        "DeepSeek V4": deepseek_v4(),
        "DeepSeek V4 on A5": deepseek_v4(),
    }
