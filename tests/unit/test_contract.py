"""The contract: what must agree, that a mismatch names what differs with both values, and who may let it differ."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pd import make_contract, make_geometry

from vllm_datadist_connector.protocol.contract import (
    MAX_SETTINGS,
    NOT_LISTED,
    LayoutContract,
    are_weights_comparable,
    find_mismatches,
)
from vllm_datadist_connector.protocol.handshake import decode_geometry

OURS = make_contract()
THETA = "rope_parameters.rope_theta"
CHANGES: dict[str, Any] = {
    "model": "OtherForCausalLM",
    "kv_cache_dtype": "torch.float16",
    "kv_packing": "cpu-amx",
    "settings": {**OURS.settings, THETA: "500000"},
    "weights": "tensors:22",
}
TOLD = {
    "model": "model: ours 'TinyForCausalLM', theirs 'OtherForCausalLM'",
    "kv_cache_dtype": "kv_cache_dtype: ours 'torch.bfloat16', theirs 'torch.float16'",
    "kv_packing": "kv_packing: ours 'plain', theirs 'cpu-amx'",
    "settings": f"{THETA}: ours 10000, theirs 500000",
    "weights": "weights: ours tensors:11, theirs tensors:22",
}


def test_every_field_is_tried() -> None:
    # The software decides how settings are compared, and may itself differ.
    assert {*CHANGES, "software"} == set(LayoutContract.__struct_fields__)


@pytest.mark.parametrize("field", CHANGES)
def test_a_mismatch_names_what_differs_and_both_values(field: str) -> None:
    assert find_mismatches(OURS, make_contract(**{field: CHANGES[field]})) == [TOLD[field]]


def test_all_mismatches_are_told_at_once() -> None:
    assert find_mismatches(OURS, make_contract(**CHANGES)) == list(TOLD.values())


@pytest.mark.parametrize("one_sided", [True, False], ids=["ours", "theirs"])
def test_ends_of_one_software_list_the_same_settings(one_sided: bool) -> None:
    more = make_contract(settings={**OURS.settings, "sliding_window": "128"})
    ours, theirs = (more, OURS) if one_sided else (OURS, more)
    values = ("128", NOT_LISTED) if one_sided else (NOT_LISTED, "128")
    assert find_mismatches(ours, theirs) == ["sliding_window: ours {}, theirs {}".format(*values)]


def test_ends_of_other_software_are_compared_by_what_both_list() -> None:
    """A rolling upgrade: a newer transformers lists more, and renames."""
    newer = {"software": "vllm 2, transformers 1"}
    assert find_mismatches(OURS, make_contract(settings={**OURS.settings, "new": "1"}, **newer)) == []
    assert find_mismatches(OURS, make_contract(settings={"hidden_size": "64", "new": "1"}, **newer)) == []
    assert find_mismatches(OURS, make_contract(settings={"hidden_size": "32"}, **newer)) == [
        "hidden_size: ours 64, theirs 32"
    ]


@pytest.mark.parametrize("ours", ["", "tensors:11", "given:a"])
@pytest.mark.parametrize("theirs", ["", "files:11", "file:11"])
def test_weights_that_cannot_be_compared_are_no_mismatch(ours: str, theirs: str) -> None:
    contracts = make_contract(weights=ours), make_contract(weights=theirs)
    assert not are_weights_comparable(*contracts)
    assert find_mismatches(*contracts) == []


@pytest.mark.parametrize(
    ("weights", "mismatches"), [("dummy:", []), ("tensors:1", ["weights: ours dummy:, theirs tensors:1"]), ("", [])]
)
def test_dummy_weights_are_those_of_no_checkpoint(weights: str, mismatches: list[str]) -> None:
    assert find_mismatches(make_contract(weights="dummy:"), make_contract(weights=weights)) == mismatches


@pytest.mark.parametrize(
    ("may_differ", "left"),
    [
        (["weights"], ["model", "kv_cache_dtype", "kv_packing", "settings"]),
        (["model"], ["kv_cache_dtype", "kv_packing", "settings", "weights"]),
        ([THETA], ["model", "kv_cache_dtype", "kv_packing", "weights"]),
        (["rope_parameters"], ["model", "kv_cache_dtype", "kv_packing", "weights"]),
        (["rope_param", "weight"], list(TOLD)),
        # How bytes are read is nobody's choice, whoever makes the configuration.
        (["kv_cache_dtype", "kv_packing"], list(TOLD)),
    ],
)
def test_an_operator_may_let_some_differ(may_differ: list[str], left: list[str]) -> None:
    assert find_mismatches(OURS, make_contract(**CHANGES), may_differ) == [TOLD[field] for field in left]


def test_a_refusal_stays_readable() -> None:
    ours, theirs = (make_contract(settings={f"s{index:02}": value for index in range(20)}) for value in ("1", "2"))
    assert find_mismatches(ours, theirs)[-2:] == ["s07: ours 1, theirs 2", "12 more settings of the model"]


@pytest.mark.parametrize(
    "settings",
    [
        {f"{index}": "1" for index in range(MAX_SETTINGS + 1)},
        {"n" * 161: "1"},
        {"n": "v" * 65},
        {"n": 5},
    ],
    ids=["too many", "long name", "long value", "no text"],
)
def test_settings_of_a_peer_are_bounded(settings: dict[str, Any]) -> None:
    geometry = msgspec.to_builtins(make_geometry())
    geometry["contract"]["settings"] = settings
    with pytest.raises(msgspec.ValidationError):
        decode_geometry(msgspec.msgpack.encode(geometry))


TEXT = st.text(max_size=8)
CONTRACTS = st.builds(
    lambda settings, weights, software: make_contract(settings=settings, weights=weights, software=software),
    st.dictionaries(TEXT, TEXT, max_size=4),
    st.sampled_from(["", "tensors:1", "tensors:2", "files:1"]),
    st.sampled_from(["a", "b"]),
)


@given(CONTRACTS, CONTRACTS)
def test_either_end_finds_the_same(one: LayoutContract, other: LayoutContract) -> None:
    def names(lines: list[str]) -> list[str]:
        return [line.partition(": ours ")[0] for line in lines]

    assert names(find_mismatches(one, other)) == names(find_mismatches(other, one))
    assert find_mismatches(one, one) == []
