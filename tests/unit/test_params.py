"""kv_transfer_params: what is built is parsed back; whatever else comes is refused as ParamsError, never otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pd import OTHER_TOKEN, make_params, make_ticket

from vllm_datadist_connector.protocol.params import (
    EXTRA_KEY,
    ParamsError,
    RemotePrefill,
    names_earlier_turn,
    parse_remote_prefill,
    wants_remote_decode,
    wants_remote_prefill,
    was_remote_prefill,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

NIXL_FIELDS = {
    "do_remote_prefill": bool,
    "do_remote_decode": bool,
    "remote_block_ids": list,
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": str,
    "remote_port": int,
    "tp_size": int,
    "dcp_size": int,
    "pp_size": int,
    "remote_num_tokens": int,
    "remote_blocks_expiry_time": type(None),
    "transfer_mode": str,
}

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["1", "nan", "-0", "1e9"])
)
json_values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


def test_round_trip_through_json() -> None:
    ticket = make_ticket(generation=9)
    params = json.loads(json.dumps(make_params(((3, 1, 2),), port=5, num_tokens=40, tp_size=2, ticket=ticket)))
    assert parse_remote_prefill(params) == RemotePrefill(
        remote_engine_id="engine-p",
        remote_request_id="cmpl-p-0-00000000",
        remote_host="127.0.0.1",
        remote_port=5,
        remote_block_ids=((3, 1, 2),),
        remote_num_tokens=40,
        ticket=ticket,
    )


def test_fields_are_those_of_the_nixl_flavour_and_one_of_ours() -> None:
    params = make_params()
    assert {name: type(value) for name, value in params.items() if name != EXTRA_KEY} == NIXL_FIELDS
    assert params["remote_block_ids"] == [[3, 1, 2]]
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
    assert set(make_params(ticket=None)) == set(NIXL_FIELDS)


# What llm-d's sidecar copies from an answer to the conversation's next prompt.
COPIED = set(NIXL_FIELDS) - {"remote_blocks_expiry_time", "transfer_mode"}


def test_a_router_that_knows_the_nixl_fields_only_carries_the_ticket() -> None:
    params = make_params()
    copied = json.loads(json.dumps({name: params[name] for name in COPIED}))
    assert EXTRA_KEY not in copied
    assert parse_remote_prefill(copied) == parse_remote_prefill(params)
    assert was_remote_prefill(copied)
    assert not was_remote_prefill({**copied, "remote_request_id": "cmpl-p-0-00000000"})


def test_a_ticket_under_its_own_key_counts() -> None:
    ticket = make_ticket(token=OTHER_TOKEN)
    params = {**make_params(), EXTRA_KEY: make_params(ticket=ticket)[EXTRA_KEY]}
    assert parse_remote_prefill(params).ticket == ticket
    assert parse_remote_prefill(params).remote_request_id == "cmpl-p-0-00000000"


@pytest.mark.parametrize("carried", ["", "5", "!", "\u00e9", "e30=", "W10=", "eyJ2ZXJzaW9uIjo1fQ==", "e" * 4000])
def test_what_is_carried_and_no_ticket_is_refused(carried: str) -> None:
    params = make_params()
    del params[EXTRA_KEY]
    params["remote_request_id"] = f"cmpl-p:datadist:{carried}"
    with pytest.raises(ParamsError):
        parse_remote_prefill(params)


def test_request_ids_that_leave_no_room_carry_nothing() -> None:
    request_id = "x" * 4000
    params = make_params(request_id=request_id)
    assert params["remote_request_id"] == request_id
    assert parse_remote_prefill(params).remote_request_id == request_id


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"remote_port": 40000.0}, 40000),
        ({"remote_port": "40000"}, 40000),
        ({"remote_block_ids": [3, 1, 2]}, ((3, 1, 2),)),
        ({"remote_block_ids": [3.0, "1", 2]}, ((3, 1, 2),)),
        ({"remote_block_ids": [[3.0], ["1"]]}, ((3,), (1,))),
        ({"remote_block_ids": [[]]}, ((),)),
        ({"remote_num_tokens": "48"}, 48),
    ],
)
def test_tolerated_forms(changes: dict[str, Any], expected: object) -> None:
    (field,) = changes
    assert getattr(parse_remote_prefill(make_params() | changes), field) == expected


def test_unknown_fields_are_tolerated() -> None:
    params = make_params() | {"remote_registration_generation": 3, "remote_prefill_cached_tokens": 0}
    params[EXTRA_KEY]["later"] = True
    assert parse_remote_prefill(params) == parse_remote_prefill(make_params())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("remote_engine_id", None),
        ("remote_engine_id", ""),
        ("remote_request_id", 5),
        ("remote_host", ""),
        ("remote_host", "h" * 256),
        ("remote_port", 0),
        ("remote_port", 65536),
        ("remote_port", True),
        ("remote_port", 5.5),
        ("remote_block_ids", None),
        ("remote_block_ids", []),
        ("remote_block_ids", [[-1]]),
        ("remote_block_ids", [[2**41]]),
        ("remote_block_ids", [True]),
        ("remote_block_ids", {"0": 1}),
        ("remote_block_ids", [[0]] * 65),
        ("remote_block_ids", [[0] * (2**18 + 1)]),
        ("remote_num_tokens", -1),
        ("remote_num_tokens", 10**40),
        ("remote_num_tokens", float("inf")),
        (EXTRA_KEY, None),
        (EXTRA_KEY, []),
    ],
)
def test_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ParamsError, match=field):
        parse_remote_prefill(make_params() | {field: value})


@pytest.mark.parametrize("field", ["remote_engine_id", "remote_request_id", "remote_host", "remote_port", EXTRA_KEY])
def test_missing_field(field: str) -> None:
    params = make_params(request_id="cmpl-p" * 650)  # which leaves the ticket no second place
    del params[field]
    with pytest.raises(ParamsError, match=field):
        parse_remote_prefill(params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", PROTOCOL_VERSION + 1),
        ("version", str(PROTOCOL_VERSION)),
        ("version", None),
        ("incarnation", OTHER_TOKEN.upper()),
        ("incarnation", OTHER_TOKEN + "\n"),
        ("token", OTHER_TOKEN[1:]),
        ("token", None),
        ("generation", 0),
        ("generation", 2**63),
        # A lease of next to no time would have D renew it without pause.
        ("lease_s", 1e-300),
        ("lease_s", 0.99),
        ("lease_s", 3601),
        ("lease_s", float("nan")),
        ("prompt_digest", "g" * 32),
        ("block_sizes", None),
        ("block_sizes", [-1]),
        ("block_sizes", [2**24 + 1]),
        ("block_sizes", [16] * 65),
        ("block_sizes", 16),
    ],
)
def test_bad_ticket_is_refused_by_name(field: str, value: object) -> None:
    params = make_params()
    params[EXTRA_KEY][field] = value
    with pytest.raises(ParamsError, match=rf"{EXTRA_KEY}\.{field}"):
        parse_remote_prefill(params)


def test_version_is_compared_before_anything_else() -> None:
    with pytest.raises(ParamsError, match=f"P speaks 9, we speak {PROTOCOL_VERSION}"):
        parse_remote_prefill({EXTRA_KEY: {"version": 9}})


def test_error_text_is_bounded() -> None:
    with pytest.raises(ParamsError) as caught:
        parse_remote_prefill(make_params() | {"remote_num_tokens": "1" * 100_000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("flag", [False, None, 1, "true", [], {}])
def test_only_true_is_a_wish(flag: object) -> None:
    assert not wants_remote_prefill({"do_remote_prefill": flag})
    assert not wants_remote_decode({"do_remote_decode": flag})


@pytest.mark.parametrize("params", [None, [], "do_remote_prefill", 5])
def test_params_of_any_type(params: object) -> None:
    assert not wants_remote_prefill(params)
    assert not wants_remote_decode(params)
    assert not names_earlier_turn(params)
    assert not was_remote_prefill(params)


def test_params_for_the_next_turn_are_those_of_a_p_request() -> None:
    """They come back from D, and go to P with the conversation's next prompt as they are."""
    params = json.loads(json.dumps(make_params(((3, 1),), num_tokens=20, for_next_turn=True)))
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (False, True)
    assert wants_remote_decode(params)
    assert names_earlier_turn(params)
    assert not wants_remote_prefill(params)
    remote = parse_remote_prefill(params)
    assert (remote.remote_block_ids, remote.remote_num_tokens) == (((3, 1),), 20)


