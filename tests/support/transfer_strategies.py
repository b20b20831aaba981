"""Hypothesis strategies of caches and of calls on them: mostly allowed ones, else with one thing gone wrong."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from support.transfer_oracle import WHOLE, CacheModel, Layers, Layout, Pushed, Span

DATA_TYPES = {"uint8": (4, 8), "float16": (1, 16), "int4": (29, 4), "uint1": (30, 1), "fp6": (38, 6), "float": (0, 32)}
"""Number and bits of an element."""
WHOLE_BYTES = ("uint8", "float16", "float")
"""The ones that Python's DataType has too."""

MAX_TENSORS, MAX_ROWS = 6, 6
MAX_GAP = 9
U32 = 2**32 - 1

Draw = st.DrawFn


def index_below(draw: Draw, count: int, wrong: bool, most: int = U32) -> int:
    """An index, or one past the last at least."""
    return draw(st.sampled_from([count, count + 1, most]) if wrong else st.integers(0, max(count - 1, 0)))


GEOMETRY = ("src layout", "dst layout", "stride", "tensors")
LAYERS = ("src layers", "dst layers", "layer counts", "per layer")


def go_wrong(draw: Draw, *arguments: str) -> str:
    """What of a call is not as it should be: mostly nothing, else one thing."""
    return draw(st.sampled_from(["nothing"] * (2 * len(arguments)) + list(arguments)))


