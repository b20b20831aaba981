"""Offer: the blocks of one D rank into which a P rank may write its share of a hand-off's KV cache.

It crosses the side channel as msgpack, beside the hand-off's token and D's cluster id; only the P rank looks into it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vllm_datadist_connector.protocol.params import BlockIds

_BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Group = Annotated[tuple[_BlockId, ...], msgspec.Meta(max_length=2**18)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    geometry: bytes
    """The D rank's RankGeometry in msgpack, with the views that it has registered."""
    local_blocks: Annotated[tuple[_Group, ...], msgspec.Meta(max_length=64)]
    """D's, per KV cache group: from that which holds `first_token` on; of a group of states the one of the state."""
    first_token: _Tokens
    end_token: _Tokens
    num_tokens: _Tokens
    """That P will hold when its prefill is done."""


class OfferError(ValueError):
    """An offer that cannot be taken; says why."""


_DECODER: Final = msgspec.msgpack.Decoder(Offer)


def encode_offer(geometry: bytes, local_blocks: BlockIds, first_token: int, end_token: int, num_tokens: int) -> bytes:
    return msgspec.msgpack.encode(
        Offer(
            geometry=geometry,
            local_blocks=local_blocks,
            first_token=first_token,
            end_token=end_token,
            num_tokens=num_tokens,
        )
    )


def decode_offer(data: bytes) -> Offer:
    """
    Raises:
        OfferError: it is malformed.
    """
    try:
        offer = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OfferError(f"offer: {error!s:.200}") from None
    if not offer.first_token < offer.end_token <= offer.num_tokens:
        tokens = f"[{offer.first_token}, {offer.end_token}) of {offer.num_tokens}"
        raise OfferError(f"offer: tokens {tokens}, allowed: at least one, and none beyond the last")
    return offer
