"""Geometry: what must agree, that a mismatch names the field with both values, and what no geometry may say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pd import BLOCK_SIZE, make_cache, make_geometry, make_segment

from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.handshake import (
    MAX_BYTES,
    CacheLayout,
    RankGeometry,
    Segment,
    View,
    decode_geometry,
    segment_end,
)

STATE = make_segment(rows=1, row_stride=0, row_bytes=64, row_tokens=0)


def test_round_trip() -> None:
    geometry = make_geometry()
    assert decode_geometry(msgspec.msgpack.encode(geometry)) == geometry


GOOD: dict[type[Any], Any] = {
    CacheLayout: make_cache(),
    RankGeometry: make_geometry(),
    Segment: make_segment(),
    View: View(granule=64, cache_id=1),
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CacheLayout, {"group": 64}),
        (CacheLayout, {"group": -1}),
        (CacheLayout, {"num_blocks": 0}),
        (CacheLayout, {"block_tokens": -1}),
        (CacheLayout, {"block_stride": 0}),
        (CacheLayout, {"block_bytes": 2**41}),
        (CacheLayout, {"segments": []}),
        (CacheLayout, {"segments": [msgspec.to_builtins(make_segment())] * 17}),
        (CacheLayout, {"layers": []}),
        (CacheLayout, {"layers": ["l"] * 241}),
        (CacheLayout, {"layers": ["l" * 513]}),
        (CacheLayout, {"views": [{"granule": 64, "cache_id": 1}] * 17}),
        (CacheLayout, {"addr": 5}),
        (Segment, {"offset": -1}),
        (Segment, {"total": 0}),
        (Segment, {"first": -1}),
        (Segment, {"count": 0}),
        (Segment, {"shard_stride": -64}),
        (Segment, {"shard_stride": 2**41}),
        (Segment, {"rows": 0}),
        (Segment, {"rows": 2**25}),
        (Segment, {"row_stride": -1}),
        (Segment, {"row_bytes": 0}),
        (Segment, {"row_tokens": -1}),
        (View, {"granule": 0}),
        (View, {"cache_id": 0}),
        (View, {"cache_id": 2**63 - 1}),
        (RankGeometry, {"tp_rank": 4096}),
        (RankGeometry, {"tp_size": 0}),
        (RankGeometry, {"pp_size": 4097}),
        (RankGeometry, {"cluster_id": 0}),
        (RankGeometry, {"port": 65536}),
        (RankGeometry, {"host": ""}),
        (RankGeometry, {"block_sizes": []}),
        (RankGeometry, {"block_sizes": [16] * 65}),
        (RankGeometry, {"block_sizes": [-1]}),
    ],
)
def test_geometry_from_outside_is_bounded(kind: type[Any], values: dict[str, Any]) -> None:
    good = msgspec.to_builtins(GOOD[kind])
    with pytest.raises(msgspec.ValidationError, match=next(iter(values))):
        msgspec.convert(good | values, kind)


def two(**changes: Any) -> Segment:
    """Two of four heads."""
    return make_segment(**({"total": 4, "first": 1, "count": 2, "shard_stride": 64} | changes))


INCONSISTENT: dict[str, tuple[CacheLayout, str]] = {
    "a group that is not there": (make_cache(group=1), "group 1, there are 1"),
    "blocks that overlap": (make_cache(block_stride=63), "8 blocks of 64 bytes at distances of 63"),
    "offsets beyond 64 bits": (
        make_cache(num_blocks=2**40, block_stride=2**23),
        f"{2**40} blocks of 64 bytes at distances of {2**23}",
    ),
    "a head beyond the last": (make_cache(block_bytes=128, block_stride=128, segments=(two(first=3),)), "3..4 of 4"),
    "more heads than there are": (make_cache(block_bytes=128, block_stride=128, segments=(two(total=1),)), "1..2 of 1"),
    "an offset behind the block": (make_cache(segments=(make_segment(offset=1),)), "ends at byte 65 of a block of 64"),
    "rows that leave the block": (make_cache(segments=(make_segment(row_stride=5),)), "ends at byte 79 of"),
    "heads that leave the block": (make_cache(segments=(two(),)), "ends at byte 128 of a block of 64"),
    "the last row is too long": (make_cache(segments=(make_segment(row_bytes=5),)), "ends at byte 65 of"),
    "only the second segment is bad": (
        make_cache(segments=(make_segment(), make_segment(offset=2**40))),
        f"ends at byte {2**40 + 64} of",
    ),
    "fewer rows than tokens": (make_cache(segments=(make_segment(rows=8),)), "8 rows of 1 tokens in blocks of 16"),
    "rows of too many tokens": (make_cache(segments=(make_segment(row_tokens=2),)), "16 rows of 2 tokens in blocks"),
    "tokens in a block of states": (make_cache(block_tokens=0), "16 rows of 1 tokens in blocks of 0 tokens"),
    "a state in a block of tokens": (make_cache(segments=(STATE,)), "a state in blocks of 16 tokens"),
}


@pytest.mark.parametrize(("cache", "problem"), INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_inconsistent_geometry_is_refused(cache: CacheLayout, problem: str) -> None:
    geometry = make_geometry(caches=(make_cache(), cache))
    with pytest.raises(msgspec.ValidationError, match=f"cache 1: .*{problem}"):
        decode_geometry(msgspec.msgpack.encode(geometry))


CONSISTENT: dict[str, RankGeometry] = {
    "padding behind each block": make_geometry(caches=(make_cache(block_stride=100),)),
    "the last group": make_geometry(block_sizes=(16, 16), caches=(make_cache(group=1),)),
    "as large as can be": make_geometry(caches=(make_cache(num_blocks=2**40, block_stride=2**22),)),
    "the last heads": make_geometry(caches=(make_cache(block_bytes=128, block_stride=128, segments=(two(first=2),)),)),
    "a state": make_geometry(block_sizes=(0,), caches=(make_cache(block_tokens=0, segments=(STATE,)),)),
    "one row of all tokens": make_geometry(
        caches=(make_cache(segments=(make_segment(rows=1, row_bytes=64, row_tokens=BLOCK_SIZE),)),)
    ),
    "no layers at all": make_geometry(caches=()),
}


@pytest.mark.parametrize("geometry", CONSISTENT.values(), ids=CONSISTENT.keys())
def test_consistent_geometry_is_taken(geometry: RankGeometry) -> None:
    assert decode_geometry(msgspec.msgpack.encode(geometry)) == geometry


@given(st.binary(max_size=200), st.data())
def test_bytes_that_are_no_geometry(noise: bytes, data: st.DataObject) -> None:
    """What the driver catches is all that may come."""
    good = bytearray(msgspec.msgpack.encode(make_geometry()))
    at = data.draw(st.integers(0, len(good) - 1))
    for candidate in (noise, bytes(good[:at]) + noise + bytes(good[at + 1 :])):
        try:
            geometry = decode_geometry(candidate)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        for cache in geometry.caches:
            assert cache.num_blocks * cache.block_stride <= MAX_BYTES
            assert max(map(segment_end, cache.segments)) <= cache.block_bytes <= cache.block_stride


class TestDigest:
    def test_is_the_same_for_the_same_prompt(self) -> None:
        assert prompt_digest([1, 2], "lora", ["m"]) == prompt_digest((1, 2), "lora", ("m",))
        assert len(prompt_digest([])) == 32

    @pytest.mark.parametrize(
        "other",
        [
            ([1], "", []),
            ([2, 1], "", []),
            ([1, 2, 0], "", []),
            ([1, 2], "a", []),
            ([1, 2], "", ["a"]),
            ([1, 2], "", ["", "a"]),
            ([513], "", []),
        ],
    )
    def test_differs_for_any_difference(self, other: tuple[list[int], str, list[str]]) -> None:
        assert prompt_digest([1, 2]) != prompt_digest(*other)

    def test_parts_cannot_run_into_each_other(self) -> None:
        assert prompt_digest([1], "ab", ["c"]) != prompt_digest([1], "a", ["bc"])
        assert prompt_digest([1], "", ["a", "b"]) != prompt_digest([1], "", ["b", "a"])

    def test_is_the_same_on_every_machine(self) -> None:
        # Both ends of a rolling upgrade compute it: a change of this value is a change of the protocol version.
        assert prompt_digest([1, 2**40, 0], "lora", ["image"]) == "161167499364f40c8b19c03c9c50bbc2"

    def test_takes_text_that_utf_8_cannot(self) -> None:
        assert prompt_digest([1], "\ud800") != prompt_digest([1], "\ud801")
