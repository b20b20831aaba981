"""What transfers move, worked out slowly from the documentation: loops over tensors, rows and blocks, no merging.

A cache is described by where its tensors begin in a memory; the moves of a call are (from, to, length) in the memories
of its two caches, in the order in which they must appear to happen. A call that is not allowed is a RefusedError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

Layout = Literal["rows", "blocks"]
Move = tuple[int, int, int]
Span = tuple[int, int]
"""Layers [start, stop)."""

WHOLE = -1


class RefusedError(Exception):
    """LLM_PARAM_INVALID, and no byte moves."""


def require(condition: bool, why: str) -> None:
    if not condition:
        raise RefusedError(why)


@dataclass(frozen=True)
class CacheModel:
    layout: Layout
    shape: tuple[int, ...]
    data_type: int
    bits: int
    """Of an element of the data type."""
    starts: tuple[int, ...]
    """Of each tensor, in its memory."""

    @property
    def tensors(self) -> int:
        return len(self.starts)

    @property
    def tensor_bytes(self) -> int:
        return -(-prod(self.shape) * self.bits // 8)

    @property
    def rows(self) -> int:
        """Batch rows or blocks."""
        return self.shape[0]

    @property
    def stride(self) -> int:
        """Bytes of a row or of a block."""
        return self.tensor_bytes // self.rows

    def at(self, tensor: int, offset: int) -> int:
        return self.starts[tensor] + offset


@dataclass(frozen=True)
class Layers:
    src: Span | None = None
    dst: Span | None = None
    per_layer: int = 2


def apply(moves: Iterable[Move], src: bytearray, dst: bytearray) -> None:
    for start, end, length in moves:
        for i in range(length):
            dst[end + i] = src[start + i]


# ---- which tensors ----


def _tensors_of(span: Span, per_layer: int, cache: CacheModel) -> list[int]:
    start, stop = span
    require(0 <= start < stop, f"layers {span}")
    require(stop * per_layer <= cache.tensors, f"layers {span} of a cache of {cache.tensors} tensors")
    return list(range(start * per_layer, stop * per_layer))


def _paired(src: CacheModel, dst: CacheModel, layers: Layers) -> list[tuple[int, int]]:
    """Of a pull: dst is the caller's own."""
    require(layers.per_layer > 0, "tensor_num_per_layer 0")
    if layers.src is not None or layers.dst is not None:
        require(dst.tensors % layers.per_layer == 0, "tensor_num_per_layer does not divide the local tensors")
    from_tensors = list(range(src.tensors)) if layers.src is None else _tensors_of(layers.src, layers.per_layer, src)
    to_tensors = list(range(dst.tensors)) if layers.dst is None else _tensors_of(layers.dst, layers.per_layer, dst)
    require(len(from_tensors) == len(to_tensors), f"{len(from_tensors)} tensors to {len(to_tensors)}")
    return list(zip(from_tensors, to_tensors, strict=True))


