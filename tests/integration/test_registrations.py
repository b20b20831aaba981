"""Registrations of the same memory do not depend on one another."""

from __future__ import annotations

from collections.abc import Callable

from support.endpoints import UINT8, Endpoint, check, copy_blocks

from vllm_datadist_connector import _native

SRC, DST = [1, 2, 9], [3, 4, 0]


def test_memory_registered_twice_is_served_until_the_last_is_unregistered(
    transport: str, make_endpoint: Callable[..., Endpoint]
) -> None:
    options = {"datadist.Transport": transport}
    owner, reader = make_endpoint(cluster_id=1, options=options), make_endpoint(cluster_id=2, options=options)
    addresses = [tensor.ctypes.data for tensor in owner.memory]
    status, second = owner.datadist.register_kv_cache(owner.memory.shape[1:], UINT8, addresses)
    check(status)
    reader.link(owner)
    expected = reader.read_memory()
    copy_blocks(owner.memory, expected, SRC, DST)

    check(owner.datadist.unregister_kv_cache(owner.cache_id))
    check(reader.datadist.pull_kv_blocks(owner.cluster_id, second, reader.cache_id, SRC, DST))
    assert (reader.memory == expected).all()
    assert reader.pull(owner, SRC, DST) == _native.LLM_KV_CACHE_NOT_EXIST

    check(owner.datadist.unregister_kv_cache(second))
    gone = reader.datadist.pull_kv_blocks(owner.cluster_id, second, reader.cache_id, SRC, DST)
    assert gone == _native.LLM_KV_CACHE_NOT_EXIST
