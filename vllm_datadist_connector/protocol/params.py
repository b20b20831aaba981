"""`kv_transfer_params`: what the router carries from P to D, field-compatible with the NIXL connector's.

The dict passes through HTTP clients and routers, so it is attacker input: it is parsed once, here, into a typed value,
and nothing else in the package looks into it. Unknown fields are tolerated (routers and newer connectors add some);
integers may arrive as integral floats or digit strings (protobuf- and string-based routers).
"""

from __future__ import annotations

import base64
import binascii
import enum
from typing import Annotated, Any, Final, Literal

import msgspec

from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

EXTRA_KEY: Final = "datadist"
"""The one key of ours in kv_transfer_params."""
_CARRIED: Final = ":datadist:"
"""Stands between P's request id and the ticket, once more, in remote_request_id: llm-d's sidecar takes the fields of
the NIXL flavour from an answer to the conversation's next prompt, and no others."""
_MAX_REQUEST_ID: Final = 4096

BlockIds = tuple[tuple[int, ...], ...]
"""Block ids per KV cache group, in token order."""

_BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Group = Annotated[tuple[_BlockId, ...], msgspec.Meta(max_length=2**18)]
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""32 hex digits. Not `$`, which would let a newline follow."""

MIN_LEASE_S: Final = 1.0
"""Renewals come several times per lease: a forged ticket with a shorter one would make D flood P."""
MAX_ADAPTER: Final = 512
_MAX_ERROR_CHARS: Final = 300


FLAGS: Final = ("do_remote_prefill", "do_remote_decode")


class Unusable(enum.Enum):
    """Why params cannot be used."""

    MALFORMED = enum.auto()
    VERSION = enum.auto()
    HOST = enum.auto()
    NOTHING_HELD = enum.auto()


class ParamsError(ValueError):
    """kv_transfer_params ask for a remote prefill that cannot be carried out; says which field and why."""

    def __init__(self, text: str, why: Unusable = Unusable.MALFORMED) -> None:
        super().__init__(text)
        self.why = why


class LeaseTicket(msgspec.Struct, frozen=True, kw_only=True):
    """P's promise to keep a request's blocks, as it travels in kv_transfer_params under EXTRA_KEY."""

    version: int
    incarnation: Token
    """The life of P's engine core that granted the lease; a restarted P has another."""
    token: Token
    """Random; whoever holds it may renew, confirm and release the lease."""
    generation: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    """0: of a hand-off whose prefill goes on, not yet a lease that could be confirmed."""
    lease_s: Annotated[float, msgspec.Meta(ge=MIN_LEASE_S, le=3600)]
    prompt_digest: Token
    """Of the tokens whose KV P holds, see digest.py: D pulls only for a prompt that begins with them."""
    adapter: Annotated[str, msgspec.Meta(max_length=MAX_ADAPTER)]
    """LoRA adapter of the request, see scheduler/adapters.py; empty for none."""
    block_sizes: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=2**24)], ...], msgspec.Meta(max_length=64)]
    """Tokens per block of each of P's KV cache groups; 0 for a group of states, which has one block per request."""


