"""Makes a rank's ConnectorWorker from vLLM's configuration: the only place on the worker side that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.protocol.handshake import LayoutContract
from vllm_datadist_connector.worker.worker import ConnectorWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MODEL_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def build_worker(config: ConnectorConfig, vllm_config: VllmConfig, groups: Sequence[Any]) -> ConnectorWorker:
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    index = compat.data_parallel_index(parallel) * ranks + pp_rank * parallel.tensor_parallel_size + tp_rank
    return ConnectorWorker(
        config,
        _contract(vllm_config, groups),
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        rank_index=index,
        is_producer=transfer.is_kv_producer,
        is_consumer=transfer.is_kv_consumer,
    )


def _contract(vllm_config: VllmConfig, groups: Sequence[Any]) -> LayoutContract:
    spec = groups[0].kv_cache_spec
    hf_config = vllm_config.model_config.hf_text_config
    sizes = [
        f"{name}={getattr(hf_config, name)}" for name in _MODEL_SIZES if getattr(hf_config, name, None) is not None
    ]
    return LayoutContract(
        model=" ".join([*(vllm_config.model_config.hf_config.architectures or ["unknown"]), *sizes]),
        kv_cache_dtype=str(getattr(spec, "dtype", vllm_config.cache_config.cache_dtype)),
        kv_layout=f"HND/{compat.kv_packing(vllm_config, spec)}",
        block_sizes=tuple(group.kv_cache_spec.block_size for group in groups),
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        pp_size=vllm_config.parallel_config.pipeline_parallel_size,
    )
