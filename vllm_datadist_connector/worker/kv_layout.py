"""KV cache tensors -> caches to register. The only module that looks into torch tensors.

A cache holds tensors of one stride class: same KV cache group, same blocks, same segments inside a block. Layers are
ordered by their names' numbers, never by dict order, and layers that share memory are taken once, so that two instances
of one model always describe the same caches.

A layer may come as one tensor, or as several: K and V each by itself, or the parts of a state. Parts that lie in the
same blocks are one; parts that were allocated apart are tensors of their own, called LAYER:0, LAYER:1 and so on.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, PLAIN, CacheLayout, Segment, segment_end
from vllm_datadist_connector.worker.kv_spec import LayerKV, Shards, StateKV, TokenKV

if TYPE_CHECKING:
    import torch

MAX_TENSORS_PER_CACHE = 240
"""LLM-DataDist's documented limit of addresses per registration."""

KVCaches: TypeAlias = "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]"


class LayoutError(ValueError):
    """A KV cache tensor does not lie in memory as blocks that could be moved; says which layer and why."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache to register: tensor i, at addrs[i], holds layout.layers[i]."""

    layout: CacheLayout
    addrs: tuple[int, ...]
    storages: tuple[int, ...]
    """Where the memory begins that each tensor was allocated in."""


class KVMemory(NamedTuple):
    """Where a rank's KV cache is."""

    kind: str
    """As torch names it: "cpu", "npu"."""
    device: int
    """As this process counts them; 0 for the host."""

    @property
    def is_host(self) -> bool:
        return self.kind == "cpu"


class _Tensor(NamedTuple):
    name: str
    addr: int
    storage: int


class _StrideClass(NamedTuple):
    group: int
    num_blocks: int
    block_tokens: int
    block_stride: int
    segments: tuple[Segment, ...]
    dtype: str


def find_memory(kv_caches: KVCaches, layers: Mapping[str, LayerKV], host: bool, device: bool) -> KVMemory:
    """Where the KV cache of those layers is.

    Args:
        host, device: whether the provider moves memory there.

    Raises:
        LayoutError: it is on several devices, or where the provider does not move it.
    """
    found: dict[KVMemory, str] = {}
    for layer in sorted(layers.keys() & kv_caches.keys(), key=_natural_order):
        for tensor in _parts_of(kv_caches[layer]):
            where = KVMemory(tensor.device.type, tensor.device.index or 0)
            if not (host if where.is_host else device):
                kinds = " and ".join(kind for kind, moves in (("host", host), ("device", device)) if moves)
                raise LayoutError(f"{_where(layer, tensor)} is on {tensor.device}; this provider moves {kinds} memory")
            found.setdefault(where, layer)
    if len(found) > 1:
        named = ", ".join(f"layer {layer!r} on {where.kind}:{where.device}" for where, layer in found.items())
        raise LayoutError(f"the KV cache is on several devices: {named}; it takes one")
    return next(iter(found), KVMemory("cpu", 0))


