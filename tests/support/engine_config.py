"""vLLM's configuration as far as the connector's scheduler side reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from .pd import BLOCK_SIZE

FULL = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=8, dtype=torch.float16)
WINDOW = SlidingWindowSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=8, dtype=torch.float16, sliding_window=32)
STATE = MambaSpec(block_size=512, shapes=((4, 3), (2, 8)), dtypes=(torch.float16, torch.float32))


def group_of(spec: KVCacheSpec, *layers: str) -> Any:
    """One of vLLM's KVCacheGroupSpecs."""
    return SimpleNamespace(kv_cache_spec=spec, layer_names=list(layers))


def vllm_config(role: str) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            engine_id=f"engine-{role}",
            kv_role=role,
            is_kv_producer=role in ("kv_producer", "kv_both"),
            is_kv_consumer=role in ("kv_consumer", "kv_both"),
            kv_connector_extra_config={},
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            data_parallel_index=0,
            data_parallel_rank=0,
        ),
    )
