"""Caches and what describes them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Protocol, cast

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.data_type import DataType
from vllm_datadist_connector.llm_datadist.status import param_invalid, raise_on_failure
from vllm_datadist_connector.llm_datadist.utils.utils import (
    NamedIntEnum,
    ValueObject,
    check_int64,
    check_isinstance,
    check_list_element,
    check_uint32,
    check_uint64,
)

CPU_CACHE_ID = -1
"""Cache id of memory that the caller only described: the engine does not know it."""


class Placement(NamedIntEnum):
    """Where a cache is (LLM-DataDist Python: Placement). A tag here: both are ordinary memory."""

    HOST = 0
    DEVICE = 1


class CacheDesc(ValueObject):
    """`num_tensors` tensors of one shape and data type (LLM-DataDist Python: CacheDesc).

    num_tensors uint32; shape list or tuple of int64, dimension 0 being the batch rows or the blocks; batch_dim_index in
    [0, len(shape)); seq_len_dim_index -1 or in that range; kv_tensor_format any text. TypeError, ValueError for an
    integer's width, LLMException (LLM_PARAM_INVALID) for an index out of range.
    """

    def __init__(
        self,
        num_tensors: int,
        shape: Sequence[int],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
    ) -> None:
        check_uint32("num_tensors", num_tensors)
        check_list_element("shape", shape, int, allow_none=False)
        for index, dim in enumerate(shape):
            check_int64(f"shape[{index}]", dim)
        check_isinstance("data_type", data_type, DataType, allow_none=False)
        check_isinstance("placement", placement, Placement, allow_none=False)
        check_isinstance("kv_tensor_format", kv_tensor_format, str)
        _check_dim_index("batch_dim_index", batch_dim_index, shape)
        if seq_len_dim_index != -1:
            _check_dim_index("seq_len_dim_index", seq_len_dim_index, shape)
        self._num_tensors = num_tensors
        self._shape = list(shape)
        self._data_type = data_type
        self._placement = placement
        self._batch_dim_index = batch_dim_index
        self._batch_size = shape[batch_dim_index]
        self._seq_len_dim_index = seq_len_dim_index
        self._kv_tensor_format = kv_tensor_format

    @property
    def num_tensors(self) -> int:
        return self._num_tensors

    @property
    def shape(self) -> list[int]:
        """A copy; see update_dim."""
        return list(self._shape)

    @property
    def data_type(self) -> DataType:
        return self._data_type

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def batch_dim(self) -> int:
        """Index of the batch dimension. Rows lie along dimension 0 whatever it says."""
        return self._batch_dim_index

    @property
    def batch_size(self) -> int:
        """The batch dimension as it was at construction."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        return self._kv_tensor_format

    @property
    def size(self) -> int:
        """Bytes of one tensor. LLMException (LLM_PARAM_INVALID): a dimension below 1, or more than 64 bits."""
        status, size = _native.tensor_bytes(self._shape, self._data_type.value)
        raise_on_failure(status, "CacheDesc.size", repr(self))
        return size

    @property
    def row_size(self) -> int:
        """Bytes of one batch row, or of one block. Errors as size."""
        return self.size // self._shape[0]

    def update_dim(self, dim_index: int, value: int) -> None:
        """Sets one dimension, int64. Caches made with this description before keep what it said then."""
        _check_dim_index("dim_index", dim_index, self._shape)
        check_int64("value", value)
        self._shape[dim_index] = value

    def _fields(self) -> tuple[object, ...]:
        return (*self._lasting_fields(), *self._shape, self._batch_size)

    def _lasting_fields(self) -> tuple[object, ...]:
        """Without the dimensions, which update_dim sets."""
        dims = (len(self._shape), self._batch_dim_index, self._seq_len_dim_index)
        return (self._num_tensors, self._data_type, self._placement, self._kv_tensor_format, *dims)

    def __repr__(self) -> str:
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, data_type={self._data_type}, "
            f"placement={self._placement})"
        )


def _check_dim_index(name: str, index: int, shape: Sequence[int]) -> None:
    check_isinstance(name, index, int, allow_none=False)
    if not 0 <= index < len(shape):
        raise param_invalid(name, index, f"[0, {len(shape) - 1}], a dimension of shape {list(shape)}")


