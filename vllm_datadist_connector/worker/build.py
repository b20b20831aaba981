"""Makes a rank's ConnectorWorker from vLLM's configuration: the only place on the worker side that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConfigError, ConnectorConfig
from vllm_datadist_connector.kv_groups import describe_groups
from vllm_datadist_connector.protocol.contract import LayoutContract
from vllm_datadist_connector.worker.kv_spec import describe_layers
from vllm_datadist_connector.worker.model_identity import identify_weights, settings_of, software
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def build_worker(config: ConnectorConfig, vllm_config: VllmConfig, groups: Sequence[Any]) -> ConnectorWorker:
    """
    Raises:
        ConfigError: the parallelism is one whose KV cache cannot be told apart by rank.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name}: {getattr(parallel, name)}; DataDistConnector supports 1")
    tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
    index = (compat.data_parallel_index(parallel) * pp_size + pp_rank) * tp_size + tp_rank
    place = RankPlace(tp_rank, pp_rank, tp_size, pp_size, index)
    return ConnectorWorker(
        config,
        _contract(config, vllm_config, groups),
        place,
        layers=describe_layers(vllm_config, groups, tp_rank, tp_size),
        block_sizes=tuple(group.block_size for group in describe_groups(groups)),
        is_producer=transfer.is_kv_producer or config.bidirectional,
        is_consumer=transfer.is_kv_consumer or config.bidirectional,
    )


def _contract(config: ConnectorConfig, vllm_config: VllmConfig, groups: Sequence[Any]) -> LayoutContract:
    specs = [compat.layer_spec(group.kv_cache_spec, name) for group in groups for name in group.layer_names]
    dtypes = sorted({str(dtype) for spec in specs for dtype in getattr(spec, "dtypes", None) or (spec.dtype,)})
    packings = sorted({compat.kv_packing(vllm_config, spec) for spec in specs})
    return LayoutContract(
        model=" ".join(vllm_config.model_config.hf_config.architectures or ["unknown"]),
        kv_cache_dtype=f"{vllm_config.cache_config.cache_dtype} ({', '.join(dtypes)})",
        kv_packing=" ".join(packings),
        software=software(),
        settings=settings_of(vllm_config.model_config),
        weights=identify_weights(vllm_config, config.weights_id),
    )
