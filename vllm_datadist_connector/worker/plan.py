"""Pure block mapping: (pairings with P's ranks, block tables, range of tokens) -> PullKvBlocks calls.

What of a block moves was settled when the caches were paired; here block ids become blocks of the views by which both
sides address their memory. No sockets, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_datadist_connector.protocol.handshake import CacheLayout, RankGeometry
from vllm_datadist_connector.protocol.params import BlockIds
from vllm_datadist_connector.worker.pairing import Int64s, Pairing

NULL_BLOCK = 0
"""vLLM's placeholder in a block table: tokens that no sliding window reaches any more. No request ever owns it."""


class PlanError(ValueError):
    """Block ids that do not fit the geometries; says which."""


class TokenRange(NamedTuple):
    """Tokens [first, end) of a request, and the blocks that hold them on either side, per KV cache group.

    `remote` counts from the request's first token, `local` from the block with token `local_first`, or `first`. A group
    of states has one block on either side.
    """

    first: int
    end: int
    remote: BlockIds
    local: BlockIds
    held: int
    """Tokens whose KV the remote blocks hold: a state is that after the last of them."""
    local_first: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BlockPull:
    """One PullKvBlocks call: block src_blocks[i] of P's view into block dst_blocks[i] of ours.

    Attributes:
        dst_index: which of our caches, to be addressed in blocks of `granule` bytes.
        src_layers, dst_layers: first and last tensor on either side.
    """

    src_cache_id: int
    dst_index: int
    granule: int
    src_blocks: Int64s
    dst_blocks: Int64s
    src_layers: tuple[int, int]
    dst_layers: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return len(self.src_blocks) * self.granule * (self.src_layers[1] - self.src_layers[0] + 1)


def plan_pull(
    ours: RankGeometry, theirs: RankGeometry, pairings: Sequence[Pairing], tokens: TokenRange
) -> list[BlockPull]:
    """Calls that fetch one rank's share of a range of tokens.

    Raises:
        PlanError: a block table is missing, too short, or names a block outside its cache.
    """
    planned = (plan_layers(ours, theirs, pairing, tokens, range(pairing.num_layers)) for pairing in pairings)
    return [pull for pull in planned if pull is not None]


def plan_layers(
    ours: RankGeometry, theirs: RankGeometry, pairing: Pairing, tokens: TokenRange, layers: range
) -> BlockPull | None:
    """The call that fetches a range of tokens of some of a pairing's layers; None if it would move nothing.

    Args:
        layers: adjacent ones, counted from the pairing's first.

    Raises:
        PlanError: a block table is missing, too short, or names a block outside its cache.
    """
    for side, groups, group in (
        ("remote", tokens.remote, pairing.src.group),
        ("local", tokens.local, pairing.dst.group),
    ):
        if group >= len(groups):
            raise PlanError(f"no {side} blocks for KV cache group {group}: there are {len(groups)} groups")
    if pairing.chunk_tokens:
        src, dst = _token_chunks(ours, theirs, pairing, tokens)
    else:
        src, dst = _states(pairing, tokens)
    if not len(src):
        return None
    return BlockPull(
        src_cache_id=pairing.src_cache_id,
        dst_index=pairing.dst_index,
        granule=pairing.granule,
        src_blocks=src,
        dst_blocks=dst,
        src_layers=(pairing.src_first + layers[0], pairing.src_first + layers[-1]),
        dst_layers=(pairing.dst_first + layers[0], pairing.dst_first + layers[-1]),
    )


def _states(pairing: Pairing, tokens: TokenRange) -> tuple[Int64s, Int64s]:
    src, dst = tokens.remote[pairing.src.group], tokens.local[pairing.dst.group]
    if tokens.end != tokens.held:
        raise PlanError(f"group {pairing.dst.group}: P's state is that after {tokens.held} tokens, not {tokens.end}")
    if len(src) != 1 or len(dst) != 1:
        raise PlanError(f"group {pairing.dst.group}: {len(src)} remote states for {len(dst)} local ones; it takes one")
    src_blocks, dst_blocks = _checked("remote", src, pairing.src, 1), _checked("local", dst, pairing.dst, 1)
    if NULL_BLOCK in (src[0], dst[0]):
        raise PlanError(f"group {pairing.dst.group}: the block of a state is a null block")
    return _granules(pairing, src_blocks, dst_blocks, np.zeros(1, np.int64), np.zeros(1, np.int64))


