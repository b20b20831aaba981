"""Makes a rank's ConnectorWorker from vLLM's configuration: the only place on the worker side that reads it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from vllm_datadist_connector import _native, compat
from vllm_datadist_connector.config import ConfigError, ConnectorConfig
from vllm_datadist_connector.duties import Duties, duties_of
from vllm_datadist_connector.kv_groups import describe_groups
from vllm_datadist_connector.protocol.contract import LayoutContract
from vllm_datadist_connector.worker.kv_spec import describe_layers
from vllm_datadist_connector.worker.model_identity import identify_weights, settings_of, software
from vllm_datadist_connector.worker.options import adapt_config, choose_provider
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ROLE_PROMPT, _ROLE_DECODER, _ROLE_MIX = 1, 2, 3


def build_worker(config: ConnectorConfig, vllm_config: VllmConfig, groups: Sequence[Any]) -> ConnectorWorker:
    """
    Raises:
        ConfigError: the parallelism is one whose KV cache cannot be told apart by rank; or the provider is not here, or
            cannot do what is asked for.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name}: {getattr(parallel, name)}; DataDistConnector supports 1")
    _check_recipe(config, transfer, parallel)
    duties = duties_of(transfer.kv_role, config)
    datadist = _open_provider(config, duties)
    if datadist.capabilities.device_memory and getattr(vllm_config.model_config, "enable_sleep_mode", False):
        raise ConfigError(
            "--enable-sleep-mode: a sleeping vLLM gives the KV cache away while peers still read it; leave it out"
        )
    given = transfer.kv_connector_extra_config or ()
    config = adapt_config(config, given, datadist.capabilities, is_both=duties.both)
    tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
    index = (compat.data_parallel_index(parallel) * pp_size + pp_rank) * tp_size + tp_rank
    place = RankPlace(tp_rank, pp_rank, tp_size, pp_size, index)
    return ConnectorWorker(
        config,
        datadist,
        _contract(config, vllm_config, groups),
        place,
        layers=describe_layers(vllm_config, groups, tp_rank, tp_size),
        block_sizes=tuple(group.block_size for group in describe_groups(groups)),
        duties=duties,
        announces_layers=not compat.splits_batches(parallel),
        drafts_late=compat.drafts_late(vllm_config),
    )


def _open_provider(config: ConnectorConfig, duties: Duties) -> _native.LlmDataDist:
    role = _ROLE_MIX if duties.both else _ROLE_PROMPT if duties.gives else _ROLE_DECODER
    name = choose_provider(config.provider, compat.is_npu())
    try:
        return _native.LlmDataDist(secrets.randbits(62) + 1, role, name)
    except ValueError as error:
        raise ConfigError(f"provider: {config.provider!r}: {error}") from None


def _check_recipe(config: ConnectorConfig, transfer: Any, parallel: Any) -> None:
    """vllm-ascend reads the same keys: it must not be told otherwise."""
    sides = (("prefill", config.prefill, transfer.is_kv_producer), ("decode", config.decode, transfer.is_kv_consumer))
    for name, said, is_ours in sides:
        if said is None or not is_ours:
            continue
        for size, ours in (("tp_size", parallel.tensor_parallel_size), ("dp_size", parallel.data_parallel_size)):
            if getattr(said, size) not in (None, ours):
                raise ConfigError(f"{name}: {size} is {getattr(said, size)}, this instance has {ours}; leave it out")


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