@pytest.mark.parametrize("blocks", [None, [], [[]], [[], []], 5, "1", {"0": [1]}, ...])
def test_a_first_turn_names_no_earlier_one(blocks: object) -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    assert not names_earlier_turn(params if blocks is ... else params | {"remote_block_ids": blocks})


def test_a_d_request_is_known_after_its_pull_was_taken_up() -> None:
    params = make_params()
    assert was_remote_prefill(params)
    params["do_remote_prefill"] = False
    assert was_remote_prefill(params)
    assert not names_earlier_turn(params)
    assert not was_remote_prefill(make_params(for_next_turn=True))


@pytest.mark.parametrize(
    "params",
    [
        make_params(ticket=None),
        make_params() | {EXTRA_KEY: None},
        make_params() | {EXTRA_KEY: "lease"},
        {"do_remote_prefill": True},
        {"do_remote_prefill": False},
        {"remote_block_ids": [[1]]},
        {},
    ],
)
def test_a_d_request_without_a_lease_of_ours_is_none(params: dict[str, Any]) -> None:
    """Another connector's, or one whose P kept nothing: whoever sent it knows nothing of ours to come back for."""
    assert not was_remote_prefill(params)


def _parses_or_refuses(params: dict[str, Any]) -> None:
    try:
        remote = parse_remote_prefill(params)
    except ParamsError:
        return
    assert 1 <= remote.remote_port <= 65535
    assert all(0 <= block <= 2**40 for group in remote.remote_block_ids for block in group)
    assert remote.ticket.lease_s >= 1


@given(st.dictionaries(st.text() | st.sampled_from(sorted(make_params())), json_values))
def test_arbitrary_json_never_raises_anything_else(params: dict[str, Any]) -> None:
    _parses_or_refuses(params)


@given(st.sampled_from(sorted(make_params())), json_values)
def test_mutated_params_never_raise_anything_else(field: str, value: object) -> None:
    _parses_or_refuses(make_params() | {field: value})


@given(st.sampled_from(sorted(make_params()[EXTRA_KEY])), json_values)
def test_mutated_tickets_never_raise_anything_else(field: str, value: object) -> None:
    params = make_params()
    params[EXTRA_KEY][field] = value
    _parses_or_refuses(params)