@st.composite
def cache_models(
    draw: Draw,
    layout: Layout,
    tensors: int,
    stride: int | None = None,
    data_types: tuple[str, ...] = tuple(DATA_TYPES),
) -> CacheModel:
    """stride None: any, and a tensor whose last bytes may be no row's."""
    rows = draw(st.integers(1, MAX_ROWS))
    if stride is not None:
        fitting = [name for name in data_types if stride * 8 % DATA_TYPES[name][1] == 0]
        data_type, bits = DATA_TYPES[draw(st.sampled_from(fitting))]
        shape: tuple[int, ...] = (rows, stride * 8 // bits)
    else:
        data_type, bits = DATA_TYPES[draw(st.sampled_from(data_types))]
        shape = (rows, draw(st.integers(3, 12)), *draw(st.lists(st.integers(1, 3), max_size=1)))
    unplaced = CacheModel(layout, shape, data_type, bits, ())
    starts, end = [], 0
    for _ in range(tensors):
        starts.append(end + draw(st.integers(1, MAX_GAP)))
        end = starts[-1] + unplaced.tensor_bytes
    return CacheModel(layout, shape, data_type, bits, tuple(draw(st.permutations(starts))))


@dataclass(frozen=True)
class Caches:
    src: CacheModel
    dst: CacheModel


OTHER: dict[Layout, Layout] = {"rows": "blocks", "blocks": "rows"}


@st.composite
def cache_pairs(
    draw: Draw,
    src_layout: Layout,
    dst_layout: Layout,
    wrong: str,
    data_types: tuple[str, ...] = tuple(DATA_TYPES),
    equal_strides: bool = True,
    even: bool = False,
) -> Caches:
    """Of the same number of tensors (`even`: an even one) and rows, or blocks, of the same size."""
    step = 2 if even else 1
    tensors = draw(st.integers(1, MAX_TENSORS // step)) * step
    others = tensors if wrong != "tensors" else draw(st.integers(1, MAX_TENSORS // step)) * step
    src = draw(cache_models(OTHER[src_layout] if wrong == "src layout" else src_layout, tensors, None, data_types))
    stride = src.stride if equal_strides and wrong != "stride" and src.stride > 0 else None
    dst_layout = OTHER[dst_layout] if wrong == "dst layout" else dst_layout
    return Caches(src, draw(cache_models(dst_layout, others, stride, data_types)))


@st.composite
def spans(draw: Draw, count: int, length: int, wrong: bool) -> Span:
    """`length` layers of `count`."""
    room = max(count - length, 0)
    start = draw(st.sampled_from([room + 1, 2**31 - 1]) if wrong else st.integers(0, room))
    return (start, start + length)


@st.composite
def layer_choices(draw: Draw, caches: Caches, wrong: str) -> Layers:
    divisors = [n for n in (1, 2, 3) if caches.src.tensors % n == caches.dst.tensors % n == 0]
    per_layer = draw(st.sampled_from(divisors if wrong != "per layer" else [0, 3, 4, 5, 255, U32]))
    given = draw(st.sampled_from(["none", "both", "both", "both", "src", "dst"]))
    if given == "none":
        return Layers(per_layer=per_layer)
    counts = [cache.tensors // max(per_layer, 1) for cache in (caches.src, caches.dst)]
    # One range alone: as many layers as the other cache has.
    length = draw(st.integers(1, max(min(counts), 1))) if given == "both" else max(counts[given == "src"], 1)
    src = draw(spans(counts[0], length, wrong == "src layers")) if given != "dst" else None
    dst_length = length + (wrong == "layer counts")
    dst = draw(spans(counts[1], dst_length, wrong == "dst layers")) if given != "src" else None
    return Layers(src, dst, per_layer)


@st.composite
def block_lists(draw: Draw, count: int, wrong: bool = False, length: int | None = None) -> list[int]:
    """Runs up and down, gaps and repetitions; one index is out of range if `wrong`."""
    blocks: list[int] = []
    pieces = st.tuples(st.integers(0, max(count - 1, 0)), st.integers(1, MAX_ROWS), st.sampled_from([1, 1, 0, -1]))
    for start, size, step in draw(st.lists(pieces, min_size=1, max_size=4)):
        blocks += [block for block in (start + i * step for i in range(size)) if 0 <= block < max(count, 1)]
    if length is not None:
        blocks = (blocks * length)[:length]
    if wrong:
        blocks[draw(st.integers(0, len(blocks) - 1))] = draw(st.sampled_from([count, count + 1, -1, 2**62]))
    return blocks


@dataclass(frozen=True)
class PullRows:
    caches: Caches
    layers: Layers
    rows: tuple[int, int]
    size: int
    offsets: tuple[int, int]
    by_key: bool


@st.composite
def pulls_of_rows(draw: Draw, data_types: tuple[str, ...] = tuple(DATA_TYPES), with_offsets: bool = True) -> PullRows:
    wrong = go_wrong(draw, *GEOMETRY, *LAYERS, "src row", "dst row", "size", "offset")
    caches = draw(cache_pairs("rows", "rows", wrong, data_types))
    src, dst = caches.src, caches.dst
    rows = index_below(draw, src.rows, wrong == "src row"), index_below(draw, dst.rows, wrong == "dst row")
    room = min(src.stride, dst.stride)
    allowed = st.integers(0, max(room - 1, 0)) if wrong != "offset" else st.sampled_from([room, room + 1, 2**64 - 1])
    offsets = (draw(allowed), draw(allowed)) if with_offsets and draw(st.booleans()) else (0, 0)
    sizes = st.integers(1, max(room - max(offsets), 1))
    if wrong == "size":
        sizes = st.sampled_from([0, -2, src.stride + 1, dst.stride + 1, 2**63 - 1])
    size = draw(sizes) if wrong == "size" or offsets[0] > offsets[1] or draw(st.booleans()) else WHOLE
    # A key names a row that there is, of a cache that has rows.
    by_key = draw(st.booleans()) and src.layout == "rows" and wrong != "src row"
    return PullRows(caches, draw(layer_choices(caches, wrong)), rows, size, offsets, by_key)


@dataclass(frozen=True)
class PullBlocks:
    caches: Caches
    layers: Layers
    src_blocks: list[int]
    dst_blocks: list[int]
    src_row: int
    by_key: bool


@st.composite
def pulls_of_blocks(draw: Draw, data_types: tuple[str, ...] = tuple(DATA_TYPES)) -> PullBlocks:
    wrong = go_wrong(draw, *GEOMETRY, *LAYERS, "src", "dst", "length", "long run")
    caches = draw(cache_pairs("blocks", "blocks", wrong, data_types))
    src = draw(block_lists(caches.src.rows, wrong == "src"))
    dst = draw(block_lists(caches.dst.rows, wrong == "dst", len(src) + (wrong == "length")))
    if wrong == "long run":  # begins within both caches
        src = [src[0] + i for i in range(MAX_ROWS)]
        dst = [dst[0] + i for i in range(MAX_ROWS)]
    by_key = draw(st.booleans()) and caches.src.layout == "blocks"
    return PullBlocks(caches, draw(layer_choices(caches, wrong)), src, dst, 0, by_key)


@st.composite
def pulls_into_blocks(draw: Draw, data_types: tuple[str, ...] = tuple(DATA_TYPES)) -> PullBlocks:
    """A row in pieces."""
    wrong = go_wrong(draw, *GEOMETRY, *LAYERS, "row", "dst", "count")
    caches = draw(cache_pairs("rows", "blocks", wrong, data_types, draw(st.booleans())))
    pieces = -(-caches.src.stride // max(caches.dst.stride, 1))
    count = pieces + 1 if wrong == "count" else draw(st.integers(1, max(pieces, 1)))
    dst = draw(block_lists(caches.dst.rows, wrong == "dst", count))
    row = index_below(draw, caches.src.rows, wrong == "row")
    by_key = draw(st.booleans()) and caches.src.layout == "rows" and wrong != "row"
    return PullBlocks(caches, draw(layer_choices(caches, wrong)), [], dst, row, by_key)


PUSHED: list[tuple[Layout, Layout]] = [("rows", "rows"), ("blocks", "blocks"), ("rows", "blocks")]


@st.composite
def pushed_parts(draw: Draw, layouts: tuple[Layout, Layout], caches: Caches, wrong: str) -> Pushed:
    src, dst = caches.src, caches.dst
    if layouts == ("rows", "rows"):
        return Pushed(index_below(draw, src.rows, wrong == "src"), index_below(draw, dst.rows, wrong == "dst"))
    if layouts == ("blocks", "blocks"):
        src_blocks = draw(block_lists(src.rows, wrong == "src"))
        length = len(src_blocks) + (wrong == "count")
        return Pushed(src_blocks=src_blocks, dst_blocks=draw(block_lists(dst.rows, wrong == "dst", length)))
    most = max(min(src.stride, dst.tensor_bytes), 1)
    bad_sizes = st.sampled_from([0, src.tensor_bytes, src.tensor_bytes + 1, 2**63, 2**64 - 1])
    size = draw(bad_sizes if wrong == "size" else st.integers(1, most))
    pieces = -(-src.stride // max(size, 1))
    count = pieces + 1 if wrong == "count" else draw(st.integers(1, max(pieces, 1)))
    blocks = draw(block_lists(max(dst.tensor_bytes // max(size, 1), 1), wrong == "dst", min(count, 2 * MAX_ROWS)))
    return Pushed(index_below(draw, src.rows, wrong == "src"), dst_blocks=blocks, piece_bytes=size)


@dataclass(frozen=True)
class PushLayer:
    caches: Caches
    layers: tuple[int, int]
    per_layer: int
    pushed: Pushed
    by_key: bool


@st.composite
def pushes_of_layers(draw: Draw) -> PushLayer:
    wrong = go_wrong(draw, *GEOMETRY, "src layer", "dst layer", "per layer", "src", "dst", "count", "size")
    layouts = draw(st.sampled_from(PUSHED))
    caches = draw(cache_pairs(*layouts, wrong, equal_strides=layouts[0] == layouts[1] or draw(st.booleans())))
    divisors = [n for n in (1, 2, 3) if caches.src.tensors % n == 0 and n <= caches.dst.tensors]
    per_layer = draw(st.sampled_from(divisors if wrong != "per layer" else [0, 3, 4, 5, 255]))
    layers = (
        index_below(draw, caches.src.tensors // max(per_layer, 1), wrong == "src layer", 2**31),
        index_below(draw, caches.dst.tensors // max(per_layer, 1), wrong == "dst layer", 2**31),
    )
    by_key = draw(st.booleans()) and caches.dst.layout == "blocks"
    return PushLayer(caches, layers, per_layer, draw(pushed_parts(layouts, caches, wrong)), by_key)


@dataclass(frozen=True)
class PushToAddrs:
    caches: Caches
    src_layer: int
    dst_starts: list[int]
    pushed: Pushed


@st.composite
def pushes_to_addrs(draw: Draw) -> PushToAddrs:
    """To where tensors begin, and to addresses within and beside them. What lies there need not be a like cache."""
    wrong = go_wrong(draw, "src layout", "layer", "addresses", "address", "src", "dst", "count", "size")
    layouts = draw(st.sampled_from(PUSHED))
    caches = draw(cache_pairs(*layouts, wrong))
    counts = [n for n in (1, 2, 3) if caches.src.tensors % n == 0]
    per_layer = draw(st.sampled_from(counts if wrong != "addresses" else [0, 4, 5]))
    layer = index_below(draw, caches.src.tensors // max(per_layer, 1), wrong == "layer", 2**31)
    within = draw(st.sampled_from([0, 0, 0, caches.dst.stride, 1]))
    starts = [draw(st.sampled_from(caches.dst.starts)) + within for _ in range(per_layer)]
    if wrong == "address" and starts:
        starts[-1] += draw(st.sampled_from([-1, caches.dst.tensor_bytes, caches.dst.tensor_bytes - 1, 1 << 40]))
    return PushToAddrs(caches, layer, starts, draw(pushed_parts(layouts, caches, wrong)))


@dataclass(frozen=True)
class PushLayers:
    caches: Caches
    layers: Layers
    pushed: Pushed


@st.composite
def pushes_of_ranges(
    draw: Draw, layouts: tuple[Layout, Layout], data_types: tuple[str, ...], per_layer: int | None = None
) -> PushLayers:
    """Layer after layer. per_layer 2 is transfer_cache_async's: an even number of tensors, and ranges are given."""
    wrong = go_wrong(
        draw, *GEOMETRY, "src layers", "dst layers", "layer counts", "per layer", "src", "dst", "count", "size"
    )
    caches = draw(cache_pairs(*layouts, wrong, data_types, layouts[0] == layouts[1], even=per_layer is not None))
    tensors = caches.src.tensors
    if per_layer is None:
        divisors = [n for n in (1, 2, 3) if tensors % n == 0]
        chosen = draw(st.sampled_from(divisors if wrong != "per layer" else [3, 4, 5, tensors, tensors + 1]))
    else:
        chosen = per_layer
    layers = Layers(per_layer=chosen)
    if per_layer is not None or draw(st.booleans()):
        counts = [cache.tensors // chosen for cache in (caches.src, caches.dst)]
        length = draw(st.integers(1, max(min(counts), 1)))
        src = draw(spans(counts[0], length, wrong == "src layers"))
        dst = draw(spans(counts[1], length + (wrong == "layer counts"), wrong == "dst layers"))
        layers = Layers(src, dst, chosen)
    return PushLayers(caches, layers, draw(pushed_parts(layouts, caches, wrong)))
