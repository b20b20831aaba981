"""What vLLM's configuration says about each layer's KV cache, in plain values: how heads and states are dealt out to TP
ranks. How they lie in memory is the tensors' to tell, see kv_layout.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

from vllm_datadist_connector import compat
from vllm_datadist_connector.protocol.handshake import PLAIN

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_GROUP_COUNT_NAMES = ("n_groups", "mamba_n_groups", "num_groups")
"""What models with Mamba 2 layers call the number of their B/C groups."""


@dataclass(frozen=True, slots=True)
class Shards:
    """Shards [first, first + count) of the model's `total` are on this TP rank."""

    total: int
    first: int
    count: int

    @classmethod
    def of(cls, local: int, tp_rank: int, tp_size: int, distinct: int | None = None) -> Shards:
        """`local` shards on each rank; of the ranks only `distinct` hold different ones, the others copies."""
        different = min(distinct or tp_size, tp_size)
        return cls(local * different, tp_rank * different // tp_size * local, local)


@dataclass(frozen=True, slots=True)
class TokenKV:
    """A layer of attention: KV by token and head."""

    group: int
    block_size: int
    """Tokens per block of the group's block table."""
    heads: Shards | None
    """None: the attention backend packs heads in its own way, and the block's inside is not known."""
    rank: Shards
    """The rank's share as one shard, for blocks whose inside is not known."""
    packing: str = PLAIN
    """How the platform orders the bytes of a head's tokens in a block."""


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a layer's state: `shape` on this rank, and how its dimension `axis` is cut into shards."""

    shape: tuple[int, ...]
    item_bytes: int
    axis: int
    cuts: tuple[Shards, ...]
    """In memory order along the axis; their counts add up to it."""


@dataclass(frozen=True, slots=True)
class StateKV:
    """A layer of linear attention: a state per request, overwritten token by token."""

    group: int
    parts: tuple[StatePart, ...]


LayerKV: TypeAlias = TokenKV | StateKV


def describe_layers(
    vllm_config: VllmConfig, groups: Sequence[Any], tp_rank: int, tp_size: int
) -> Mapping[str, LayerKV]:
    """Every layer of the KV cache groups that cross instances, by name."""
    layers: dict[str, LayerKV] = {}
    for index, group in enumerate(groups):
        for name in group.layer_names:
            spec = compat.layer_spec(group.kv_cache_spec, name)
            if isinstance(spec, MambaSpec):
                parts = _state_parts(vllm_config, spec, tp_rank, tp_size)
                layers[name] = StateKV(index, parts)
            else:
                distinct = _distinct_ranks(vllm_config, spec)
                heads, rank = (Shards.of(count, tp_rank, tp_size, distinct) for count in (spec.num_kv_heads, 1))
                is_packed = getattr(spec, "num_head_slots", None) not in (None, spec.num_kv_heads)
                layers[name] = TokenKV(
                    index,
                    group.kv_cache_spec.block_size,
                    None if is_packed else heads,
                    rank,
                    compat.kv_packing(vllm_config, spec),
                )
    return layers


def _distinct_ranks(vllm_config: VllmConfig, spec: Any) -> int | None:
    """How many TP ranks hold different heads of a layer, the others hold copies; None: all, as far as is known."""
    if isinstance(spec, MLAAttentionSpec):
        return 1
    told: int | None = getattr(spec, "max_tp_shards", None)
    if told or spec.num_kv_heads > 1:
        # Heads are copied only where there are too few for all ranks, and then each rank has one.
        return told
    # Which of its numbers of heads a layer has, the model's configuration does not say. To take copies for different
    # heads means that other numbers of ranks are refused; the other way round they would exchange wrong heads.
    counts = _head_counts(vllm_config)
    return counts.pop() if len(counts) == 1 else None


def _head_counts(vllm_config: VllmConfig) -> set[int]:
    """Numbers of KV heads that layers of the model may have: of windows, of full attention, of a draft model."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    models = [vllm_config.model_config, *([draft] if draft is not None else [])]
    counts = {int(model.get_total_num_kv_heads()) for model in models}
    for name, value in vars(vllm_config.model_config.hf_text_config).items():
        if name.endswith("key_value_heads") and isinstance(value, int):
            counts.add(value)
    return counts


def _state_parts(vllm_config: VllmConfig, spec: Any, tp_rank: int, tp_size: int) -> tuple[StatePart, ...]:
    distinct = 1 if getattr(spec, "tp_replicated", False) else None
    cuts_of_first, axis = _convolution_cuts(vllm_config, spec, tp_rank, tp_size)
    parts = []
    for index, (shape, dtype) in enumerate(zip(spec.shapes, spec.dtypes, strict=True)):
        if distinct is None and cuts_of_first and index == 0:
            part = StatePart(tuple(shape), dtype.itemsize, axis, cuts_of_first)
        elif distinct is None and cuts_of_first and index == 1:
            part = StatePart(tuple(shape), dtype.itemsize, 0, (Shards.of(shape[0], tp_rank, tp_size),))
        else:
            # How such a state is dealt out is not known here: ranks exchange it whole, with equal TP only.
            whole = Shards.of(1, tp_rank, tp_size, distinct)
            part = StatePart((1, *shape), dtype.itemsize, 0, (whole,))
        parts.append(part)
    return tuple(parts)


def _convolution_cuts(vllm_config: VllmConfig, spec: Any, tp_rank: int, tp_size: int) -> tuple[tuple[Shards, ...], int]:
    """How the channels of the first state are dealt out, and its channel axis; no cuts for kinds that are not known.

    The convolution runs over concatenated projections, each dealt out by itself: x of Mamba 1; x, B, C of Mamba 2;
    Q, K, V of gated delta nets, where Q and K are equally wide.
    """
    if len(spec.shapes) < 2 or len(spec.shapes[0]) != 2:
        return (), 0
    axis = 0 if compat.is_conv_state_dim_first() else 1
    channels, temporal = spec.shapes[0][axis], spec.shapes[1]
    kind = str(getattr(spec.mamba_type, "name", spec.mamba_type)).lower()

    def cut(width: int, distinct: int | None = None) -> Shards:
        return Shards.of(width, tp_rank, tp_size, distinct)

    if kind == "mamba1":
        return (cut(channels),), axis
    if kind == "mamba2":
        inner = temporal[0] * temporal[1]
        side = (channels - inner) // 2
        names = [name for name in _GROUP_COUNT_NAMES if getattr(vllm_config.model_config.hf_text_config, name, None)]
        groups = int(getattr(vllm_config.model_config.hf_text_config, names[0])) if names else tp_size
        if groups % tp_size and groups != 1:
            return (), 0
        return (cut(inner), cut(side, groups), cut(side, groups)), axis
    if kind.startswith("gdn"):
        values = temporal[0] * temporal[1]
        keys = (channels - values) // 2
        return (cut(keys), cut(keys), cut(values)), axis
    return (), 0
