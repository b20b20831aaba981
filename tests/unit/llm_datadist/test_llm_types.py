"""CacheDesc, Cache, KvCache, MemInfo and the transfer configs: what their constructors and setters accept."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

HOST_DESC = CacheDesc(2, [4, 16], DataType.DT_INT32, Placement.HOST)


def desc(**changes: Any) -> CacheDesc:
    return CacheDesc(**({"num_tensors": 10, "shape": [4, 16], "data_type": DataType.DT_INT32} | changes))


def test_defaults_of_a_cache_desc() -> None:
    made = CacheDesc(10, (4, 16), DataType.DT_FLOAT16)
    assert (made.num_tensors, made.shape, made.data_type) == (10, [4, 16], DataType.DT_FLOAT16)
    assert (made.placement, made.batch_dim, made.batch_size) == (Placement.DEVICE, 0, 4)
    assert (made.seq_len_dim_index, made.kv_tensor_format) == (-1, None)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"num_tensors": -1}, ValueError, "num_tensors: -1, value is out of range"),
        ({"num_tensors": 2**32}, ValueError, "num_tensors"),
        ({"num_tensors": "1"}, TypeError, "num_tensors"),
        ({"num_tensors": None}, TypeError, "num_tensors"),
        ({"shape": {4: 16}}, TypeError, "shape"),
        ({"shape": None}, TypeError, "shape"),
        ({"shape": [4, 1.5]}, TypeError, r"shape\[1\].*inner type only support int"),
        ({"shape": [4, 2**63]}, ValueError, r"shape\[1\]"),
        ({"data_type": 3}, TypeError, "data_type: 3 .*only support DataType"),
        ({"placement": 1}, TypeError, "placement"),
        ({"kv_tensor_format": 1}, TypeError, "kv_tensor_format"),
        ({"batch_dim_index": "0"}, TypeError, "batch_dim_index"),
        ({"batch_dim_index": 2}, LLMException, r"batch_dim_index: 2, allowed: \[0, 1\]"),
        ({"batch_dim_index": -1}, LLMException, "batch_dim_index: -1"),
        ({"shape": []}, LLMException, "batch_dim_index"),
        ({"seq_len_dim_index": 2}, LLMException, "seq_len_dim_index: 2"),
        ({"seq_len_dim_index": -2}, LLMException, "seq_len_dim_index: -2"),
    ],
)
def test_cache_desc_refuses(changes: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named) as caught:
        desc(**changes)
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


def test_update_dim_keeps_the_batch_size_of_construction() -> None:
    made = desc(batch_dim_index=1, seq_len_dim_index=0)
    made.update_dim(1, 99)
    assert (made.shape, made.batch_size) == ([4, 99], 16)
    with pytest.raises(LLMException, match=r"dim_index: 2, allowed: \[0, 1\]"):
        made.update_dim(2, 1)
    with pytest.raises(ValueError, match="value"):
        made.update_dim(0, 2**63)


@pytest.mark.parametrize(
    ("shape", "data_type", "size"),
    [([4, 16], DataType.DT_INT32, 256), ([3], DataType.DT_BF16, 6), ([2, 2], DataType.DT_STRING, 64)],
)
def test_size_and_row_size(shape: list[int], data_type: DataType, size: int) -> None:
    made = CacheDesc(1, shape, data_type)
    assert (made.size, made.row_size) == (size, size // shape[0])


@pytest.mark.parametrize("shape", [[0, 16], [-1], [2**62, 2**62]])
def test_size_of_an_impossible_shape(shape: list[int]) -> None:
    with pytest.raises(LLMException, match=r"CacheDesc\.size") as caught:
        print(CacheDesc(1, shape, DataType.DT_INT32).size)
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


def test_a_cache_keeps_the_description_it_was_made_with() -> None:
    made = CacheDesc(2, [4, 16], DataType.DT_INT32, Placement.HOST)
    cache = Cache.create_cpu_cache(made, [16, 32])
    made.update_dim(0, 1000)
    assert cache.cache_desc.shape == [4, 16]


def test_cpu_cache() -> None:
    cache = Cache.create_cpu_cache(HOST_DESC, (16, 32))
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (-1, [16, 32], True)


@pytest.mark.parametrize(
    ("made", "addrs", "error", "named"),
    [
        (None, [16, 32], TypeError, "cache_desc"),
        (desc(num_tensors=2), [16, 32], LLMException, r"placement.*Placement\.HOST"),
        (HOST_DESC, [16], LLMException, r"len\(addrs\): 1, allowed: 2"),
        (HOST_DESC, [16, 0], LLMException, r"addrs\[1\]: 0"),
        (HOST_DESC, {16: 32}, TypeError, "addrs"),
        (HOST_DESC, None, TypeError, "addrs"),
        (HOST_DESC, [16, "32"], TypeError, r"addrs\[1\]"),
        (HOST_DESC, [16, 2**64], ValueError, r"addrs\[1\]"),
    ],
)
@pytest.mark.parametrize("kind", [Cache, KvCache])
def test_cpu_cache_refuses(kind: type[Cache], made: Any, addrs: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        kind.create_cpu_cache(made, addrs)


def test_legacy_cpu_cache_of_several_devices() -> None:
    assert KvCache.create_cpu_cache(HOST_DESC, [16, 32]).per_device_tensor_addrs == [[16, 32]]
    cache = KvCache.create_cpu_cache(HOST_DESC, [[16, 32], (48, 64)])
    assert cache.per_device_tensor_addrs == [[16, 32], [48, 64]]
    assert cache.tensor_addrs == [16, 32, 48, 64]


@pytest.mark.parametrize("addrs", [[16, [32, 48]], [[16, 32], 48]])
def test_legacy_cpu_cache_refuses_a_mixture(addrs: Any) -> None:
    with pytest.raises(TypeError, match=r"addrs\[1\].*inner type only support"):
        KvCache.create_cpu_cache(HOST_DESC, addrs)


@pytest.mark.parametrize(
    ("args", "named"),
    [((0, 1, 2), "mem_type"), ((Memtype.MEM_TYPE_HOST, "1", 2), "addr"), ((Memtype.MEM_TYPE_HOST, 1, None), "size")],
)
def test_mem_info_checks_types(args: tuple[Any, ...], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        MemInfo(*args)
    assert MemInfo(Memtype.MEM_TYPE_DEVICE, -1, -2).size == -2


def test_transfer_config_defaults() -> None:
    config = TransferConfig(3, (16, 32))
    assert (config.dst_cluster_id, list(config.dst_addrs)) == (3, [16, 32])
    assert (config.src_layer_range, config.src_batch_index, config.dst_layer_range) == (None, 0, None)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("dst_cluster_id", -1, ValueError),
        ("dst_cluster_id", None, TypeError),
        ("dst_addrs", None, TypeError),
        ("dst_addrs", [1.0], TypeError),
        ("dst_addrs", [-1], ValueError),
        ("src_layer_range", [0, 1], TypeError),
        ("src_layer_range", range(0, 4, 2), LLMException),
        ("src_layer_range", range(2, 2), LLMException),
        ("src_layer_range", range(-1, 2), LLMException),
        ("src_batch_index", 2**32, ValueError),
    ],
)
def test_transfer_config_refuses(field: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"dst_cluster_id": 3, "dst_addrs": [16, 32]}
    with pytest.raises(error, match=field):
        TransferConfig(**arguments | {field: value})
    config = TransferConfig(**arguments)
    before = getattr(config, field)
    with pytest.raises(error, match=field):
        setattr(config, field, value)
    assert getattr(config, field) == before


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("cache_key", None, TypeError),
        ("cache_key", CacheKey(1, 2), TypeError),
        ("src_layer_range", None, TypeError),
        ("dst_layer_range", None, TypeError),
        ("dst_layer_range", range(1, 1), LLMException),
        ("src_batch_index", -1, ValueError),
    ],
)
def test_keyed_transfer_config_refuses(field: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "cache_key": CacheKeyByIdAndIndex(3, 1),
        "src_layer_range": range(2),
        "dst_layer_range": range(3, 5),
    }
    with pytest.raises(error, match=field):
        TransferWithCacheKeyConfig(**arguments | {field: value})
    with pytest.raises(error, match=field):
        setattr(TransferWithCacheKeyConfig(**arguments), field, value)


def test_fields_of_a_keyed_transfer_config_that_contradict_each_other() -> None:
    with pytest.raises(LLMException, match="dst_layer_range"):
        TransferWithCacheKeyConfig(BlocksCacheKey(3), range(2), range(3))
    with pytest.raises(LLMException, match="src_batch_index: 1, allowed: 0 with a BlocksCacheKey"):
        TransferWithCacheKeyConfig(BlocksCacheKey(3), range(2), range(2), 1)
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(3, 1), range(2), range(2), 1)
    config.src_layer_range = range(3)  # on the way to three layers of both
    with pytest.raises(LLMException, match="dst_layer_range"):
        config.check_consistent()
    config.dst_layer_range = range(1, 4)
    config.check_consistent()


def test_destination_follows_the_key() -> None:
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(3, 1), range(2), range(2))
    config.cache_key = BlocksCacheKey(4)
    assert config.dst_cluster_id == 4