def _token_chunks(
    ours: RankGeometry, theirs: RankGeometry, pairing: Pairing, tokens: TokenRange
) -> tuple[Int64s, Int64s]:
    src, dst, chunk = pairing.src, pairing.dst, pairing.chunk_tokens
    src_table, dst_table = tokens.remote[src.group], tokens.local[dst.group]
    src_size, dst_size = theirs.block_sizes[src.group], ours.block_sizes[dst.group]
    local_first = tokens.first if tokens.local_first is None else tokens.local_first
    local_start = local_first // dst_size * dst_size
    covered = min(local_start + len(dst_table) * dst_size, len(src_table) * src_size)
    if covered < tokens.end:
        raise PlanError(
            f"group {dst.group}: {len(src_table)} remote blocks of {src_size} tokens and {len(dst_table)} local ones of"
            f" {dst_size}, from token {local_start}, do not reach token {tokens.end}"
        )
    src_ids = _checked("remote", src_table, src, src_size // src.block_tokens)
    dst_ids = _checked("local", dst_table, dst, dst_size // dst.block_tokens)
    end = min(-(-tokens.end // max(src_size, dst_size)) * max(src_size, dst_size), covered)
    at = np.arange(tokens.first // dst_size * dst_size, end, chunk, dtype=np.int64)
    dst_id, src_id = dst_ids[(at - local_start) // dst_size], src_ids[at // src_size]
    wanted = dst_id != NULL_BLOCK
    gone = at[wanted & (src_id == NULL_BLOCK)]
    if gone.size:
        # A window may begin inside our first block: of it P's smaller blocks have only what the window reaches.
        first_wanted = int(np.flatnonzero(dst_ids != NULL_BLOCK)[0])
        last = local_start + (first_wanted + 1) * dst_size - src_size
        if gone[-1] >= last:
            raise PlanError(f"group {dst.group}: P no longer has token {int(gone[-1])}")
        wanted &= src_id != NULL_BLOCK
    at, dst_id, src_id = at[wanted], dst_id[wanted], src_id[wanted]
    src_block = src_id * (src_size // src.block_tokens) + at % src_size // src.block_tokens
    dst_block = dst_id * (dst_size // dst.block_tokens) + at % dst_size // dst.block_tokens
    return _granules(pairing, src_block, dst_block, at % src.block_tokens // chunk, at % dst.block_tokens // chunk)


def _granules(
    pairing: Pairing, src_block: Int64s, dst_block: Int64s, src_chunk: Int64s, dst_chunk: Int64s
) -> tuple[Int64s, Int64s]:
    """Blocks of the views, of every chunk in turn. src_chunk, dst_chunk: which chunk of its block each is."""

    def expand(block: Int64s, stride: int, chunk: Int64s, steps: Int64s, offsets: Int64s) -> Int64s:
        start = block * (stride // pairing.granule)
        return (start[:, None] + chunk[:, None] * steps[None, :] + offsets[None, :]).ravel()

    return (
        expand(src_block, pairing.src.block_stride, src_chunk, pairing.src_steps, pairing.src_offsets),
        expand(dst_block, pairing.dst.block_stride, dst_chunk, pairing.dst_steps, pairing.dst_offsets),
    )


def _checked(side: str, table: Sequence[int], cache: CacheLayout, blocks_per_entry: int) -> Int64s:
    """A block table as an array; every id must lie inside the cache."""
    limit = cache.num_blocks // blocks_per_entry
    if table and not (min(table) >= 0 and max(table) < limit):
        raise PlanError(f"group {cache.group}: {side} block ids {min(table)}..{max(table)}, allowed: 0..{limit - 1}")
    return np.asarray(table, dtype=np.int64)
