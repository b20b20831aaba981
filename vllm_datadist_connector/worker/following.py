"""Following: the progress of P's ranks in a prefill, heard at P's side channel while it goes on.

    AWAIT, one question per P rank ──> news: blocks, epoch, what is final ──> what is due
      ^ asked again with what was seen ───────┘

A D rank follows every rank of P that it pulls from; a P rank follows itself, for each D rank that it pushes to. A new
epoch means that P was preempted: whatever was moved is void.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import BlockIds, ParamsError, RemotePrefill, decode_prefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, HandoffNews
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.pairing import Pairing
from vllm_datadist_connector.worker.plan import NULL_BLOCK, BlockPull, TokenRange
from vllm_datadist_connector.worker.progress import NOTHING, Mark, Progress

PATIENCE_S = 5.0
"""P keeps a question so long before it answers that there is nothing new."""

T = TypeVar("T")


class FollowError(Exception):
    """P will not finish the prefill, or says what cannot be; says why."""


class Source(NamedTuple):
    """A hand-off, and where it is asked for."""

    endpoint: Endpoint
    token: str
    num_tokens: int
    """That P will hold when its prefill is done."""


class Mover(enum.Enum):
    """Who moves the blocks of one pair of ranks, as D knows it."""

    PULL = enum.auto()
    OFFERED = enum.auto()
    """P may write into ours."""
    WITHDRAWN = enum.auto()
    """P may not any more; one write may still run."""
    PUSHED = enum.auto()
    """P has written all of them."""


@dataclass(slots=True, eq=False)
class Followed:
    """What is known of one P rank's progress in one hand-off, for one D rank."""

    source: Source
    ours: RankGeometry
    """D's."""
    theirs: RankGeometry
    """P's."""
    pairings: list[Pairing]
    progress: Progress
    version: int = 0
    stamp: int = 0
    epoch: int = 0
    remote: RemotePrefill | None = None
    """The blocks of that epoch, as far as P has allocated them."""
    mark: Mark = NOTHING
    is_sealed: bool = False
    mover: Mover = Mover.PULL
    question: int = 0
    """The last that was asked: answers to those before it come too late to matter."""
    is_first: bool = True
    """Nothing has been heard yet."""
    offer_id: int = 0
    grant: int = 0
    """By which P may write into our blocks, as our engine knows it."""
    is_whole: bool = False
    """P says that it has written all of them."""
    pushed_bytes: int = 0
    """That P says it has written, in that epoch."""
    pushed_early_bytes: int = 0

    @classmethod
    def start(cls, source: Source, ours: RankGeometry, theirs: RankGeometry, pairings: list[Pairing]) -> Followed:
        return cls(source, ours, theirs, pairings, Progress(ours, theirs, pairings))

    @property
    def is_settled(self) -> bool:
        """Nothing more of it becomes final, and P writes nothing more."""
        return self.is_sealed and self.mover in (Mover.PULL, Mover.PUSHED)

    def forget(self) -> None:
        """What was moved is void."""
        self.progress = Progress(self.ours, self.theirs, self.pairings)
        self.epoch, self.remote, self.mark, self.is_sealed = 0, None, NOTHING, False

    def note(self, news: HandoffNews) -> bool:
        """False, and nothing is noted, if P's blocks are others than those from which blocks were moved.

        Raises:
            FollowError: nothing will come of it.
        """
        if news.state in ("unknown", "ended"):
            raise FollowError(news.reason or "P does not know of it")
        remote = self._remote(news) if news.blob is not None else None
        has_moved = remote is not None and self.remote is not None and _has_moved(self.remote, remote)
        if self.epoch not in (0, news.epoch) or has_moved:
            return False
        self.version, self.stamp = news.version, news.stamp
        if remote is not None:
            self.remote, self.epoch = remote, news.epoch
        self.is_sealed = news.state == "sealed"
        # A rank may be ahead of what its scheduler has told, never behind: what it said of an earlier epoch is void.
        if news.mark_epoch == self.epoch:
            self.mark = Mark(news.base, news.next, news.layers)
        return True

    def due(self, first: int, end: int, local: BlockIds) -> list[BlockPull]:
        """What of the tokens [first, end) is final and was not taken yet, as D would pull it into its blocks `local`.

        Raises:
            PlanError: block ids that do not fit the geometries.
        """
        if self.remote is None:
            return []
        held, blocks = self.remote.remote_num_tokens, self.remote.remote_block_ids
        tokens = TokenRange(first, end, blocks, local, held, local_first=first)
        return self.progress.take(None if self.is_sealed else self.mark, tokens)

    def _remote(self, news: HandoffNews) -> RemotePrefill:
        try:
            remote = decode_prefill(news.blob or b"", *self.source.endpoint)
        except ParamsError as error:
            raise FollowError(str(error)) from None
        if remote.remote_num_tokens != self.source.num_tokens:
            raise FollowError(f"P holds {remote.remote_num_tokens} tokens of it, not {self.source.num_tokens}")
        return remote


class Following(Generic[T]):
    """Questions under way, each for one owner. Belongs to the driver thread."""

    def __init__(self, client: ChannelClient, answer_timeout_s: float) -> None:
        self._client = client
        self._answer_timeout_s = answer_timeout_s
        self._questions: dict[int, tuple[T, Followed]] = {}

    def ask(self, owner: T, followed: Followed) -> None:
        source, rank = followed.source, (followed.theirs.pp_rank, followed.theirs.tp_rank)
        question = self._client.await_handoff(
            source.endpoint,
            source.token,
            rank,
            followed.version,
            followed.stamp,
            PATIENCE_S,
            self._answer_timeout_s,
            followed.offer_id if followed.mover is not Mover.PULL else 0,
        )
        followed.question = question
        self._questions[question] = owner, followed

    def take(self, answer: ChannelAnswer) -> tuple[T, Followed] | None:
        """Whom an answer is for; None if it is nobody's."""
        asked = self._questions.pop(answer.id, None)
        return asked if asked is not None and asked[1].question == answer.id else None


def news_of(answer: ChannelAnswer) -> HandoffNews | None:
    """None: P has not answered in time, and may be asked again.

    Raises:
        FollowError: P refuses, or is gone.
    """
    if isinstance(answer.response, HandoffNews):
        return answer.response
    if not answer.timed_out:
        raise FollowError(answer.error or "refused")
    return None


def _has_moved(before: RemotePrefill, after: RemotePrefill) -> bool:
    """Whether tokens of which P has told are in other blocks now; not, whether a window has left them."""
    groups = zip(before.remote_block_ids, after.remote_block_ids, after.ticket.block_sizes, strict=False)
    for old, new, block_size in groups:
        # The block of a state moves, and is not pulled before the end.
        if block_size and new[: len(old)] != old:
            same = [a == b or b == NULL_BLOCK for a, b in zip(old, new, strict=False)]
            if len(new) < len(old) or not all(same):
                return True
    return False
