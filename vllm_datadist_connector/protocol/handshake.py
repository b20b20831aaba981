"""Geometry: how one worker rank's KV cache lies in its registered caches, and whether two ranks can exchange blocks.

What must agree is the *layout contract*, never the vLLM version: rolling upgrades pair different versions.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_Name = Annotated[str, msgspec.Meta(max_length=512)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class CacheLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One registered cache: tensors of one stride class. Tensor i holds the KV of layers[i]."""

    cache_id: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    group: Annotated[int, msgspec.Meta(ge=0, le=63)]
    """KV cache group whose block table indexes this cache."""
    num_blocks: _Count
    block_bytes: _Count
    layers: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1, max_length=240)]


class LayoutContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both ends must agree on for P's bytes to mean the same on D."""

    model: _Name
    """Architecture and sizes of the model (not its path: instances may mount it at different places)."""
    kv_cache_dtype: _Name
    kv_layout: _Name
    """Memory order inside a block, with the instruction set that packed it where a platform packs."""
    block_sizes: tuple[int, ...]
    """Tokens per block, per KV cache group."""
    tp_size: int
    pp_size: int


class RankGeometry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a D rank must know of a P rank to link with it and to plan transfers."""

    tp_rank: int
    pp_rank: int
    cluster_id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    """Of the engine's listener; 0 for a rank that does not listen (a pure consumer)."""
    contract: LayoutContract
    caches: Annotated[tuple[CacheLayout, ...], msgspec.Meta(max_length=4096)]


def find_mismatches(ours: RankGeometry, theirs: RankGeometry) -> list[str]:
    """Why two ranks cannot exchange blocks: one line per field with both values; empty if they can."""
    found = [
        f"{name}: ours {getattr(ours.contract, name)!r}, theirs {getattr(theirs.contract, name)!r}"
        for name in LayoutContract.__struct_fields__
        if getattr(ours.contract, name) != getattr(theirs.contract, name)
    ]
    if len(ours.caches) != len(theirs.caches):
        found.append(f"number of caches: ours {len(ours.caches)}, theirs {len(theirs.caches)}")
    for index, (our, their) in enumerate(zip(ours.caches, theirs.caches, strict=False)):
        found += [
            f"cache {index} {name}: ours {getattr(our, name)!r}, theirs {getattr(their, name)!r}"
            for name in ("group", "block_bytes", "layers")
            if getattr(our, name) != getattr(their, name)
        ]
    return found
