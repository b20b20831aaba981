"""Side-channel messages between a D (client) and a P (server), in msgpack.

    D scheduler ── Renew, Release ──> P scheduler      leases stay alive while D queues; blocks come back at once
    D worker    ── Hello, Confirm ──> P scheduler      geometry of a rank; was the lease held while we read?

A frame is a 6-byte envelope (magic, protocol version) and a body, so that versions are compared before anything else is
decoded. Every request carries an `id` that its answer repeats. Requests are idempotent: a lost answer is asked for
again. Bodies are bounded by MAX_BODY_BYTES, lists by their types.

Security: whoever can reach the port can ask for geometry; only the holder of a lease's random token can renew, confirm
or release it. Confirm changes nothing on P.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeVar

import msgspec

from vllm_datadist_connector.protocol.params import BlockIds
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

MAX_BODY_BYTES: Final = 1 << 20
MAX_TOKENS_PER_MESSAGE: Final = 4096

_ENVELOPE: Final = struct.Struct("<4sH")
_MAGIC: Final = b"DDSC"

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Token = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_Tokens = Annotated[tuple[_Token, ...], msgspec.Meta(max_length=MAX_TOKENS_PER_MESSAGE)]
_Rank = Annotated[int, msgspec.Meta(ge=0, le=4095)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
T = TypeVar("T")


class ProtocolError(ValueError):
    """A peer broke the protocol; the text says how. Its frame is dropped."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    id: _Id


class Hello(_Message):
    """Asks for the geometry of one rank of the P that D means: answered by Meta or Refused."""

    engine_id: Annotated[str, msgspec.Meta(max_length=512)]
    incarnation: _Token
    pp_rank: _Rank
    tp_rank: _Rank


class Meta(_Message):
    geometry: bytes
    """A RankGeometry in msgpack, decoded by the receiver only after the envelope's version matched."""


class Confirm(_Message):
    """Was this lease held, for this prompt and with these blocks, until now? Answered by Confirmed."""

    token: _Token
    generation: _Id
    prompt_digest: _Token
    blocks: BlockIds


class Confirmed(_Message):
    held: bool
    reason: _Text


class Renew(_Message):
    """Extends leases by their duration from now. Answered by Renewed."""

    tokens: _Tokens


class Renewed(_Message):
    gone: _Tokens
    """Tokens that name no lease (any more)."""


class Release(_Message):
    """Ends leases; unknown tokens are no error. Answered by Released."""

    tokens: _Tokens


class Released(_Message):
    pass


class Refused(_Message):
    reason: _Text


Request = Hello | Confirm | Renew | Release
Response = Meta | Confirmed | Renewed | Released | Refused

_encoder: Final = msgspec.msgpack.Encoder()
_request_decoder: Final = msgspec.msgpack.Decoder(Request)
_response_decoder: Final = msgspec.msgpack.Decoder(Response)


def encode(message: Request | Response) -> bytes:
    """One frame. Raises ProtocolError if it would exceed MAX_BODY_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"{type(message).__name__} of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
    return _ENVELOPE.pack(_MAGIC, PROTOCOL_VERSION) + body


def decode_request(frame: bytes) -> Request:
    """Raises ProtocolError for anything but one well-formed request of our version."""
    return _decode(frame, _request_decoder)


def decode_response(frame: bytes) -> Response:
    """Raises ProtocolError for anything but one well-formed response of our version."""
    return _decode(frame, _response_decoder)


def _decode(frame: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    if len(frame) < _ENVELOPE.size or len(frame) > _ENVELOPE.size + MAX_BODY_BYTES:
        raise ProtocolError(f"frame of {len(frame)} bytes; allowed {_ENVELOPE.size}..{_ENVELOPE.size + MAX_BODY_BYTES}")
    magic, version = _ENVELOPE.unpack_from(frame)
    if magic != _MAGIC:
        raise ProtocolError("not a side-channel frame")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version}; this instance speaks {PROTOCOL_VERSION}")
    try:
        return decoder.decode(memoryview(frame)[_ENVELOPE.size :])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(str(error)) from None
