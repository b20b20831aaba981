"""KV cache tensors -> caches to register. The only module that looks into torch tensors.

A cache holds tensors of one stride class: same KV cache group, same number of blocks, same bytes per block. Layers are
ordered by their names' numbers, never by dict order, and layers that share memory are taken once, so that two instances
of one model always describe the same caches.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_TENSORS_PER_CACHE = 240
"""LLM-DataDist's documented limit of addresses per registration."""


class LayoutError(ValueError):
    """A KV cache tensor does not lie in memory as blocks that could be moved; says which layer and why."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache to register: tensor i, at addrs[i], holds layers[i]; each has num_blocks blocks of block_bytes."""

    group: int
    num_blocks: int
    block_bytes: int
    layers: tuple[str, ...]
    addrs: tuple[int, ...]


def describe_caches(
    kv_caches: Mapping[str, torch.Tensor], group_of_layer: Mapping[str, int], num_blocks: int
) -> list[CacheSpec]:
    """Caches that cover every KV cache tensor.

    Args:
        kv_caches: vLLM's register_kv_caches argument: layer name -> tensor whose first dimension counts blocks.
        group_of_layer: KV cache group of each layer.
        num_blocks: blocks of the block table. A tensor may count finer (kernel) blocks, a whole multiple of it.

    Raises:
        LayoutError: names the layer, its shape and strides, and what is needed.
    """
    classes: defaultdict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    seen: set[int] = set()
    for layer in sorted(kv_caches, key=_natural_order):
        tensor = kv_caches[layer]
        block_bytes = _block_bytes(layer, tensor, num_blocks)
        addr = tensor.data_ptr()
        if addr in seen:
            continue
        seen.add(addr)
        if layer not in group_of_layer:
            raise LayoutError(f"layer {layer!r} belongs to no KV cache group; groups know {sorted(group_of_layer)}")
        classes[group_of_layer[layer], block_bytes].append((layer, addr))
    specs = []
    for (group, block_bytes), members in sorted(classes.items()):
        for start in range(0, len(members), MAX_TENSORS_PER_CACHE):
            layers, addrs = zip(*members[start : start + MAX_TENSORS_PER_CACHE], strict=True)
            specs.append(CacheSpec(group, num_blocks, block_bytes, layers, addrs))
    return specs


def _block_bytes(layer: str, tensor: torch.Tensor, num_blocks: int) -> int:
    where = f"layer {layer!r}: KV cache tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
    if tensor.device.type != "cpu":
        raise LayoutError(f"{where} is on {tensor.device}; this provider moves host memory only (the CPU platform)")
    if tensor.dim() < 2 or tensor.shape[0] == 0 or tensor.shape[0] % num_blocks:
        raise LayoutError(f"{where}: the first dimension must be {num_blocks} blocks or a whole multiple")
    if tensor.stride(0) != tensor[0].numel() or not _dense(tensor[0]):
        raise LayoutError(f"{where}: a block is not one run of bytes")
    return int(tensor.stride(0) * tensor.element_size() * (tensor.shape[0] // num_blocks))


def _dense(block: torch.Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(block.stride(), block.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
