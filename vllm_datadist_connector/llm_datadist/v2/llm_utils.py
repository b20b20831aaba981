"""Arguments that several calls share: checked here, and turned into what the engine takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_int64,
    check_isinstance,
    check_list_element,
    check_uint32,
    is_valid_layer_range,
)
from vllm_datadist_connector.llm_datadist.v2.caches import Cache, Placement

WHOLE: Final = -1
"""A size that says: all there is."""

_MAX_LAYER: Final = 2**31 - 1
T = TypeVar("T")


class NoneGiven(TypeError, AttributeError):  # noqa: N818 - raised as either
    """None where there must be a value: a TypeError, and the AttributeError that the documentation says of some."""


def given(name: str, value: T | None, kind: type[T]) -> T:
    """`value`, if it is a `kind`. TypeError if not, which for None is an AttributeError as well."""
    if value is None:
        raise NoneGiven(f"{name}: None, only support {kind.__name__}")
    check_isinstance(name, value, kind)
    return value


def require_contiguous(name: str, cache: Cache | None) -> Cache:
    cache = given(name, cache, Cache)
    if cache.is_blocks_cache:
        raise param_invalid(name, cache, "a contiguous cache (allocate_cache, register_cache)")
    return cache


def require_blocks(name: str, cache: Cache | None) -> Cache:
    cache = given(name, cache, Cache)
    if not cache.is_blocks_cache:
        raise param_invalid(name, cache, "a blocks cache (allocate_blocks_cache, register_blocks_cache)")
    return cache


def check_pushed(name: str, cache: Cache) -> None:
    """LLMException (LLM_PARAM_INVALID) unless the placement is DEVICE: there is no push from anywhere else."""
    if cache.cache_desc.placement != Placement.DEVICE:
        raise param_invalid(f"{name}.cache_desc.placement", cache.cache_desc.placement, str(Placement.DEVICE))


def check_size(size: int) -> None:
    check_int64("size", size)
    if size != WHOLE and size <= 0:
        raise param_invalid("size", size, f"{WHOLE} (all) or above 0")


def check_block_ids(name: str, block_ids: object, allow_empty: bool) -> None:
    """TypeError unless a list or tuple of int; LLMException (LLM_PARAM_INVALID) if it is empty and must not be."""
    check_list_element(name, block_ids, int, allow_none=False)
    if not block_ids and not allow_empty:
        raise param_invalid(name, block_ids, "at least one block index")


def check_layer_range(name: str, layers: range | None, allow_none: bool) -> None:
    """TypeError unless a range; LLMException (LLM_PARAM_INVALID) unless its step is 1 and 0 <= start < stop."""
    check_isinstance(name, layers, range, allow_none)
    if layers is not None and not (is_valid_layer_range(layers) and layers.stop <= _MAX_LAYER):
        raise param_invalid(name, layers, f"a range with step 1 and 0 <= start < stop <= {_MAX_LAYER}")


def check_tensor_num_per_layer(tensor_num_per_layer: int) -> None:
    check_uint32("tensor_num_per_layer", tensor_num_per_layer)
    if tensor_num_per_layer == 0:
        raise param_invalid("tensor_num_per_layer", 0, "above 0")


@dataclass(frozen=True)
class LayerSelection:
    """The keyword arguments of a pull that say which layers; None is all of them."""

    src: range | None
    dst: range | None
    tensor_num_per_layer: int

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> LayerSelection:
        """TypeError, ValueError for tensor_num_per_layer beyond uint32, LLMException (LLM_PARAM_INVALID) for 0 and for
        a range that is empty, has a step or starts below 0. Keywords that are not ours are ignored."""
        selection = cls(
            kwargs.get("src_layer_range"), kwargs.get("dst_layer_range"), kwargs.get("tensor_num_per_layer", 2)
        )
        check_layer_range("src_layer_range", selection.src, allow_none=True)
        check_layer_range("dst_layer_range", selection.dst, allow_none=True)
        check_tensor_num_per_layer(selection.tensor_num_per_layer)
        return selection


def layer_span(layers: range | None, shift: int = 0) -> _native.LayerSpan | None:
    """The engine's form of a layer range, `shift` layers further on."""
    return None if layers is None else (layers.start + shift, layers.stop + shift)
