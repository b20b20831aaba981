"""Geometry: what must agree, and that a mismatch names the field with both values."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.pd import make_cache, make_contract, make_geometry

from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.handshake import CacheLayout, LayoutContract, RankGeometry, find_mismatches


def test_round_trip() -> None:
    geometry = make_geometry()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(geometry), type=RankGeometry) == geometry


def test_same_layout_on_another_rank_of_another_host_is_compatible() -> None:
    theirs = make_geometry(tp_rank=3, cluster_id=9, host="10.0.0.1", port=1, caches=(make_cache(cache_id=5),))
    assert find_mismatches(make_geometry(), theirs) == []


def test_block_counts_may_differ() -> None:
    assert find_mismatches(make_geometry(), make_geometry(caches=(make_cache(num_blocks=9),))) == []


CONTRACT_CHANGES: dict[str, Any] = {
    "model": "OtherForCausalLM",
    "kv_cache_dtype": "torch.float16",
    "kv_layout": "NHD/plain",
    "block_sizes": (32,),
    "tp_size": 2,
    "pp_size": 2,
}


def test_every_contract_field_is_tried() -> None:
    assert set(CONTRACT_CHANGES) == set(LayoutContract.__struct_fields__)


@pytest.mark.parametrize("field", CONTRACT_CHANGES)
def test_contract_mismatch_names_field_and_values(field: str) -> None:
    theirs = make_geometry(contract=make_contract(**{field: CONTRACT_CHANGES[field]}))
    ours_value = getattr(make_contract(), field)
    assert find_mismatches(make_geometry(), theirs) == [
        f"{field}: ours {ours_value!r}, theirs {CONTRACT_CHANGES[field]!r}"
    ]


@pytest.mark.parametrize(("field", "value"), [("group", 1), ("block_bytes", 128), ("layers", ("layers.1", "layers.0"))])
def test_cache_mismatch_names_cache_and_field(field: str, value: Any) -> None:
    theirs = make_geometry(caches=(make_cache(**{field: value}),))
    (line,) = find_mismatches(make_geometry(), theirs)
    assert line.startswith(f"cache 0 {field}: ours ")
    assert line.endswith(f"theirs {value!r}")


def test_all_mismatches_are_told_at_once() -> None:
    theirs = make_geometry(contract=make_contract(tp_size=2, model="m"), caches=(make_cache(), make_cache()))
    assert [line.partition(":")[0] for line in find_mismatches(make_geometry(), theirs)] == [
        "model",
        "tp_size",
        "number of caches",
    ]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CacheLayout, {"cache_id": 0}),
        (CacheLayout, {"num_blocks": 0}),
        (CacheLayout, {"block_bytes": 2**41}),
        (CacheLayout, {"layers": []}),
        (CacheLayout, {"layers": ["l"] * 241}),
        (CacheLayout, {"addr": 5}),
        (RankGeometry, {"cluster_id": 0}),
        (RankGeometry, {"port": 65536}),
        (RankGeometry, {"host": ""}),
    ],
)
def test_geometry_from_outside_is_bounded(kind: type[Any], values: dict[str, Any]) -> None:
    good = msgspec.to_builtins(make_cache() if kind is CacheLayout else make_geometry())
    with pytest.raises(msgspec.ValidationError, match=next(iter(values))):
        msgspec.convert(good | values, kind)


class TestDigest:
    def test_is_the_same_for_the_same_prompt(self) -> None:
        assert prompt_digest([1, 2], "lora", ["m"]) == prompt_digest((1, 2), "lora", ("m",))
        assert len(prompt_digest([])) == 32

    @pytest.mark.parametrize(
        "other",
        [
            ([1], None, []),
            ([2, 1], None, []),
            ([1, 2, 0], None, []),
            ([1, 2], "a", []),
            ([1, 2], None, ["a"]),
            ([1, 2], None, ["", "a"]),
            ([513], None, []),
        ],
    )
    def test_differs_for_any_difference(self, other: tuple[list[int], str | None, list[str]]) -> None:
        assert prompt_digest([1, 2]) != prompt_digest(*other)

    def test_parts_cannot_run_into_each_other(self) -> None:
        assert prompt_digest([1], "ab", ["c"]) != prompt_digest([1], "a", ["bc"])
        assert prompt_digest([1], None, ["a", "b"]) != prompt_digest([1], None, ["b", "a"])

    def test_is_the_same_on_every_machine(self) -> None:
        # Both ends of a rolling upgrade compute it: a change of this value is a change of the protocol version.
        assert prompt_digest([1, 2**40, 0], "lora", ["image"]) == "6a15978f306f009a0e4a9e390bc6a266"

    def test_takes_text_that_utf_8_cannot(self) -> None:
        assert prompt_digest([1], "\ud800") != prompt_digest([1], "\ud801")
