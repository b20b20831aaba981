"""CacheManager: the caches of a process in cache-manager mode, their memory and their names."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import (
    LLMStatusCode,
    failure,
    param_invalid,
    raise_on_failure,
)
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_int64,
    check_isinstance,
    check_list_element,
)
from vllm_datadist_connector.llm_datadist.v2 import cache_keys as keys
from vllm_datadist_connector.llm_datadist.v2.cache_keys import BlocksCacheKey, CacheKey
from vllm_datadist_connector.llm_datadist.v2.cache_transfers import CacheTransfers
from vllm_datadist_connector.llm_datadist.v2.caches import (
    Cache,
    CacheDesc,
    Placement,
    check_address_types,
    check_addresses,
)
from vllm_datadist_connector.llm_datadist.v2.interruptible import interruptible
from vllm_datadist_connector.llm_datadist.v2.llm_utils import given, require_blocks, require_contiguous
from vllm_datadist_connector.llm_datadist.v2.memory import MemInfo, Memtype


class CacheManager(CacheTransfers):
    """`LLMDataDist.cache_manager` (LLM-DataDist Python: CacheManager).

    A contiguous cache is `shape[0]` batch rows, a blocks cache `shape[0]` blocks, per tensor. Memory is by address:
    numpy's `array.ctypes.data`, torch's `tensor.data_ptr()`; the caller keeps it until unregister_cache.

    Errors of every call: TypeError for a wrong type, ValueError for an integer beyond its width, RuntimeError after
    finalize, and LLMException, whose status_code is LLM_PARAM_INVALID unless another one is named.
    """

    def __init__(
        self, native: _native.ManagedDataDist, cluster_id: int, *, remote_accessible: bool, pools: frozenset[Placement]
    ) -> None:
        """`pools`: the placements that have a memory pool to allocate from."""
        super().__init__(native, remote_accessible=remote_accessible)
        self._cluster_id = cluster_id
        self._pools = pools
        self._is_call_linked = False

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Registers the caller's memory as a contiguous cache; `cache_keys[i]` names its row i.

        addrs: one uint64 address per tensor. remote_accessible None: True for DEVICE and False for HOST, False once
        link() was called, and True is refused then. A pull never consumes the keys, remove_cache_key ends them.
        AttributeError if cache_desc is None. Source: LLM-DataDist Python, CacheManager.register_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        _check_registered_addresses(addrs)
        check_addresses("addrs", addrs, desc.num_tensors)
        check_list_element("cache_keys", cache_keys, CacheKey, allow_none=False)
        return self._register(desc, addrs, keys.row_keys(cache_keys), remote_accessible, is_blocks_cache=False)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Registers the caller's memory as a blocks cache, named by `blocks_cache_key` if one is given.

        As register_cache otherwise. Source: LLM-DataDist Python, CacheManager.register_blocks_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        _check_registered_addresses(addrs)
        return self._register(desc, addrs, _blocks_keys(blocks_cache_key), remote_accessible, is_blocks_cache=True)

    @interruptible
    def unregister_cache(self, cache_id: int) -> None:
        """Ends a registration, its keys with it, once no transfer reads or writes it; an unknown id (int64) is ignored.

        Source: LLM-DataDist Python, CacheManager.unregister_cache.
        """
        engine = self._engine()
        check_int64("cache_id", cache_id)
        raise_on_failure(engine.unregister_cache(cache_id), "unregister_cache")

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> Cache:
        """A contiguous cache from the placement's pool; `cache_keys[i]` names row i, one without any id skips its row.

        The memory is free again once the cache is deallocated and every key is removed or, two-sided, pulled; a prefix
        key is not used up by pulls. A key given twice or bound already: LLM_PARAM_INVALID. LLM_OUT_OF_MEMORY: the pool
        is exhausted. AttributeError if cache_desc is None. Source: LLM-DataDist Python, CacheManager.allocate_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        check_list_element("cache_keys", cache_keys, CacheKey, allow_none=False)
        return self._allocate(desc, keys.row_keys(cache_keys), is_blocks_cache=False)

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> Cache:
        """A blocks cache from the placement's pool, named by `blocks_cache_key` if one is given.

        Errors as allocate_cache. Source: LLM-DataDist Python, CacheManager.allocate_blocks_cache.
        """
        self._engine()
        desc = given("cache_desc", cache_desc, CacheDesc)
        return self._allocate(desc, _blocks_keys(blocks_cache_key), is_blocks_cache=True)

    def deallocate_cache(self, cache: Cache) -> None:
        """Gives up the id of an allocated contiguous cache; peers may still pull by its remaining keys.

        `cache.tensor_addrs` is empty from then on. Nothing happens to memory that is freed already or is the caller's
        own. LLM_FEATURE_NOT_ENABLED: no pool. AttributeError for None. Source: LLM-DataDist Python,
        CacheManager.deallocate_cache.
        """
        engine = self._engine()
        cache = require_contiguous("cache", cache)
        raise_on_failure(engine.deallocate_cache(cache.cache_id), "deallocate_cache")
        cache.forget_addresses()

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Frees an allocated blocks cache together with its key.

        Otherwise as deallocate_cache. Source: LLM-DataDist Python, CacheManager.deallocate_blocks_cache.
        """
        engine = self._engine()
        cache = require_blocks("cache", cache)
        raise_on_failure(engine.deallocate_cache(cache.cache_id), "deallocate_blocks_cache")
        cache.forget_addresses()

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbinds the key of a row: pulls by it get LLM_KV_CACHE_NOT_EXIST.

        A key that is unknown, removed or pulled already is ignored. Source: LLM-DataDist Python,
        CacheManager.remove_cache_key.
        """
        engine = self._engine()
        check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
        raise_on_failure(engine.remove_cache_key(keys.removable_key(cache_key)), "remove_cache_key")

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Maps registered device memory anew after a fault. Reserved: with a link it succeeds and does nothing.

        LLM_NOT_YET_LINK: no link. LLM_PARAM_INVALID: no region, HOST memory, address or size 0 or less. Source:
        LLM-DataDist Python, CacheManager.remap_registered_memory.
        """
        engine = self._engine()
        check_isinstance("mem_infos", mem_infos, (MemInfo, list), allow_none=False)
        regions = [mem_infos] if isinstance(mem_infos, MemInfo) else mem_infos
        check_list_element("mem_infos", regions, MemInfo)
        for index, info in enumerate(regions):
            if info.mem_type != Memtype.MEM_TYPE_DEVICE:
                raise param_invalid(f"mem_infos[{index}].mem_type", info.mem_type, str(Memtype.MEM_TYPE_DEVICE))
            if info.addr == 0 or info.size <= 0:
                raise param_invalid(f"mem_infos[{index}]", info, "an address and a size above 0")
        if not regions:
            raise param_invalid("mem_infos", regions, "at least one MemInfo")
        if not engine.has_links():
            raise failure(LLMStatusCode.LLM_NOT_YET_LINK, "remap_registered_memory: there is no link")

    def set_is_call_linked(self) -> None:
        """Called by LLMDataDist.link: what is registered afterwards is not remotely accessible."""
        self._is_call_linked = True

    @staticmethod
    def check_cache_key(key: CacheKey) -> None:
        """LLMException (LLM_PARAM_INVALID) unless exactly one of req_id and prefix_id is set."""
        keys.check_cache_key(key)

    def _register(
        self,
        desc: CacheDesc,
        addrs: list[int],
        native_keys: Sequence[_native.Key | None],
        remote_accessible: bool | None,
        is_blocks_cache: bool,
    ) -> Cache:
        check_isinstance("remote_accessible", remote_accessible, bool)
        if remote_accessible and self._is_call_linked:
            raise param_invalid("remote_accessible", True, "False or None after link(): register before it")
        if remote_accessible is None:
            remote_accessible = desc.placement == Placement.DEVICE and not self._is_call_linked
        status, cache_id = self._engine().register_cache(
            _native.CACHE_BLOCKS if is_blocks_cache else _native.CACHE_CONTIGUOUS,
            desc.num_tensors,
            desc.shape,
            desc.data_type.value,
            desc.placement.value,
            addrs,
            native_keys,
            remote_accessible,
        )
        raise_on_failure(status, "register_blocks_cache" if is_blocks_cache else "register_cache")
        return Cache(cache_id, desc, addrs, is_blocks_cache)

    def _allocate(self, desc: CacheDesc, native_keys: Sequence[_native.Key | None], is_blocks_cache: bool) -> Cache:
        if desc.num_tensors == 0:
            raise param_invalid("cache_desc.num_tensors", 0, "above 0")
        if desc.placement not in self._pools:
            option = "mem_pool_cfg" if desc.placement == Placement.DEVICE else "host_mem_pool_cfg"
            raise param_invalid("cache_desc.placement", desc.placement, f"one with a pool: {option} is not set")
        status, cache_id, addrs = self._engine().allocate_cache(
            _native.CACHE_BLOCKS if is_blocks_cache else _native.CACHE_CONTIGUOUS,
            desc.num_tensors,
            desc.shape,
            desc.data_type.value,
            desc.placement.value,
            native_keys,
        )
        raise_on_failure(status, "allocate_blocks_cache" if is_blocks_cache else "allocate_cache")
        return Cache(cache_id, desc, addrs, is_blocks_cache)

    def __repr__(self) -> str:
        mode = "remote-accessible" if self._remote_accessible else "two-sided"
        return f"CacheManager(cluster {self._cluster_id}, {mode})"


def _check_registered_addresses(addrs: list[int]) -> None:
    check_address_types("addrs", addrs, containers=list)
    if not addrs:
        raise param_invalid("addrs", addrs, "at least one address")


def _blocks_keys(key: BlocksCacheKey | None) -> list[_native.Key | None]:
    check_isinstance("blocks_cache_key", key, BlocksCacheKey)
    return [] if key is None else [keys.blocks_key(key)]
