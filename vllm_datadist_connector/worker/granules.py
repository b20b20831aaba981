"""Granules: in blocks of how many bytes a cache is worth registering. Pure functions of its layout."""

from __future__ import annotations

import math

from vllm_datadist_connector.protocol.handshake import CacheLayout

VIEW_TOKENS = (128, 64, 32, 16)
"""Tokens of the finer views that P registers for peers with smaller blocks: usual block sizes."""

LINE_BYTES = 64
"""Of the finest view, for a peer whose blocks lie at distances that P's rows do not divide."""


def granules_of(cache: CacheLayout) -> list[int]:
    """Block sizes of the views that an owner registers, coarsest first: whole blocks, shards, some tokens, rows.

    P does not know its peers in advance; every pairing finds one of these that divides all that it moves.
    """
    block, row = math.gcd(cache.block_bytes, cache.block_stride), _granule(cache, 1)
    tokens = [chunk(cache, each) for each in VIEW_TOKENS if each < cache.block_tokens for chunk in (_whole, _granule)]
    return sorted({block, _granule(cache, 0), *tokens, row, math.gcd(row, LINE_BYTES)}, reverse=True)


def _whole(cache: CacheLayout, tokens: int) -> int:
    """The largest unit in which that many tokens of all shards can be addressed, where they are one run; otherwise as
    _granule(). Of tokens before heads a chunk would take thousands of rows."""
    granule = cache.block_stride
    for each in cache.segments:
        row = each.count * each.row_bytes
        is_run = each.lanes == 1 and each.count * max(each.shard_stride, each.row_bytes) == row and each.row_tokens > 0
        if not is_run or (each.rows > 1 and each.row_stride != row) or tokens % each.row_tokens:
            return _granule(cache, tokens)
        granule = math.gcd(granule, tokens // each.row_tokens * row, each.offset)
    return granule


def _granule(cache: CacheLayout, tokens: int) -> int:
    """The largest unit in which whole shards (tokens 0), or that many tokens of one, can be addressed."""
    granule = cache.block_stride
    for segment in cache.segments:
        dense = segment.rows == 1 or segment.row_stride == segment.row_bytes
        rows = segment.rows
        if tokens:
            rows = math.gcd(rows, max(1, tokens // segment.row_tokens)) if segment.row_tokens else 1
        run = segment.row_bytes * rows if dense else math.gcd(segment.row_bytes, segment.row_stride)
        if not tokens and dense and segment.lane_stride == run:
            run *= segment.lanes
        elif segment.lanes > 1:
            run = math.gcd(run, segment.lane_stride)
        granule = math.gcd(granule, run, segment.offset, segment.shard_stride if segment.count > 1 else 0)
    return granule
