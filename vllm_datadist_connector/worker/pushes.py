"""Pushes: what a P rank writes into the blocks that D ranks offer it, as soon as it is final.

    offer (watcher.py) ──> follow our own progress ──> PushKvBlocks of all that is final and not pushed yet ──┐
                                   ▲                                                                          │
                                   └── sealed and nothing left: done; a call failed: failed ──DELIVER──> D <──┘

A push is a pull planned in D's terms and carried out from our end. It changes nothing of what D believes: D confirms,
as after a pull, and only what was written in the epoch that was sealed. Belongs to the driver thread, and never waits.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import Home
from vllm_datadist_connector.protocol.handshake import RankGeometry, decode_geometry
from vllm_datadist_connector.protocol.offers import Offer, OfferError, decode_offer
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, Reported, Watched
from vllm_datadist_connector.worker.following import Followed, FollowError, Following, Source, news_of
from vllm_datadist_connector.worker.pairing import MismatchError, Pairing, Terms, pair
from vllm_datadist_connector.worker.plan import BlockPull, PlanError
from vllm_datadist_connector.worker.watcher import Watcher

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

MAX_PUSHES = 4096
"""At a time; more are told that they failed, and D pulls."""
MAX_TAKERS = 256
"""Geometries of D ranks whose pairings are remembered."""
MAX_CALLS = 2
"""Of one push at once: one that runs, and one behind it. What becomes final meanwhile goes together."""
_TERMS = Terms(own_views_only=True)
"""D can register no other views for us."""
_TENSORS_PER_LAYER = 1
_MAX_REASON = 200


class _Call(NamedTuple):
    push: Push
    epoch: int
    num_bytes: int
    is_early: bool


@dataclass(slots=True, eq=False)
class Push:
    """Of one hand-off to one D rank."""

    offer_id: int
    offer: Offer
    followed: Followed
    unsubmitted: deque[BlockPull] = field(default_factory=deque)
    calls: set[int] = field(default_factory=set)
    num_bytes: int = 0
    early_bytes: int = 0
    run_s: float = 0.0
    failure: str = ""
    is_over: bool = False
    """Nothing more is pushed; at most its calls have still to come back, and D to be told."""
    telling: int = 0
    """The question by which D is being told; 0: none is under way."""
    untold: bool = True

    @property
    def taker(self) -> RankGeometry:
        return self.followed.ours

    @property
    def state(self) -> str:
        if self.failure:
            return "failed"
        return "done" if self.is_over else "running"

    def __str__(self) -> str:
        return f"push of hand-off {self.followed.source.token} to cluster {self.taker.cluster_id}"


class Pushes:
    def __init__(
        self,
        ours: RankGeometry,
        queue: _native.TransferQueue,
        client: ChannelClient,
        watcher: Watcher,
        call_timeout_s: float,
        answer_timeout_s: float,
    ) -> None:
        """
        Args:
            watcher: by which offers come.
        """
        self._ours = ours
        self._queue = queue
        self._client = client
        self._call_timeout_s = call_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._rank = ours.pp_rank, ours.tp_rank
        self._watcher = watcher
        self._following: Following[Push] = Following(client, answer_timeout_s)
        self._pushes: set[Push] = set()
        self._calls: dict[int, _Call] = {}
        self._telling: dict[int, Push] = {}
        self._takers: OrderedDict[bytes, tuple[RankGeometry, list[Pairing]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pushes)

    def on_answer(self, answer: ChannelAnswer) -> bool:
        """False if it is to something else."""
        asked = self._following.take(answer)
        if asked is not None:
            if not asked[0].is_over:
                self._on_news(*asked, answer)
            return True
        push = self._telling.pop(answer.id, None)
        if push is None:
            return False
        push.telling = 0
        if not isinstance(answer.response, Reported):
            # Nobody can be told any more if nobody is there; else again.
            push.untold, push.is_over = answer.timed_out, push.is_over or not answer.timed_out
        self._tell_or_forget(push)
        return True

    def on_completion(self, completion: _native.Completion) -> bool:
        """Takes the end of a call; False if it is another's."""
        call = self._calls.pop(completion.id, None)
        if call is None:
            return False
        push = call.push
        push.calls.discard(completion.id)
        if completion.status == _native.LLM_SUCCESS:
            if call.epoch == push.followed.epoch:
                push.num_bytes += call.num_bytes
                push.early_bytes += call.num_bytes if call.is_early else 0
                push.run_s += completion.run_s
                push.untold = True
        elif not push.is_over and call.epoch == push.followed.epoch:
            self._fail(push, f"{_native.status_name(completion.status)}: {completion.error}")
        self._go_on(push)
        return True

    def round(self) -> None:
        """What takes the queue's places wakes the driver when it ends."""
        for push in [each for each in self._pushes if each.unsubmitted]:
            if not self._submit(push):
                return

    def begin(self, offered: Watched) -> None:
        home = self._watcher.home
        if home is None:
            return
        try:
            offer = decode_offer(offered.blob)
            taker, pairings = self._taker(offer)
        except (OfferError, MismatchError) as error:
            logger.warning("offer for hand-off %s: %s", offered.token, error)
            self._deliver(home, offered.token, offered.offer_id, "failed", reason=str(error))
            return
        source = Source(home.endpoint, offered.token, offer.num_tokens)
        push = Push(offered.offer_id, offer, Followed.start(source, taker, self._ours, pairings))
        self._pushes.add(push)
        self._tell(push)
        self._following.ask(push, push.followed)

    def _taker(self, offer: Offer) -> tuple[RankGeometry, list[Pairing]]:
        """
        Raises:
            OfferError: the geometry is malformed, or there are too many pushes.
            MismatchError: its blocks cannot be written from ours.
        """
        if len(self._pushes) >= MAX_PUSHES:
            raise OfferError(f"more than {MAX_PUSHES} pushes at once")
        known = self._takers.get(offer.geometry)
        if known is None:
            try:
                geometry = decode_geometry(offer.geometry)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise OfferError(f"geometry: {error!s:.200}") from None
            known = geometry, pair(geometry, self._ours, _TERMS)
            self._takers[offer.geometry] = known
            if len(self._takers) > MAX_TAKERS:
                self._takers.popitem(last=False)
        self._takers.move_to_end(offer.geometry)
        return known

    def _on_news(self, push: Push, followed: Followed, answer: ChannelAnswer) -> None:
        try:
            news = news_of(answer)
            if news is not None and not followed.note(news):
                # Preempted. Calls that run write older bytes, and end before those that follow them begin.
                self._take_back(push)
                push.num_bytes = push.early_bytes = 0
                push.run_s = 0.0
                followed.forget()
                followed.note(news)
        except FollowError:
            # D hears the same, and withdraws its offer.
            push.is_over, push.untold = True, False
            self._take_back(push)
            self._tell_or_forget(push)
            return
        if not followed.is_sealed:
            self._following.ask(push, followed)
        self._go_on(push)

    def _go_on(self, push: Push) -> None:
        """Pushes what is due, and tells D how far it is."""
        if not push.is_over:
            offer = push.offer
            try:
                if len(push.calls) + len(push.unsubmitted) < MAX_CALLS:
                    push.unsubmitted.extend(push.followed.due(offer.first_token, offer.end_token, offer.local_blocks))
            except PlanError as error:
                self._fail(push, str(error))
            self._submit(push)
            if push.followed.is_sealed and not (push.calls or push.unsubmitted):
                push.is_over = push.untold = True
        self._tell_or_forget(push)

    def _submit(self, push: Push) -> bool:
        """As many calls as there is room for; False if that was not enough."""
        try:
            while push.unsubmitted:
                pull = push.unsubmitted[0]
                call = self._queue.submit_push_blocks(
                    pull.src_cache_id,
                    push.taker.cluster_id,
                    _view(push.taker, pull),
                    pull.src_blocks,
                    pull.dst_blocks,
                    num_tensors=0,
                    deadline_ms=int(self._call_timeout_s * 1000),
                    src_layer_range=pull.src_layers,
                    dst_layer_range=pull.dst_layers,
                    tensor_num_per_layer=_TENSORS_PER_LAYER,
                )
                push.unsubmitted.popleft()
                push.calls.add(call)
                self._calls[call] = _Call(push, push.followed.epoch, pull.num_bytes, not push.followed.is_sealed)
        except _native.QueueFullError:
            return False
        return True

    def _take_back(self, push: Push) -> None:
        push.unsubmitted.clear()
        for call in push.calls:
            self._queue.cancel(call)

    def _fail(self, push: Push, reason: str) -> None:
        if not push.is_over:
            logger.info("%s failed: %s", push, reason)
            push.failure, push.is_over, push.untold = reason, True, True
            self._take_back(push)

    def _tell_or_forget(self, push: Push) -> None:
        if push.untold and not push.telling:
            self._tell(push)
        if push.is_over and not (push.untold or push.telling or push.calls):
            self._pushes.discard(push)

    def _tell(self, push: Push) -> None:
        home, source = self._watcher.home, push.followed.source
        if home is None:
            return
        push.untold = False
        counts = push.followed.epoch, push.num_bytes, push.early_bytes
        push.telling = self._deliver(
            home, source.token, push.offer_id, push.state, *counts, run_s=push.run_s, reason=push.failure
        )
        self._telling[push.telling] = push

    def _deliver(
        self,
        home: Home,
        token: str,
        offer_id: int,
        state: str,
        epoch: int = 0,
        num_bytes: int = 0,
        early_bytes: int = 0,
        run_s: float = 0.0,
        reason: str = "",
    ) -> int:
        counts = epoch, num_bytes, early_bytes, run_s
        said = offer_id, state, *counts, reason[:_MAX_REASON]
        return self._client.deliver(home.endpoint, home.key, self._rank, token, *said, self._answer_timeout_s)


def _view(taker: RankGeometry, pull: BlockPull) -> int:
    """D's registration in blocks of that size; pair() has chosen one that there is."""
    views = taker.caches[pull.dst_index].views
    return next(view.cache_id for view in views if view.granule == pull.granule)
