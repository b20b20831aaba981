"""Everything that depends on vLLM's version or platform. Each shim says when it can go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, PLAIN

TransferResults: Any = getattr(_base, "KVConnectorTransferResults", None)
"""Class of get_transfer_results()'s value; None before vLLM 0.31, where failed loads travel as invalid block ids.
Goes when 0.31 is the oldest supported version."""


def cache_hit_source() -> Any:
    """Label under which vLLM 0.32+ counts tokens that came from a peer; None before. Goes with 0.31."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


def transfer_groups(kv_cache_config: Any) -> Sequence[Any]:
    """KV cache groups that cross instances. 0.29+ says which; before, all. Goes with 0.28."""
    groups: Sequence[Any] = getattr(kv_cache_config, "transfer_groups", None) or kv_cache_config.kv_cache_groups
    return groups


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """Indices of transfer_groups(). Goes with 0.28."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(ids) if ids is not None else tuple(range(len(kv_cache_config.kv_cache_groups)))


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The KVCacheSpec of one layer of a group: a group of like layers that differ in size has one for each."""
    specs: dict[str, Any] = getattr(group_spec, "kv_cache_specs", None) or {}
    return specs.get(layer, next(iter(specs.values()), group_spec))


def is_conv_state_dim_first() -> bool:
    """Whether a convolution's state is stored as (channels, tokens), not (tokens, channels). 0.23 may lack the choice,
    and stores (tokens, channels). Goes with it."""
    try:
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first as dim_first
    except ImportError:
        return False
    return bool(dim_first())


def drop_last_prompt_token(request: Any) -> None:
    """Shortens a P request so that a hybrid model's state ends before the prompt's last token.

    vLLM has no notion of it: NixlConnector shortens requests in the same way. Goes when vLLM lets a connector ask for
    the state before the last token.
    """
    if request.num_prompt_tokens < 2 or not request.prompt_token_ids or len(request.all_token_ids) < 2:
        return
    del request.prompt_token_ids[-1:]
    del request._all_token_ids[-1:]
    request.num_prompt_tokens -= 1
    request.max_tokens = 1


def data_parallel_index(parallel_config: Any) -> int:
    """Which engine core of the instance this is, over all nodes where vLLM says so."""
    index = getattr(parallel_config, "data_parallel_index", None)
    return int(index if index is not None else parallel_config.data_parallel_rank)


def kv_packing(vllm_config: Any, kv_cache_spec: Any) -> str:
    """How a platform packs a head's K and V inside a block, beyond the layout's name.

    vLLM's CPU attention keeps them in the order of an instruction set: blocks of two hosts are interchangeable only if
    they chose the same. Which order "vec" and "vec16" mean was found by experiment with 0.23 and 0.32, see
    tests/unit/test_cpu_packing.py. Other platforms do not pack.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hasattr(kv_cache_spec, "num_kv_heads"):
        return PLAIN
    if isinstance(kv_cache_spec, MLAAttentionSpec):
        return PLAIN
    isa, cache_dtype = _cpu_isa(vllm_config, kv_cache_spec), vllm_config.cache_config.cache_dtype
    quantised = "fp8" in str(cache_dtype)
    return K_TRANSPOSED if isa in ("vec", "vec16") and not quantised else f"cpu-{isa}-{cache_dtype}"


def _cpu_isa(vllm_config: Any, kv_cache_spec: Any) -> str:
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return "unknown"
    sizes = (kv_cache_spec.dtype, kv_cache_spec.block_size, getattr(kv_cache_spec, "head_size", None))
    try:
        return str(_get_attn_isa(*sizes, vllm_config.cache_config.cache_dtype))
    except TypeError:
        # 0.23 takes (dtype, block_size, head_size). Goes with it.
        return str(_get_attn_isa(*sizes))


def share_logging() -> None:
    """Sends our log lines where vLLM's go: it configures the handlers of its own logger only."""
    ours, theirs = logging.getLogger(__package__), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = False


def prepare_process() -> None:
    """Cures a crash of vLLM's CPU build on hosts with AMX.

    Symptom: a bfloat16 server whose first batch has at most four tokens (every decode instance) dies of SIGILL without
    a word. vLLM's CPU attention uses AMX tiles without asking the kernel for them; so far only a oneDNN matmul asked.
    Goes when vLLM asks by itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not _has_amx():
        return
    import torch

    torch.cpu._init_amx()


def _has_amx() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            return any("amx_tile" in line for line in info if line.startswith("flags"))
    except OSError:
        return False