def describe_caches(
    kv_caches: KVCaches, layers: Mapping[str, LayerKV], num_blocks: int, max_tensors: int = MAX_TENSORS_PER_CACHE
) -> list[CacheSpec]:
    """Caches that cover every KV cache tensor.

    Args:
        kv_caches: vLLM's register_kv_caches argument: layer name -> tensor (or parts) whose first dimension counts
            blocks.
        layers: what each layer holds; of layers that are not in it the KV stays on this instance.
        num_blocks: blocks of the block tables. A tensor may count finer (kernel) blocks, a whole multiple of it.
        max_tensors: of one cache.

    Raises:
        LayoutError: names the layer, its shape and strides, and what is needed.
    """
    classes: defaultdict[_StrideClass, list[_Tensor]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    for layer in sorted(kv_caches, key=_natural_order):
        kv = layers.get(layer)
        if kv is None:
            continue
        for tensor, stride_class in _tensors(layer, kv_caches[layer], kv, num_blocks):
            # Layers of different groups may lie in the same memory: a block id belongs to one group at a time.
            if (kv.group, tensor.addr) not in seen:
                seen.add((kv.group, tensor.addr))
                classes[stride_class].append(tensor)
    missing = sorted(layers.keys() - kv_caches.keys())
    if missing:
        raise LayoutError(f"layer {missing[0]!r} has no KV cache tensor; there are {sorted(kv_caches)}")
    return [spec for key, members in classes.items() for spec in _specs(key, members, max_tensors)]


def _specs(key: _StrideClass, members: list[_Tensor], max_tensors: int) -> Iterator[CacheSpec]:
    for start in range(0, len(members), max_tensors):
        names, addrs, storages = zip(*members[start : start + max_tensors], strict=True)
        layout = CacheLayout(
            group=key.group,
            num_blocks=key.num_blocks,
            block_tokens=key.block_tokens,
            block_stride=key.block_stride,
            block_bytes=max(map(segment_end, key.segments)),
            segments=key.segments,
            layers=names,
            dtype=key.dtype,
        )
        yield CacheSpec(layout, addrs, storages)


def _parts_of(value: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return value if isinstance(value, (list, tuple)) else [value]


def _tensors(
    layer: str, value: torch.Tensor | Sequence[torch.Tensor], kv: LayerKV, num_blocks: int
) -> Iterator[tuple[_Tensor, _StrideClass]]:
    """What has to be registered for one layer."""
    several = isinstance(value, (list, tuple))
    tensors = _parts_of(value)
    if not tensors:
        raise LayoutError(f"layer {layer!r}: no KV cache tensor")
    for tensor in tensors:
        _check_tensor(layer, tensor, num_blocks)
    tensors = _without_covered(tensors)
    if isinstance(kv, StateKV):
        described = [_state_segments(layer, tensors, kv)] if len(tensors) == 1 else _state_parts(layer, tensors, kv)
        block_tokens = 0
    else:
        block_tokens = kv.block_size * num_blocks // tensors[0].shape[0]
        described = [_token_segments(layer, tensor, kv, block_tokens, several) for tensor in tensors]
    strides = [_stride(tensor, segments) for tensor, segments in zip(tensors, described, strict=True)]
    for tensor, segments, stride in zip(tensors, described, strides, strict=True):
        if max(map(segment_end, segments)) > stride:
            # Heads outside of blocks, as in vLLM's layout LHBNC. No peer would take such a geometry.
            raise LayoutError(f"{_where(layer, tensor)}: the parts of a block lie farther apart than its blocks")
    # One tensor, and states, are as their specification says; versions of vLLM differ in what they call the elements.
    tells = several and isinstance(kv, TokenKV)
    dtypes = [str(tensor.dtype).removeprefix("torch.") if tells else "" for tensor in tensors]
    offsets = [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors]
    together = all(0 <= offset < strides[0] for offset in offsets) and len(set(strides)) == 1
    if together:
        moved = tuple(
            msgspec.structs.replace(each, offset=each.offset + offset)
            for part, offset in zip(described, offsets, strict=True)
            for each in part
        )
        dtype = "+".join(filter(None, dtypes))
        together_as = _StrideClass(kv.group, tensors[0].shape[0], block_tokens, strides[0], moved, dtype)
        yield _tensor(layer, tensors[0]), together_as
        return
    for index, (tensor, segments, stride, dtype) in enumerate(zip(tensors, described, strides, dtypes, strict=True)):
        stride_class = _StrideClass(kv.group, tensor.shape[0], block_tokens, stride, segments, dtype)
        yield _tensor(f"{layer}:{index}", tensor), stride_class


def _tensor(name: str, tensor: torch.Tensor) -> _Tensor:
    return _Tensor(name, tensor.data_ptr(), tensor.untyped_storage().data_ptr())


def _without_covered(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Without views over what the parts before them hold: vllm-ascend has one for DeepSeek V4. Its bytes would be moved
    twice, and not fit a peer's that has none."""
    kept: list[torch.Tensor] = []
    dense: list[tuple[int, int, int]] = []
    """Stride of blocks, start and end in the first one."""
    for tensor in tensors:
        item, block = tensor.element_size(), tensor[0]
        last = sum((size - 1) * step for size, step in zip(block.shape, block.stride(), strict=True))
        stride, start, end = int(tensor.stride(0) * item), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * item
        covered = start
        for its_stride, its_start, its_end in sorted(dense):
            if its_stride == stride and its_start <= covered < its_end:
                covered = its_end
        if covered >= end:
            continue
        kept.append(tensor)
        if _dense(block):
            dense.append((stride, start, end))
    return kept


def _stride(tensor: torch.Tensor, segments: Sequence[Segment]) -> int:
    """Bytes between blocks; of a single block torch may say anything."""
    stride = int(tensor.stride(0) * tensor.element_size())
    return stride if tensor.shape[0] > 1 else max(stride, *map(segment_end, segments))


def _check_tensor(layer: str, tensor: torch.Tensor, num_blocks: int) -> None:
    where = _where(layer, tensor)
    if tensor.dim() < 2 or tensor.shape[0] == 0 or tensor.shape[0] % num_blocks:
        raise LayoutError(f"{where}: the first dimension must be {num_blocks} blocks or a whole multiple")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise LayoutError(f"{where}: the last dimension is not one run of bytes")


# ---- attention ----


def _token_segments(
    layer: str, tensor: torch.Tensor, kv: TokenKV, block_tokens: int, split: bool
) -> tuple[Segment, ...]:
    """Segments of one block of [blocks, (2,) heads, tokens, content], in whatever order these lie.

    vLLM hands over [heads, tokens] for one tensor and, on Ascend, [tokens, heads] where K and V are tensors of their
    own; without a head dimension (MLA) or with one that does not count the heads, a block has one shard.
    """
    item, block = tensor.element_size(), tensor[0]
    halves = [0]
    if block.dim() == 4 and block.shape[0] == 2:
        halves = [0, int(block.stride(0) * item)]
        block, split = block[0], True
    if block.dim() == 2:
        block = block.unsqueeze(0)
        split = False
    if kv.heads is None:
        return (_whole_block(layer, tensor, kv, block_tokens),)
    if block.dim() != 3:
        raise LayoutError(f"{_where(layer, tensor)}: a block must be [heads, tokens, content] or [tokens, content]")
    heads_at, rows_at = (1, 0) if split else (0, 1)
    if block.shape[heads_at] != kv.heads.count and block.shape[rows_at] == kv.heads.count:
        heads_at, rows_at = rows_at, heads_at
    heads, rows = int(block.shape[heads_at]), int(block.shape[rows_at])
    if heads != kv.heads.count:
        return (_whole_block(layer, tensor, kv, block_tokens),)
    if not rows or block_tokens % rows:
        raise LayoutError(f"{_where(layer, tensor)}: {rows} rows do not divide blocks of {block_tokens} tokens")
    row_bytes = int(block.shape[2] * item)
    strides = int(block.stride(heads_at) * item), int(block.stride(rows_at) * item)
    row_tokens = block_tokens // rows
    if kv.packing != PLAIN:
        if strides[1] != row_bytes and rows > 1:
            raise LayoutError(f"{_where(layer, tensor)}: packed tokens of a head are not one run of bytes")
        return _packed_segments(kv.heads, kv.packing, strides[0], rows, row_bytes, item)
    return tuple(
        Segment(
            offset=offset,
            total=kv.heads.total,
            first=kv.heads.first,
            count=heads,
            shard_stride=strides[0] if heads > 1 else 0,
            rows=rows,
            row_stride=strides[1] if rows > 1 else 0,
            row_bytes=row_bytes,
            row_tokens=row_tokens,
        )
        for offset in halves
    )


def _packed_segments(
    heads: Shards, packing: str, head_stride: int, tokens: int, token_bytes: int, item: int
) -> tuple[Segment, ...]:
    """Of [heads, tokens, K and V] where each head's bytes are in the platform's order, K before V."""
    shared = {"total": heads.total, "first": heads.first, "count": heads.count}
    shared["shard_stride"] = head_stride if heads.count > 1 else 0
    if packing != K_TRANSPOSED:
        return (Segment(**shared, row_bytes=tokens * token_bytes, row_tokens=tokens),)
    half, size = token_bytes // 2, token_bytes // 2 // item
    keys = Segment(
        **shared, lanes=size, lane_stride=tokens * item, rows=tokens, row_stride=item, row_bytes=item, row_tokens=1
    )
    values = Segment(**shared, offset=tokens * half, rows=tokens, row_stride=half, row_bytes=half, row_tokens=1)
    return keys, values


def _whole_block(layer: str, tensor: torch.Tensor, kv: TokenKV, block_tokens: int) -> Segment:
    """Of a block whose inside is not known: it moves whole, between ranks that hold the same part of the model."""
    block = tensor[0]
    if not _dense(block):
        heads = f"{kv.heads.count} heads" if kv.heads is not None else "heads"
        raise LayoutError(f"{_where(layer, tensor)}: no dimension counts {heads}, and it is not one run")
    size = block.numel() * block.element_size()
    rank = kv.rank
    return Segment(total=rank.total, first=rank.first, count=rank.count, row_bytes=size, row_tokens=block_tokens)


# ---- states ----


def _state_segments(layer: str, tensors: Sequence[torch.Tensor], kv: StateKV) -> tuple[Segment, ...]:
    """Of a state whose parts follow one another in a block of bytes."""
    block = tensors[0][0]
    content = block.numel() * block.element_size()
    offset = 0
    segments: list[Segment] = []
    for part in kv.parts:
        segments += _part_segments(part.shape, part.item_bytes, part.axis, part.cuts, offset)
        offset += math.prod(part.shape) * part.item_bytes
    if offset > content or not block.is_contiguous():
        raise LayoutError(f"{_where(layer, tensors[0])}: not {offset} bytes of states in one run")
    return tuple(segments)


def _state_parts(layer: str, tensors: Sequence[torch.Tensor], kv: StateKV) -> list[tuple[Segment, ...]]:
    """Of a state that comes as a tensor for each part."""
    if len(tensors) != len(kv.parts):
        raise LayoutError(f"layer {layer!r}: {len(tensors)} state tensors, expected {len(kv.parts)}")
    segments = []
    for tensor, part in zip(tensors, kv.parts, strict=True):
        if tensor[0].numel() != math.prod(part.shape) or not tensor[0].is_contiguous():
            raise LayoutError(f"{_where(layer, tensor)}: not a dense state of shape {part.shape}")
        segments.append(tuple(_part_segments(part.shape, part.item_bytes, part.axis, part.cuts, 0)))
    return segments


def _part_segments(
    shape: tuple[int, ...], item: int, axis: int, cuts: tuple[Shards, ...], offset: int
) -> Iterator[Segment]:
    shard_bytes = math.prod(shape[axis + 1 :]) * item
    rows, row_stride, row_bytes = math.prod(shape[:axis]), math.prod(shape[axis:]) * item, shard_bytes
    if axis == 0 and len(shape) == 2:
        # As if the other dimension came first, so that (channels, tokens) and (tokens, channels) fit each other.
        rows, row_stride, row_bytes = shape[1], item, item
    for cut in cuts:
        yield Segment(
            offset=offset,
            total=cut.total,
            first=cut.first,
            count=cut.count,
            shard_stride=shard_bytes if cut.count > 1 else 0,
            rows=rows,
            row_stride=row_stride if rows > 1 else 0,
            row_bytes=row_bytes,
            row_tokens=0,
        )
        offset += cut.count * shard_bytes


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


def _where(layer: str, tensor: torch.Tensor) -> str:
    return f"layer {layer!r}: KV cache tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}"


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