class RemotePrefill(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill that P has done and D may pull."""

    remote_engine_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    remote_request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_REQUEST_ID)]
    remote_host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    remote_block_ids: Annotated[tuple[_Group, ...], msgspec.Meta(min_length=1, max_length=64)]
    remote_num_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    """Tokens whose KV the blocks hold, from the first one on."""
    ticket: LeaseTicket = msgspec.field(name=EXTRA_KEY)

    def __str__(self) -> str:
        host = f"[{self.remote_host}]" if ":" in self.remote_host else self.remote_host
        return f"P's request {self.remote_request_id:.80} at {host}:{self.remote_port}"


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill that P has still to do, or is doing: whom a D asks for the hand-off that both requests name."""

    remote_host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    remote_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    handoff: Token
    transfer_mode: Literal["pull", "push"] | None = None
    """Who moves the blocks; None: as D's configuration says."""

    def __str__(self) -> str:
        host = f"[{self.remote_host}]" if ":" in self.remote_host else self.remote_host
        return f"hand-off {self.handoff} at {host}:{self.remote_port}"


_PREFILL: Final = msgspec.msgpack.Decoder(RemotePrefill)
_JSON: Final = msgspec.json.Encoder()


def wants_remote_prefill(params: object) -> bool:
    """Whether a request asks to be a D request: its prompt was prefilled elsewhere."""
    return isinstance(params, dict) and params.get("do_remote_prefill") is True


def wants_remote_decode(params: object) -> bool:
    """Whether a request asks to be a P request: its blocks shall be kept for a D."""
    return isinstance(params, dict) and params.get("do_remote_decode") is True


def names_handoff(params: object) -> bool:
    """Whether a request comes with the name of a hand-off in place of a lease: its two legs are under way at once."""
    extra = params.get(EXTRA_KEY) if isinstance(params, dict) else None
    return isinstance(extra, dict) and "handoff" in extra and "token" not in extra


def parse_handoff(params: dict[str, Any]) -> str:
    """The hand-off that a P request names.

    Raises:
        ParamsError: it is no token.
    """
    try:
        return msgspec.convert(params[EXTRA_KEY]["handoff"], Token)
    except msgspec.ValidationError:
        value = params[EXTRA_KEY]["handoff"]
        raise ParamsError(f"{EXTRA_KEY}.handoff: {value!r:.80}, allowed: 32 hex digits in lower case") from None


def is_pushed(params: object, default: str) -> bool:
    """Whether P is to write the blocks of a hand-off; `default` where the request does not say."""
    said = params.get("transfer_mode") if isinstance(params, dict) else None
    return (default if said is None else said) == "push"


def parse_expected(params: dict[str, Any]) -> Expected:
    """Parses the params of a D request that names a hand-off.

    Raises:
        ParamsError: a field is missing or malformed.
    """
    handoff = parse_handoff(params)
    try:
        return msgspec.convert({**params, "handoff": handoff}, Expected, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ParamsError(str(error)[-_MAX_ERROR_CHARS:]) from None


def encode_prefill(remote: RemotePrefill) -> bytes:
    """As it crosses the side channel of a hand-off."""
    return msgspec.msgpack.encode(remote)


def decode_prefill(data: bytes, host: str, port: int) -> RemotePrefill:
    """What P says of a hand-off, at the address at which it was asked.

    Raises:
        ParamsError: it is malformed.
    """
    try:
        remote = _PREFILL.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ParamsError(f"hand-off: {error!s:.200}") from None
    # Where P says that it is was not checked; where we asked was.
    return msgspec.structs.replace(remote, remote_host=host, remote_port=port)


def names_earlier_turn(params: object) -> bool:
    """Whether a P request brings blocks of its own past: an earlier turn's D still holds the KV of its first tokens."""
    if not isinstance(params, dict) or not wants_remote_decode(params):
        return False
    blocks = params.get("remote_block_ids")
    # An earlier turn that is not held comes with groups of no blocks.
    return isinstance(blocks, (list, tuple)) and any(blocks)


def was_remote_prefill(params: object) -> bool:
    """Whether a request came with a lease as a D request, also after its flag was cleared."""
    if not isinstance(params, dict) or wants_remote_decode(params):
        return False
    return isinstance(params[EXTRA_KEY], dict) if EXTRA_KEY in params else bool(_split_request_id(params)[1])


def _split_request_id(params: dict[str, Any]) -> tuple[object, str]:
    """(P's request id, the ticket that it carries or an empty text)."""
    value = params.get("remote_request_id")
    if not isinstance(value, str) or _CARRIED not in value:
        return value, ""
    request_id, _, carried = value.rpartition(_CARRIED)
    return request_id, carried


def _with_ticket(params: dict[str, Any]) -> dict[str, Any]:
    """`params` with P's own request id, and the ticket under EXTRA_KEY wherever it was."""
    request_id, carried = _split_request_id(params)
    extra = params.get(EXTRA_KEY)
    if carried and EXTRA_KEY not in params:
        try:
            extra = msgspec.json.decode(base64.urlsafe_b64decode(carried))
        except (ValueError, RecursionError):
            raise ParamsError("remote_request_id: what it carries is no ticket") from None
    return {**params, "remote_request_id": request_id, EXTRA_KEY: extra}


def parse_remote_prefill(params: dict[str, Any]) -> RemotePrefill:
    """Parses the params of a D request.

    Raises:
        ParamsError: for every input that is not a complete, well-formed remote prefill granted by this connector.
    """
    blocks = params.get("remote_block_ids")
    if isinstance(blocks, (list, tuple)) and blocks and not isinstance(blocks[0], (list, tuple)):
        # Older routers and vLLM's own tests send one flat group.
        params = {**params, "remote_block_ids": [blocks]}
    params = _with_ticket(params)
    extra = params[EXTRA_KEY]
    if not isinstance(extra, dict):
        if params.get("remote_num_tokens") == 0 and isinstance(blocks, (list, tuple)) and not any(blocks):
            raise ParamsError("P holds nothing of it", Unusable.NOTHING_HELD)
        raise ParamsError(f"no {EXTRA_KEY!r} object: the prefill was not done by a DataDistConnector")
    if extra.get("version") != PROTOCOL_VERSION:
        versions = f"P speaks {extra.get('version')!r:.40}, we speak {PROTOCOL_VERSION}"
        raise ParamsError(f"{EXTRA_KEY}.version: {versions}", Unusable.VERSION)
    try:
        remote = msgspec.convert(params, RemotePrefill, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        # msgspec repeats a number that it cannot take, however long.
        raise ParamsError(str(error)[-_MAX_ERROR_CHARS:]) from None
    if not remote.ticket.generation:
        raise ParamsError(f"{EXTRA_KEY}.generation: 0 is of no lease; only a hand-off that goes on has it")
    return remote


def build_params(
    *,
    engine_id: str,
    request_id: str,
    host: str,
    port: int,
    block_ids: BlockIds,
    num_tokens: int,
    tp_size: int,
    pp_size: int,
    dcp_size: int,
    ticket: LeaseTicket | None,
    for_next_turn: bool = False,
) -> dict[str, Any]:
    """The params that come back with a finished request: every field of the NIXL flavour, ours under EXTRA_KEY.

    They go to a D or, `for_next_turn`, with the conversation's next prompt to a P. Without a ticket nothing is held and
    `block_ids` is empty: whoever gets them prefills locally.
    """
    params: dict[str, Any] = {
        "do_remote_prefill": not for_next_turn,
        "do_remote_decode": for_next_turn,
        "remote_block_ids": [list(group) for group in block_ids],
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
        "tp_size": tp_size,
        "dcp_size": dcp_size,
        "pp_size": pp_size,
        "remote_num_tokens": num_tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
    }
    if ticket is not None:
        params[EXTRA_KEY] = msgspec.structs.asdict(ticket)
        carried = binascii.b2a_base64(_JSON.encode(ticket), newline=False).decode()
        carrying = f"{request_id}{_CARRIED}{carried}"
        if len(carrying) <= _MAX_REQUEST_ID:
            params["remote_request_id"] = carrying
    return params