class Cache:
    """A cache of this process (LLM-DataDist Python: Cache). Made by a manager, or by create_cpu_cache."""

    def __init__(
        self, cache_id: int, cache_desc: CacheDesc, tensor_addrs: Sequence[int], is_blocks_cache: bool
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = copy.deepcopy(cache_desc)
        self._tensor_addrs = list(tensor_addrs)
        self._is_blocks_cache = is_blocks_cache

    @property
    def cache_id(self) -> int:
        """From 1; -1 for a cache of create_cpu_cache."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        return self._cache_desc

    @property
    def tensor_addrs(self) -> list[int]:
        """One address per tensor; empty once the cache is deallocated."""
        return self._tensor_addrs

    @property
    def is_blocks_cache(self) -> bool:
        return self._is_blocks_cache

    def forget_addresses(self) -> None:
        """Called by the manager once the memory is no longer the caller's to use."""
        self._tensor_addrs = []

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: Sequence[int]) -> Cache:
        """Describes the caller's own memory as a blocks cache for swap_blocks; nothing is registered.

        addrs: list or tuple of uint64, one per tensor. TypeError, ValueError; LLMException (LLM_PARAM_INVALID) if the
        placement is not HOST or the number of addresses is wrong.
        """
        check_cpu_desc(cache_desc)
        check_address_types("addrs", addrs)
        check_addresses("addrs", addrs, cache_desc.num_tensors)
        return Cache(CPU_CACHE_ID, cache_desc, addrs, is_blocks_cache=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(cache_id={self._cache_id}, {self._cache_desc!r})"


class CacheOwner(Protocol):
    """The manager of a KvCache."""

    def release_abandoned(self, cache_id: int) -> None: ...


class KvCache(Cache):
    """A cache of the legacy manager: the same tensors on every device (LLM-DataDist Python: KvCache).

    Its memory is released as by deallocate_cache when it is garbage collected while its manager lives.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        per_device_tensor_addrs: Sequence[Sequence[int]],
        is_blocks_cache: bool = False,
        owner: CacheOwner | None = None,
    ) -> None:
        flat = [addr for addrs in per_device_tensor_addrs for addr in addrs]
        super().__init__(cache_id, cache_desc, flat, is_blocks_cache)
        self._per_device_tensor_addrs = [list(addrs) for addrs in per_device_tensor_addrs]
        self._owner = weakref.ref(owner) if owner is not None else None

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """Per device one address per tensor; empty once the cache is deallocated."""
        return self._per_device_tensor_addrs

    def forget_addresses(self) -> None:
        super().forget_addresses()
        self._per_device_tensor_addrs = []
        self._owner = None

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: Sequence[int] | Sequence[Sequence[int]]) -> KvCache:
        """Describes the caller's own memory as a blocks cache for swap_blocks; nothing is registered.

        addrs: uint64 addresses, one per tensor, or a list of such lists, one per device. TypeError (a mixture too),
        ValueError; LLMException (LLM_PARAM_INVALID) if the placement is not HOST or the number of addresses is wrong.
        """
        check_cpu_desc(cache_desc)
        check_isinstance("addrs", addrs, (list, tuple), allow_none=False)
        nested = bool(addrs) and isinstance(addrs[0], (list, tuple))
        check_list_element("addrs", addrs, (list, tuple) if nested else int)
        per_device = cast("Sequence[Sequence[int]]", addrs if nested else [addrs])
        for device, device_addrs in enumerate(per_device):
            name = f"addrs[{device}]" if nested else "addrs"
            check_address_types(name, device_addrs)
            check_addresses(name, device_addrs, cache_desc.num_tensors)
        return KvCache(CPU_CACHE_ID, cache_desc, per_device, is_blocks_cache=True)

    def __del__(self) -> None:
        reference = getattr(self, "_owner", None)  # absent: __init__ raised
        owner = reference() if reference is not None else None
        if owner is not None:
            owner.release_abandoned(self._cache_id)


def check_cpu_desc(cache_desc: CacheDesc) -> None:
    check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
    if cache_desc.placement != Placement.HOST:
        raise param_invalid("cache_desc.placement", cache_desc.placement, str(Placement.HOST))


def check_address_types(name: str, addrs: object, containers: type | tuple[type, ...] = (list, tuple)) -> None:
    """TypeError unless one of `containers` with int elements; ValueError if one does not fit uint64."""
    check_list_element(name, addrs, int, allow_none=False, containers=containers)
    if isinstance(addrs, (list, tuple)):
        for index, addr in enumerate(addrs):
            check_uint64(f"{name}[{index}]", addr)


def check_addresses(name: str, addrs: Sequence[int], num_tensors: int) -> None:
    """LLMException (LLM_PARAM_INVALID) unless there is one address per tensor."""
    if len(addrs) != num_tensors:
        raise param_invalid(f"len({name})", len(addrs), f"{num_tensors}, num_tensors of the cache_desc")
    if 0 in addrs:
        raise param_invalid(f"{name}[{addrs.index(0)}]", 0, "an address")
