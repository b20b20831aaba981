"""Side-channel frames: round trip, and every malformed frame is a ProtocolError and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pd import OTHER_TOKEN, TOKEN

from vllm_datadist_connector.protocol import messages
from vllm_datadist_connector.protocol.messages import (
    MAX_BODY_BYTES,
    MAX_TOKENS_PER_MESSAGE,
    Confirm,
    Confirmed,
    Hello,
    Meta,
    ProtocolError,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    decode_request,
    decode_response,
    encode,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

REQUESTS: list[messages.Request] = [
    Hello(id=1, engine_id="p", incarnation=TOKEN, pp_rank=0, tp_rank=4095),
    Confirm(id=2, token=TOKEN, generation=3, prompt_digest=OTHER_TOKEN, blocks=((1, 2), ())),
    Renew(id=3, tokens=(TOKEN, OTHER_TOKEN)),
    Release(id=2**62, tokens=()),
]
RESPONSES: list[messages.Response] = [
    Meta(id=1, geometry=b"\0\xff"),
    Confirmed(id=2, held=True, reason=""),
    Renewed(id=3, gone=(TOKEN,)),
    Released(id=4),
    Refused(id=0, reason="no"),
]


def frame(body: bytes, magic: bytes = b"DDSC", version: int = PROTOCOL_VERSION) -> bytes:
    return struct.pack("<4sH", magic, version) + body


def packed(value: Any) -> bytes:
    return frame(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_round_trip(message: messages.Request) -> None:
    assert decode_request(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_response(encode(message))


@pytest.mark.parametrize("message", RESPONSES, ids=lambda message: type(message).__name__)
def test_responses_round_trip(message: messages.Response) -> None:
    assert decode_response(encode(message)) == message
    with pytest.raises(ProtocolError):
        decode_request(encode(message))


def test_foreign_version_is_named_before_the_body_is_read() -> None:
    with pytest.raises(ProtocolError, match=f"protocol version 9; this instance speaks {PROTOCOL_VERSION}"):
        decode_request(frame(b"\xc1", version=9))


MALFORMED = {
    "empty": b"",
    "shorter than the envelope": b"DDSC\1",
    "no body": frame(b""),
    "magic": frame(msgspec.msgpack.encode({"type": "Released", "id": 1}), magic=b"HTTP"),
    "opcode": frame(b"\xc1"),
    "text that is not UTF-8": frame(b"\x82\xa4type\xa5Hello\xa9engine_id\xa2\xff\xff"),
    "tag that is not UTF-8": frame(b"\x81\xa4type\xa4\xff\xff\xff\xff"),
    "nesting": frame(b"\x91" * 5000),
    "truncated": encode(REQUESTS[0])[:-1],
    "trailing byte": encode(REQUESTS[0]) + b"\0",
    "no tag": packed({"id": 1}),
    "unknown tag": packed({"type": "Shutdown", "id": 1}),
    "array": packed([1, 2]),
    "unknown field": packed({"type": "Renew", "id": 1, "tokens": [], "more": 1}),
    "missing field": packed({"type": "Renew", "id": 1}),
    "negative id": packed({"type": "Renew", "id": -1, "tokens": []}),
    "big id": packed({"type": "Renew", "id": 2**63, "tokens": []}),
    "id is a bool": packed({"type": "Renew", "id": True, "tokens": []}),
    "short token": packed({"type": "Renew", "id": 1, "tokens": [TOKEN[1:]]}),
    "token and newline": packed({"type": "Renew", "id": 1, "tokens": [TOKEN + "\n"]}),
    "too many tokens": packed({"type": "Renew", "id": 1, "tokens": [TOKEN] * (MAX_TOKENS_PER_MESSAGE + 1)}),
    "rank": packed({"type": "Hello", "id": 1, "engine_id": "p", "incarnation": TOKEN, "pp_rank": 0, "tp_rank": 4096}),
    "oversize": frame(b"\0" * (MAX_BODY_BYTES + 1)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data: bytes) -> None:
    for decode in (decode_request, decode_response):
        with pytest.raises(ProtocolError):
            decode(data)


def test_what_cannot_be_sent_is_refused_by_the_sender() -> None:
    with pytest.raises(ProtocolError, match=f"Meta of .* exceeds {MAX_BODY_BYTES}"):
        encode(Meta(id=1, geometry=b"\0" * MAX_BODY_BYTES))
    with pytest.raises(ProtocolError, match="Hello"):
        encode(Hello(id=1, engine_id="\ud800", incarnation=TOKEN, pp_rank=0, tp_rank=0))


def test_a_full_batch_of_tokens_fits() -> None:
    assert decode_request(encode(Renew(id=1, tokens=(TOKEN,) * MAX_TOKENS_PER_MESSAGE)))


def _decodes_or_refuses(data: bytes) -> None:
    for decode in (decode_request, decode_response):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_random_bodies(body: bytes) -> None:
    _decodes_or_refuses(frame(body))


@given(st.sampled_from([*REQUESTS, *RESPONSES]), st.data())
def test_flipped_bytes(message: Any, data: st.DataObject) -> None:
    mutated = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    _decodes_or_refuses(bytes(mutated))