def _layer(layer: int, per_layer: int, cache: CacheModel) -> list[int]:
    require(per_layer > 0, "tensor_num_per_layer 0")
    require(0 <= layer < cache.tensors // per_layer, f"layer {layer} of {cache.tensors // per_layer}")
    return list(range(layer * per_layer, (layer + 1) * per_layer))


def _pushed(src: CacheModel, dst: CacheModel, src_layer: int, dst_layer: int, per_layer: int) -> list[tuple[int, int]]:
    to_tensors = _layer(dst_layer, per_layer, dst)
    from_tensors = _layer(src_layer, per_layer, src)
    require(src.tensors % per_layer == 0, "tensor_num_per_layer does not divide the local tensors")
    return list(zip(from_tensors, to_tensors, strict=True))


# ---- which bytes of a tensor: (offset in the source tensor, offset in the destination tensor, length) ----


def _row(cache: CacheModel, row: int, offset: int, length: int) -> int:
    """The offset in the tensor of `length` bytes of a row."""
    require(cache.layout == "rows", "a blocks cache has no rows")
    require(0 <= row < cache.rows, f"row {row} of {cache.rows}")
    require(length > 0 and offset + length <= cache.stride, f"{length} bytes at {offset} of a row of {cache.stride}")
    return row * cache.stride + offset


def _block(cache: CacheModel, block: int) -> int:
    require(cache.layout == "blocks", "a contiguous cache has no blocks")
    require(0 <= block < cache.rows, f"block {block} of {cache.rows}")
    return block * cache.stride


def _blocks(src: CacheModel, dst: CacheModel, src_blocks: Sequence[int], dst_blocks: Sequence[int]) -> list[Move]:
    require(len(src_blocks) == len(dst_blocks) > 0, "lists that are empty or of different lengths")
    require(src.stride == dst.stride > 0, f"blocks of {src.stride} bytes to blocks of {dst.stride}")
    return [(_block(src, s), _block(dst, d), src.stride) for s, d in zip(src_blocks, dst_blocks, strict=True)]


def _pieces(src: CacheModel, src_row: int, piece_bytes: int, dst_blocks: Sequence[int]) -> list[Move]:
    """Block b of the destination lies at b * piece_bytes."""
    start = _row(src, src_row, 0, src.stride)
    require(piece_bytes > 0, "pieces of 0 bytes")
    require(0 < len(dst_blocks) <= -(-src.stride // piece_bytes), f"{len(dst_blocks)} pieces of {src.stride} bytes")
    require(min(dst_blocks) >= 0, "a negative block")
    return [
        (start + k * piece_bytes, block * piece_bytes, min(piece_bytes, src.stride - k * piece_bytes))
        for k, block in enumerate(dst_blocks)
    ]


# ---- calls ----


def _moves(src: CacheModel, dst: CacheModel, tensors: list[tuple[int, int]], runs: list[Move]) -> list[Move]:
    for _, to, length in runs:
        require(to + length <= dst.tensor_bytes, "the destination tensor ends before")
    return [(src.at(s, start), dst.at(d, to), length) for s, d in tensors for start, to, length in runs]


def pull_rows(
    src: CacheModel,
    dst: CacheModel,
    layers: Layers,
    rows: tuple[int, int],
    size: int = WHOLE,
    offsets: tuple[int, int] = (0, 0),
    any_stride: bool = False,
) -> list[Move]:
    """rows, offsets: (of the source, of the destination)."""
    require(size == WHOLE or size > 0, f"size {size}")
    length = dst.stride - offsets[1] if size == WHOLE else size
    run = (_row(src, rows[0], offsets[0], length), _row(dst, rows[1], offsets[1], length), length)
    require(any_stride or src.stride == dst.stride, f"rows of {src.stride} bytes to rows of {dst.stride}")
    return _moves(src, dst, _paired(src, dst, layers), [run])


def pull_blocks(
    src: CacheModel,
    dst: CacheModel,
    layers: Layers,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    src_row: int = 0,
) -> list[Move]:
    """Without src_blocks a row to blocks: src_row is the one that the key names."""
    tensors = _paired(src, dst, layers)
    if src_blocks or not dst_blocks:
        return _moves(src, dst, tensors, _blocks(src, dst, src_blocks, dst_blocks))
    for block in dst_blocks:
        _block(dst, block)
    return _moves(src, dst, tensors, _pieces(src, src_row, dst.stride, dst_blocks))


@dataclass(frozen=True)
class Pushed:
    """What of a layer is pushed: a row, or blocks, or a row in pieces."""

    src_row: int = 0
    dst_row: int = 0
    src_blocks: Sequence[int] = ()
    dst_blocks: Sequence[int] = ()
    piece_bytes: int = 0

    def runs(self, src: CacheModel, dst: CacheModel | None) -> list[Move]:
        """dst None: an address, whatever cache is there."""
        if not self.src_blocks and not self.dst_blocks:
            start = _row(src, self.src_row, 0, src.stride)
            require(dst is None or dst.stride == src.stride, "rows of different sizes")
            return [(start, 0 if dst is None else _row(dst, self.dst_row, 0, dst.stride), src.stride)]
        if self.src_blocks:
            if dst is not None:
                return _blocks(src, dst, self.src_blocks, self.dst_blocks)
            require(len(self.src_blocks) == len(self.dst_blocks), "lists of different lengths")
            require(min(self.dst_blocks) >= 0, "a negative block")
            pairs = zip(self.src_blocks, self.dst_blocks, strict=True)
            return [(_block(src, s), d * src.stride, src.stride) for s, d in pairs]
        require(dst is None or dst.layout == "blocks", "a contiguous cache has no blocks")
        require(self.piece_bytes < src.tensor_bytes, "dst_block_memory_size is not below the tensor's")
        return _pieces(src, self.src_row, self.piece_bytes, self.dst_blocks)


def push_layer(src: CacheModel, dst: CacheModel, layers: tuple[int, int], per_layer: int, pushed: Pushed) -> list[Move]:
    """layers: (of the source, of the destination)."""
    return _moves(src, dst, _pushed(src, dst, *layers, per_layer), pushed.runs(src, dst))


def push_layers(src: CacheModel, dst: CacheModel, layers: Layers, pushed: Pushed) -> Iterator[list[Move]]:
    """Layer after layer: those before the one that is refused have been moved. No range: as many as the source has,
    and no ranges at all: all of its tensors."""
    require(layers.per_layer > 0, "tensor_num_per_layer 0")
    if layers.src is None and layers.dst is None and src.tensors % layers.per_layer != 0:
        for tensor in range(src.tensors):
            yield push_layer(src, dst, (tensor, tensor), 1, pushed)
        return
    require(layers.per_layer <= src.tensors, f"tensor_num_per_layer {layers.per_layer}")
    every = (0, src.tensors // layers.per_layer)
    from_layers, to_layers = range(*(layers.src or every)), range(*(layers.dst or every))
    require(len(from_layers) == len(to_layers), "ranges of different lengths")
    for pair in zip(from_layers, to_layers, strict=True):
        yield push_layer(src, dst, pair, layers.per_layer, pushed)


def push_layer_to_addrs(
    src: CacheModel, owners: Sequence[CacheModel], src_layer: int, dst_starts: Sequence[int], pushed: Pushed
) -> list[Move]:
    """dst_starts: one per tensor of the layer, in the peer's memory; everything up to the last byte written after each
    must lie in one tensor of the owners' caches."""
    require(len(dst_starts) > 0, "no address")
    tensors = _layer(src_layer, len(dst_starts), src)
    require(src.tensors % len(dst_starts) == 0, "the addresses do not divide the tensors")
    runs = pushed.runs(src, None)
    extent = max(to + length for _, to, length in runs)
    require(extent > 0, "no byte")
    for start in dst_starts:
        inside = any(t <= start and start + extent <= t + cache.tensor_bytes for cache in owners for t in cache.starts)
        require(inside, f"{extent} bytes at {start} are in no tensor")
    pairs = zip(tensors, dst_starts, strict=True)
    return [(src.at(tensor, start), at + to, length) for tensor, at in pairs for start, to, length in runs]
