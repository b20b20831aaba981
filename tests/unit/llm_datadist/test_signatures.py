"""Parameters of every documented call, by name, order and default: what programs written for the original pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from vllm_datadist_connector import llm_datadist as api
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager

BLOCK_LISTS = "src_block_indices=None, dst_block_indices=None, dst_block_memory_size=None"
COPY = "dst, src, dst_batch_index=0, src_batch_index=0, offset=0, size=-1, req_id=None"
LAYERS = "src_layer_range=None, dst_layer_range=None"

DOCUMENTED: list[tuple[Callable[..., Any], str]] = [
    (api.LLMDataDist, "role, cluster_id"),
    (api.LLMDataDist.init, "options"),
    (api.LLMDataDist.finalize, ""),
    (api.LLMDataDist.link_clusters, "clusters, timeout=3000"),
    (api.LLMDataDist.unlink_clusters, "clusters, timeout=3000, force=False"),
    (api.LLMDataDist.link, "comm_name, cluster_rank_info, rank_table"),
    (api.LLMDataDist.unlink, "comm_id"),
    (api.LLMDataDist.query_register_mem_status, "comm_id"),
    (api.LLMDataDist.switch_role, "role, switch_options=None"),
    (api.LLMDataDist.check_link_status, "remote_cluster_id"),
    (api.LLMConfig, ""),
    (api.LLMConfig.generate_options, ""),
    (api.LLMConfig.gen_options, ""),
    (api.LLMClusterInfo, ""),
    (api.LLMClusterInfo.append_local_ip_info, "ip, port"),
    (api.LLMClusterInfo.append_remote_ip_info, "ip, port"),
    (api.LLMException, "*args, status_code=0"),
    (api.Status, "status"),
    (api.Status.is_ok, ""),
    (
        api.CacheDesc,
        "num_tensors, shape, data_type, placement=1, batch_dim_index=0, seq_len_dim_index=-1, kv_tensor_format=None",
    ),
    (api.CacheDesc.update_dim, "dim_index, value"),
    (api.Cache.create_cpu_cache, "cache_desc, addrs"),
    (api.KvCache.create_cpu_cache, "cache_desc, addrs"),
    (api.CacheKeyByIdAndIndex, "cluster_id, cache_id, batch_index=0"),
    (api.MemInfo, "mem_type, addr, size"),
    (api.LayerSynchronizer.synchronize_layer, "layer_index, timeout_in_millis"),
    (api.TransferConfig, "dst_cluster_id, dst_addrs, src_layer_range=None, src_batch_index=0"),
    (api.TransferWithCacheKeyConfig, "cache_key, src_layer_range, dst_layer_range, src_batch_index=0"),
    (api.CacheTask.synchronize, "timeout_in_millis=None"),
    (api.CacheTask.get_results, "timeout_in_millis=None"),
    (api.TensorDesc, "dtype, shape"),
    (api.Tensor, "data, tensor_desc=None"),
    (api.Tensor.numpy, "copy=False"),
    (CacheManager.register_cache, "cache_desc, addrs, cache_keys=(), remote_accessible=None"),
    (CacheManager.register_blocks_cache, "cache_desc, addrs, blocks_cache_key=None, remote_accessible=None"),
    (CacheManager.unregister_cache, "cache_id"),
    (CacheManager.allocate_cache, "cache_desc, cache_keys=()"),
    (CacheManager.allocate_blocks_cache, "cache_desc, blocks_cache_key=None"),
    (CacheManager.deallocate_cache, "cache"),
    (CacheManager.deallocate_blocks_cache, "cache"),
    (CacheManager.remove_cache_key, "cache_key"),
    (CacheManager.copy_cache, COPY),
    (CacheManager.copy_blocks, "cache, copy_block_info"),
    (CacheManager.swap_blocks, "src_cache, dst_cache, src_to_dst"),
    (CacheManager.pull_cache, "cache_key, cache, batch_index=0, size=-1, **kwargs"),
    (CacheManager.pull_blocks, "src_cache_key, dst_cache, src_blocks=(), dst_blocks=(), **kwargs"),
    (
        CacheManager.push_cache,
        f"dst_cache_key, src_cache, src_batch_index=0, {LAYERS}, size=-1, tensor_num_per_layer=2",
    ),
    (
        CacheManager.push_blocks,
        f"dst_cache_key, src_cache, src_blocks=(), dst_blocks=(), {LAYERS}, tensor_num_per_layer=2",
    ),
    (CacheManager.transfer_cache_async, f"src_cache, layer_synchronizer, transfer_configs, {BLOCK_LISTS}"),
    (CacheManager.remap_registered_memory, "mem_infos"),
    (CacheManager.set_is_call_linked, ""),
    (CacheManager.check_cache_key, "key"),
    (api.KvCacheManager.is_initialized, ""),
    (api.KvCacheManager.allocate_cache, "cache_desc, cache_keys=()"),
    (api.KvCacheManager.allocate_blocks_cache, "cache_desc, blocks_cache_key=None"),
    (api.KvCacheManager.deallocate_cache, "cache"),
    (api.KvCacheManager.remove_cache_key, "cache_key"),
    (api.KvCacheManager.pull_cache, "cache_key, kv_cache, batch_index=0, size=-1, **kwargs"),
    (
        api.KvCacheManager.pull_blocks,
        "prompt_cache_key, decoder_kv_cache, prompt_blocks, decoder_blocks, **kwargs",
    ),
    (api.KvCacheManager.copy_cache, COPY),
    (api.KvCacheManager.copy_blocks, "cache, copy_block_info"),
    (api.KvCacheManager.swap_blocks, "src_cache, dst_cache, src_to_dst"),
    (api.KvCacheManager.get_cache_tensors, "cache, tensor_index=0"),
    (api.KvCacheManager.transfer_cache_async, f"src_cache, layer_synchronizer, transfer_configs, {BLOCK_LISTS}"),
]


def parameters_of(call: Callable[..., Any]) -> str:
    """The parameters without annotations and without self; numbers for enumerators."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=int(parameter.default)
            if isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
            else parameter.default,
        )
        for parameter in inspect.signature(call).parameters.values()
        if parameter.name != "self"
    ]
    return str(inspect.Signature(parameters))[1:-1]


@pytest.mark.parametrize(("call", "documented"), DOCUMENTED, ids=lambda value: getattr(value, "__qualname__", ""))
def test_parameters(call: Callable[..., Any], documented: str) -> None:
    assert parameters_of(call) == documented


@pytest.mark.parametrize("kind", [CacheManager, api.KvCacheManager, api.LLMDataDist, api.LLMClusterInfo, api.CacheTask])
def test_every_call_says_what_it_does(kind: type) -> None:
    calls = [call for name, call in inspect.getmembers(kind, inspect.isroutine) if not name.startswith("_")]
    assert calls
    assert [call.__qualname__ for call in calls if not inspect.getdoc(call)] == []
