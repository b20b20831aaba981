"""Offers: blocks of ours into which P's ranks may write while they prefill, until they are withdrawn.

    make() ── a grant in our engine, then OFFER at P's side channel ──> P writes, and says what (HandoffNews.delivery)
      withdraw() ──> nothing new may be written ──> the write that runs has ended ──> take_ended()

Our engine writes by itself whatever a peer pushes, and only into what is granted: for our blocks to be our own again
once an offer was withdrawn, no word of P's is needed, however P fares. Belongs to the driver thread.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.offers import encode_offer
from vllm_datadist_connector.protocol.params import BlockIds
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, HandoffNews, Offered
from vllm_datadist_connector.worker.following import Followed, Mover
from vllm_datadist_connector.worker.pairing import Int64s, Pairing
from vllm_datadist_connector.worker.plan import NULL_BLOCK
from vllm_datadist_connector.worker.transfers import Transfer

GRACE_S = 0.5
"""A rank that has not taken an offer so long after its prefill was done does not push: the blocks are pulled."""
_POLL_S = 0.001


class _Offer(NamedTuple):
    transfer: Transfer
    followed: Followed


class Offers:
    def __init__(
        self,
        datadist: _native.LlmDataDist,
        ours: RankGeometry,
        client: ChannelClient,
        answer_timeout_s: float,
        can_grant: bool,
    ) -> None:
        """
        Args:
            can_grant: peers write nothing but what is granted. Where that is not so nothing is offered: nobody could
                say when our blocks are our own again.
        """
        self._datadist = datadist
        self._ours = ours
        self._geometry = msgspec.msgpack.encode(ours)
        self._client = client
        self._can_grant = can_grant
        self._answer_timeout_s = answer_timeout_s
        self._questions: dict[int, _Offer] = {}
        self._late: dict[int, tuple[_Offer, float]] = {}
        """By grant: those that P's rank has not taken although the prefill is done, and until when it may."""
        self._ending: dict[int, _Offer] = {}
        """By grant: those that were withdrawn, under which a write may still run."""
        self._since: dict[int, float] = {}
        """When they were, until they are told to be stuck."""
        self._ended: list[_Offer] = []

    def make(self, transfer: Transfer, followed: Followed) -> bool:
        """False: it cannot be; the blocks are to be pulled."""
        if not (followed.theirs.pushes and self._can_grant):
            return False
        job, source, theirs = transfer.job, followed.source, followed.theirs
        offer = encode_offer(self._geometry, job.local_blocks, job.first_token, job.end_token, source.num_tokens)
        blocks = writable_blocks(self._ours, followed.pairings, job.local_blocks)
        status, grant = self._datadist.grant_writes(theirs.cluster_id, blocks)
        if status != _native.LLM_SUCCESS:
            return False
        rank, offer_id = (theirs.pp_rank, theirs.tp_rank), secrets.randbits(62) + 1
        try:
            sent = self._client.offer(source.endpoint, source.token, rank, offer_id, offer, self._answer_timeout_s)
        except ValueError:
            # No message has room for so many blocks.
            self._datadist.revoke_writes(grant)
            return False
        self._questions[sent] = _Offer(transfer, followed)
        followed.mover, followed.offer_id, followed.grant = Mover.OFFERED, offer_id, grant
        transfer.grants[grant] = followed
        return True

    def on_answer(self, answer: ChannelAnswer) -> bool:
        """Takes P's word on an offer; False if the answer is to something else."""
        offer = self._questions.pop(answer.id, None)
        if offer is None:
            return False
        if not isinstance(answer.response, Offered):
            self._withdraw(offer)
        return True

    def hear(self, transfer: Transfer, followed: Followed, news: HandoffNews) -> None:
        """What has become of an offer."""
        if followed.mover is not Mover.OFFERED:
            return
        offer = _Offer(transfer, followed)
        followed.pushed_bytes, followed.pushed_early_bytes = news.num_bytes, news.early_bytes
        if news.delivery == "done" and followed.is_sealed and news.delivery_epoch == followed.epoch:
            followed.is_whole = True
            transfer.num_bytes += news.num_bytes
            transfer.pushed_bytes += news.num_bytes
            transfer.early_bytes += news.early_bytes
            transfer.run_s = max(transfer.run_s, news.run_s)
            self._withdraw(offer)
        elif news.delivery == "failed":
            self._withdraw(offer)
        elif news.delivery == "offered" and followed.is_sealed:
            self._late.setdefault(followed.grant, (offer, time.monotonic() + GRACE_S))
        else:
            self._late.pop(followed.grant, None)

    def withdraw(self, transfer: Transfer) -> None:
        """All of that transfer's."""
        for followed in list(transfer.grants.values()):
            self._withdraw(_Offer(transfer, followed))

    def take_ended(self, now: float) -> list[tuple[Transfer, Followed]]:
        """Those that were withdrawn, once nobody writes under them any more; each once."""
        for offer, until in list(self._late.values()):
            if now >= until:
                self._withdraw(offer)
        for offer in list(self._ending.values()):
            self._try_to_end(offer)
        ended, self._ended = self._ended, []
        for transfer, followed in ended:
            del transfer.grants[followed.grant]
            followed.mover = Mover.PUSHED if followed.is_whole else Mover.PULL
        return [(transfer, followed) for transfer, followed in ended]

    def take_stuck(self, now: float, patience_s: float) -> list[Transfer]:
        """Those of which a write goes on so long after the offer was withdrawn: only the end of its link will end it.

        Each once.
        """
        stuck = [grant for grant, since in self._since.items() if now >= since + patience_s]
        for grant in stuck:
            del self._since[grant]
        return [self._ending[grant].transfer for grant in stuck]

    def next_wake(self) -> float | None:
        wakes = [until for _, until in self._late.values()]
        if self._ended:
            wakes.append(0.0)
        if self._ending:
            wakes.append(time.monotonic() + _POLL_S)
        return min(wakes, default=None)

    def _withdraw(self, offer: _Offer) -> None:
        followed = offer.followed
        if followed.mover is Mover.OFFERED:
            followed.mover = Mover.WITHDRAWN
            self._late.pop(followed.grant, None)
            self._ending[followed.grant], self._since[followed.grant] = offer, time.monotonic()
            self._try_to_end(offer)

    def _try_to_end(self, offer: _Offer) -> None:
        grant = offer.followed.grant
        if self._datadist.revoke_writes(grant) == _native.LLM_SUCCESS:
            del self._ending[grant]
            self._since.pop(grant, None)
            self._ended.append(offer)


def writable_blocks(
    ours: RankGeometry, pairings: Sequence[Pairing], local_blocks: BlockIds
) -> list[tuple[int, Int64s]]:
    """Whole blocks of our caches, each with the ids of those in which the pairings' bytes lie, for grant_writes()."""
    writable = []
    for index in sorted({pairing.dst_index for pairing in pairings}):
        cache = ours.caches[index]
        view = cache.views[0]
        table = np.asarray([b for b in local_blocks[cache.group] if b != NULL_BLOCK], dtype=np.int64)
        per_entry = ours.block_sizes[cache.group] // cache.block_tokens if cache.block_tokens else 1
        blocks = (table[:, None] * per_entry + np.arange(per_entry)).ravel()
        starts = blocks * (cache.block_stride // view.granule) + view.first
        held = np.arange(-(-cache.block_bytes // view.granule))
        writable.append((view.cache_id, (starts[:, None] + held).ravel()))
    return writable
