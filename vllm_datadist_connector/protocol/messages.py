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

from vllm_datadist_connector.protocol.params import BlockIds, Token
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

MAX_BODY_BYTES: Final = 1 << 20
MAX_TOKENS_PER_MESSAGE: Final = 4096

_ENVELOPE: Final = struct.Struct("<4sH")
_MAGIC: Final = b"DDSC"

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Tokens = Annotated[tuple[Token, ...], msgspec.Meta(max_length=MAX_TOKENS_PER_MESSAGE)]
_Rank = Annotated[int, msgspec.Meta(ge=0, le=4095)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
T = TypeVar("T")


class ProtocolError(ValueError):
    """A peer broke the protocol; the text says how. Its frame is dropped."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    id: _Id


class Hello(_Message, frozen=True, kw_only=True):
    """Asks for the geometry of one rank of the P that D means: answered by Meta or Refused."""

    engine_id: Annotated[str, msgspec.Meta(max_length=512)]
    incarnation: Token
    pp_rank: _Rank
    tp_rank: _Rank


class Meta(_Message, frozen=True, kw_only=True):
    geometry: bytes
    """A RankGeometry in msgpack, decoded by the receiver only after the envelope's version matched."""


class Confirm(_Message, frozen=True, kw_only=True):
    """Was this lease held, for this prompt and with exactly these blocks, until now? Answered by Confirmed."""

    token: Token
    generation: _Id
    prompt_digest: Token
    blocks: BlockIds
    """All blocks that the params named, in their order: a client that permuted them must not get its way."""


class Confirmed(_Message, frozen=True, kw_only=True):
    held: bool
    reason: _Text


class Renew(_Message, frozen=True, kw_only=True):
    """Extends leases by their duration from now. Answered by Renewed."""

    tokens: _Tokens


class Renewed(_Message, frozen=True, kw_only=True):
    gone: _Tokens
    """Tokens that name no lease (any more)."""


class Release(_Message, frozen=True, kw_only=True):
    """Ends leases; unknown tokens are no error. Answered by Released."""

    tokens: _Tokens


class Released(_Message, frozen=True, kw_only=True):
    pass


class Refused(_Message, frozen=True, kw_only=True):
    reason: _Text


Request = Hello | Confirm | Renew | Release
Response = Meta | Confirmed | Renewed | Released | Refused

_encoder: Final = msgspec.msgpack.Encoder()
_request_decoder: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_response_decoder: Final[msgspec.msgpack.Decoder[Response]] = msgspec.msgpack.Decoder(Response)


def encode(message: Request | Response) -> bytes:
    """One frame. Raises ProtocolError if it would exceed MAX_BODY_BYTES or holds text that UTF-8 cannot."""
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise ProtocolError(f"{type(message).__name__}: {error}") from None
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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # msgspec lets the codec's own error through for a string that is not UTF-8.
        raise ProtocolError(str(error)) from None
