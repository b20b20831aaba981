"""How vLLM's CPU attention packs a block, by experiment: what compat.kv_packing() claims is what its kernel does.

Blocks of different sizes are exchanged on the strength of it, so it is tried with the installed vLLM, whatever version
that is, and with the instruction set that this machine gets.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED

HEADS, BLOCKS = 2, 3


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k_is_transposed_over_the_whole_block(dtype: torch.dtype, head_size: int, block_size: int) -> None:
    spec = SimpleNamespace(dtype=dtype, block_size=block_size, head_size=head_size, num_kv_heads=HEADS)
    config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="auto"))
    packing = compat.kv_packing(config, spec)
    if packing != K_TRANSPOSED:
        # Another instruction set (AMX): its blocks are exchanged whole, so nothing is claimed about them.
        assert packing.startswith("cpu-")
        return
    tokens = block_size + block_size // 2
    key, value = (torch.randn(tokens, HEADS, head_size).to(dtype) for _ in range(2))
    cache = torch.zeros(BLOCKS, HEADS, block_size, 2 * head_size, dtype=dtype)
    halves = cache.view(BLOCKS, HEADS, 2 * block_size, head_size).chunk(2, dim=2)
    slots = torch.arange(tokens) + block_size  # from block 1 on
    isa = compat._cpu_isa(config, spec)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)

    for token in range(tokens):
        block, slot = divmod(token + block_size, block_size)
        for head in range(HEADS):
            keys, values = cache[block, head].flatten().chunk(2)
            assert torch.equal(keys.view(head_size, block_size)[:, slot], key[token, head])
            assert torch.equal(values.view(block_size, head_size)[slot], value[token, head])
