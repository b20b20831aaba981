"""KV caches as vLLM itself lays them out on platforms that no test runs on: its specs, its allocation, its views.

The oracle knows bytes by meaning: a cell is what one head has of one row of tokens, or one channel or head of a state.
P's memory is filled cell by cell, what D must have afterwards is written cell by cell into a twin of D, and then all of
D's memory must equal its twin's: what moved, and that nothing else was written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from support import kv_model
from support.kv_model import Engine, noise
from support.vllm_versions import get_kv_cache_config_from_groups
from vllm_datadist_connector.worker.kv_layout import KVCaches, describe_caches
from vllm_datadist_connector.worker.kv_spec import describe_layers
from vllm_datadist_connector.worker.pairing import find_gaps, pair, pair_with_itself, sources
from vllm_datadist_connector.worker.plan import NULL_BLOCK, TokenRange, plan_pull

Cells: TypeAlias = Iterator[tuple[tuple[object, ...], torch.Tensor]]
"""(meaning, bytes)"""

NUM_BLOCKS = 24


@dataclass(frozen=True)
class Heads:
    """A layer of attention with so many KV heads in the whole model; 1: also the one latent of MLA."""

    name: str
    group: int
    heads: int
    make_spec: Callable[[int, int], KVCacheSpec]
    """(heads here, tokens per block) -> spec"""

    def heads_here(self, tp_rank: int, tp_size: int) -> range:
        count = max(1, self.heads // tp_size)
        first = tp_rank * min(self.heads, tp_size) // tp_size * count
        return range(first, first + count)

    def spec(self, tp_size: int, block_size: int) -> KVCacheSpec:
        return self.make_spec(max(1, self.heads // tp_size), block_size)


@dataclass(frozen=True)
class States:
    """A layer of linear attention. `channels` of its convolution: (name, width in the whole model, on every rank?)."""

    name: str
    group: int
    kind: Any
    channels: tuple[tuple[str, int, bool], ...]
    temporal: tuple[int, ...]
    """The first dimension is dealt out."""
    state_len: int = 3
    channels_first: bool = False
    page_size: int | None = None
    config: Mapping[str, Any] | None = None
    """What the model's configuration says of it."""

    def spec(self, tp_size: int, block_size: int) -> KVCacheSpec:
        width = sum(width if everywhere else width // tp_size for _, width, everywhere in self.channels)
        convolution = (width, self.state_len) if self.channels_first else (self.state_len, width)
        return MambaSpec(
            block_size=block_size,
            shapes=(convolution, (self.temporal[0] // tp_size, *self.temporal[1:])),
            dtypes=(torch.bfloat16, torch.float32),
            page_size_padded=self.page_size,
            mamba_type=self.kind,
        )


Layer: TypeAlias = Heads | States


@dataclass(frozen=True)
class Side:
    """How one instance keeps the model's KV cache."""

    block_sizes: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    layout: KVCacheLayout = KVCacheLayout.LBHNC
    kernel_block_sizes: tuple[int, ...] | None = None
    allocate: Callable[[Side, Mapping[str, KVCacheSpec]], KVCaches] | None = None
    """In place of vLLM's, by the layers' specs."""


@dataclass
class Rank:
    tp_rank: int
    pp_rank: int
    side: Side
    layers: tuple[Layer, ...]
    specs: Mapping[str, KVCacheSpec]
    tensors: KVCaches
    model: kv_model.Rank

    def memory(self) -> list[torch.Tensor]:
        """All bytes, by storage."""
        storages: dict[int, torch.Tensor] = {}
        for value in self.tensors.values():
            tensors: Sequence[torch.Tensor] = value if isinstance(value, (list, tuple)) else [value]
            for tensor in tensors:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
        return list(storages.values())

    def cells(self, layer: Layer, block: int) -> Cells:
        """Of one block of the block table: (what, row of the block) -> bytes."""
        value = self.tensors[layer.name]
        if isinstance(layer, States):
            yield from self._states(layer, value, block)
            return
        heads = layer.heads_here(self.tp_rank, self.side.tp)
        for part, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            # Kernel blocks of a block follow one another; [heads, rows, content] or, in parts, [rows, heads, content].
            grouped = tensor.unflatten(0, (NUM_BLOCKS, -1))[block]
            by_head = grouped if isinstance(value, torch.Tensor) else grouped.transpose(1, 2)
            ratio, slots, rows, _ = by_head.shape
            for slot in range(slots):
                # A backend may keep K and V, or what else it packs, in slots of their own.
                kind, at = divmod(slot, len(heads))
                for row in range(ratio * rows):
                    bytes_ = by_head[row // rows, slot, row % rows].view(torch.uint8)
                    yield ("part", part, kind, "head", heads[at], row), bytes_

    def _states(self, layer: States, value: Any, block: int) -> Cells:
        spec = self.specs[layer.name]
        assert isinstance(spec, MambaSpec)
        convolution, temporal = value if isinstance(value, (list, tuple)) else _unpacked(spec, value)
        of_block = convolution[block].unsqueeze(-1).view(torch.uint8)
        by_channel = of_block if layer.channels_first else of_block.transpose(0, 1)
        at = 0
        for name, width, everywhere in layer.channels:
            here = width if everywhere else width // self.side.tp
            first = 0 if everywhere else self.tp_rank * here
            for channel in range(here):
                yield (name, first + channel), by_channel[at]
                at += 1
        here = layer.temporal[0] // self.side.tp
        for head in range(here):
            yield ("temporal", self.tp_rank * here + head), temporal[block, head].view(torch.uint8)


def _unpacked(spec: MambaSpec, page: torch.Tensor) -> Sequence[torch.Tensor]:
    """As vLLM's Mamba layers take a page apart."""
    layer = SimpleNamespace(get_state_shape=lambda: spec.shapes, get_state_dtype=lambda: spec.dtypes, kv_cache=())
    MambaBase.bind_kv_cache(layer, page)
    return tuple(layer.kv_cache)


def start(layers: Sequence[Layer], side: Side) -> list[Rank]:
    """Every rank of an instance; pipeline stages take the layers in order."""
    per_stage = -(-len(layers) // side.pp)
    return [
        _start_rank(layers, range(pp_rank * per_stage, (pp_rank + 1) * per_stage), side, tp_rank, pp_rank)
        for pp_rank in range(side.pp)
        for tp_rank in range(side.tp)
    ]


def _start_rank(model_layers: Sequence[Layer], stage: range, side: Side, tp_rank: int, pp_rank: int) -> Rank:
    layers = tuple(model_layers[stage.start : stage.stop])
    specs = {layer.name: layer.spec(side.tp, side.block_sizes[layer.group]) for layer in model_layers}
    groups = []
    for index, block_size in enumerate(side.block_sizes):
        of_group = {layer.name: specs[layer.name] for layer in model_layers if layer.group == index}
        own = [layer.name for layer in layers if layer.group == index]
        spec, *others = of_group.values()
        if any(other != spec for other in others):
            spec = UniformTypeKVCacheSpecs(block_size, kv_cache_specs={name: specs[name] for name in own})
        groups.append(KVCacheGroupSpec(own, spec))
    config = _vllm_config(model_layers, side)
    if side.allocate is None:
        cache_config = get_kv_cache_config_from_groups(config, groups, available_memory=1 << 40)
        kernel = list(side.kernel_block_sizes) if side.kernel_block_sizes else None
        tensors: KVCaches = allocate_kv_cache(cache_config, torch.device("cpu"), side.layout, kernel)
    else:
        tensors = side.allocate(side, {layer.name: specs[layer.name] for layer in layers})
    described = describe_layers(config, groups, tp_rank, side.tp)
    block_sizes = tuple(
        0 if isinstance(group.kv_cache_spec, MambaSpec) else size
        for group, size in zip(groups, side.block_sizes, strict=True)
    )
    model = kv_model.Rank(
        tp_rank,
        pp_rank,
        kv_model.Side(side.tp, side.pp, block_sizes, NUM_BLOCKS),
        {},
        {},
        describe_caches(tensors, described, NUM_BLOCKS),
    )
    return Rank(tp_rank, pp_rank, side, layers, specs, tensors, model)


def _vllm_config(layers: Sequence[Layer], side: Side) -> Any:
    """vLLM's configuration as far as its allocation and ours read it."""
    heads = max((layer.heads for layer in layers if isinstance(layer, Heads)), default=1)
    told = next((layer.config for layer in layers if isinstance(layer, States)), None)
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            num_gpu_blocks_override=NUM_BLOCKS,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: side.layout,
        ),
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: heads, hf_text_config=SimpleNamespace(**(told or {}))
        ),
    )


# ---- one request ----


@dataclass(frozen=True)
class Tables:
    """One request's block tables, with no block in two groups, for groups may lie in the same memory."""

    tokens: TokenRange

    @classmethod
    def of(cls, p: Side, d: Side, states: Sequence[int], num_tokens: int, windows: Mapping[int, int]) -> Tables:
        """Args: states: groups of states. windows: group -> tokens that its sliding window reaches back."""

        def deal(side: Side) -> tuple[tuple[int, ...], ...]:
            ids = iter(random.Random(num_tokens).sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1))
            tables = []
            for group, size in enumerate(side.block_sizes):
                count = 1 if group in states else -(-num_tokens // size)
                gone = max(0, num_tokens - windows[group]) // size if group in windows else 0
                tables.append(tuple(NULL_BLOCK if i < gone else next(ids) for i in range(count)))
            return tuple(tables)

        return cls(TokenRange(0, num_tokens, deal(p), deal(d), num_tokens))


def _rows(rank: Rank, layer: Layer, table: Sequence[int]) -> Cells:
    """Every cell of a request on one rank: (layer, what, row from the request's first token on) -> bytes."""
    for index, block in enumerate(table):
        if block == NULL_BLOCK:
            continue
        for (*what, at), cell in rank.cells(layer, block):
            before = index * int(rank.specs[layer.name].num_states) if isinstance(layer, Heads) else 0
            assert isinstance(at, int)
            yield (layer.name, *what, before + at), cell


def _content(meaning: tuple[object, ...], cell: torch.Tensor) -> torch.Tensor:
    drawn = hashlib.shake_128(repr(meaning).encode()).digest(cell.numel())
    return torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(cell.shape)


def check_transfer(layers: Sequence[Layer], p: Side, d: Side, tables: Tables) -> int:
    """Prefills on P, pulls on every rank of D, compares all memory; returns the number of calls.

    Raises:
        MismatchError: as the handshake would.
    """
    held = set()
    p_ranks = start(layers, p)
    for rank in p_ranks:
        for layer in rank.layers:
            for meaning, cell in _rows(rank, layer, tables.tokens.remote[layer.group]):
                cell.copy_(_content(meaning, cell))
                held.add(meaning)
    calls = 0
    for rank, twin in zip(start(layers, d), start(layers, d), strict=True):
        for index, (memory, other) in enumerate(zip(rank.memory(), twin.memory(), strict=True)):
            before = noise("before", rank.tp_rank, rank.pp_rank, index, size=memory.numel())
            memory.copy_(before)
            other.copy_(before)
        for layer in twin.layers:
            for meaning, cell in _rows(twin, layer, tables.tokens.local[layer.group]):
                if meaning in held:
                    cell.copy_(_content(meaning, cell))
        calls += _pull(rank, p_ranks, p, tables)
        for memory, expected in zip(rank.memory(), twin.memory(), strict=True):
            assert torch.equal(memory, expected)
    return calls


def _pull(rank: Rank, p_ranks: Sequence[Rank], p: Side, tables: Tables) -> int:
    groups = len(p.block_sizes)
    ours, engine, calls = rank.model.geometry(groups), Engine(rank.model), 0
    by_place = {(each.pp_rank, each.tp_rank): each.model for each in p_ranks}
    met = [(by_place[place], by_place[place].geometry(groups)) for place in sources(ours, p.tp, p.pp)]
    pairings = [pair(ours, theirs) for _, theirs in met]
    assert find_gaps(ours, [each for found in pairings for each in found]) == []
    assert find_gaps(ours, pair_with_itself(ours)) == []
    for (source, theirs), found in zip(met, pairings, strict=True):
        for pull in plan_pull(ours, theirs, found, tables.tokens):
            engine.pull(source, pull)
            calls += 1
    assert all(writes.max() <= 1 for writes in engine.writes.values())
    return calls
