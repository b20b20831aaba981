"""Following: the progress of P's ranks in a prefill whose KV cache a D rank pulls while it goes on.

    AWAIT at P's side channel, one question per P rank ──> news: blocks, epoch, what is final ──> what is due
         ^ asked again with what was seen ────────────────────────┘

A new epoch means that P was preempted: whatever was pulled is void. Only what a sealed hand-off says is confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import ParamsError, RemotePrefill, decode_prefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, HandoffNews
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.plan import NULL_BLOCK, BlockPull, TokenRange
from vllm_datadist_connector.worker.progress import NOTHING, Mark, Progress

if TYPE_CHECKING:
    from vllm_datadist_connector.worker.transfers import Transfer

PATIENCE_S = 5.0
"""P keeps a question so long before it answers that there is nothing new."""
MAX_CALLS = 2
"""Of one pull to one P rank at once: one that runs, and one behind it. What becomes final meanwhile goes together."""


@dataclass(slots=True, eq=False)
class Followed:
    """One P rank, as one transfer follows it."""

    theirs: RankGeometry
    progress: Progress
    version: int = 0
    stamp: int = 0
    epoch: int = 0
    remote: RemotePrefill | None = None
    """The blocks of that epoch, as far as P has allocated them."""
    mark: Mark = NOTHING
    is_sealed: bool = False


class FollowError(Exception):
    """P will not finish the prefill, or says what cannot be; says why."""


class Following:
    """Questions under way. Belongs to the driver thread."""

    def __init__(self, ours: RankGeometry, client: ChannelClient, answer_timeout_s: float) -> None:
        self._ours = ours
        self._client = client
        self._answer_timeout_s = answer_timeout_s
        self._questions: dict[int, tuple[Transfer, Followed]] = {}

    def begin(self, transfer: Transfer) -> None:
        """Follows every rank that gives something, from the start."""
        transfer.followed = [
            Followed(theirs, Progress(self._ours, theirs, peer.pairings)) for peer, theirs in transfer.instance.givers
        ]
        for followed in transfer.followed:
            self._ask(transfer, followed)

    def take(self, answer: ChannelAnswer) -> tuple[Transfer, Followed] | None:
        """Whom an answer is for; None if it is nobody's, or comes too late to matter."""
        transfer, followed = self._questions.pop(answer.id, (None, None))
        if transfer is None or followed is None or transfer.is_over or followed not in transfer.followed:
            return None
        return transfer, followed

    def hear(self, transfer: Transfer, followed: Followed, answer: ChannelAnswer) -> bool:
        """Notes what P says, and asks on; False if what was pulled before is void.

        Raises:
            FollowError: nothing will come of it.
        """
        news = answer.response
        if not isinstance(news, HandoffNews):
            if not answer.timed_out:
                raise FollowError(answer.error or "refused")
            self._ask(transfer, followed)
            return True
        if news.state in ("unknown", "ended"):
            raise FollowError(news.reason or "P does not know of it")
        if followed.epoch not in (0, news.epoch) or not self._note(followed, news, transfer):
            return False
        if not followed.is_sealed:
            self._ask(transfer, followed)
        return True

    def due(self, transfer: Transfer, followed: Followed) -> list[BlockPull]:
        """What is final and was not pulled yet, if there is room for more.

        Raises:
            PlanError: block ids that do not fit the geometries.
        """
        remote, job = followed.remote, transfer.job
        if remote is None or transfer.calls_to(followed.theirs.cluster_id) >= MAX_CALLS:
            return []
        tokens = TokenRange(
            job.first_token,
            job.end_token,
            remote.remote_block_ids,
            job.local_blocks,
            remote.remote_num_tokens,
            local_first=job.first_token,
        )
        return followed.progress.take(None if followed.is_sealed else followed.mark, tokens)

    def _note(self, followed: Followed, news: HandoffNews, transfer: Transfer) -> bool:
        """False if P's blocks are others than before."""
        followed.version, followed.stamp = news.version, news.stamp
        if news.blob is not None:
            job = transfer.job
            try:
                remote = decode_prefill(news.blob, job.remote.remote_host, job.remote.remote_port)
            except ParamsError as error:
                raise FollowError(str(error)) from None
            if remote.remote_num_tokens != job.remote.remote_num_tokens:
                held, said = remote.remote_num_tokens, job.remote.remote_num_tokens
                raise FollowError(f"P holds {held} tokens of it, not {said}")
            if followed.remote is not None and _has_moved(followed.remote, remote):
                return False
            followed.remote, followed.epoch = remote, news.epoch
        followed.is_sealed = news.state == "sealed"
        if followed.is_sealed and followed.remote is not None:
            transfer.remote = followed.remote
        # A rank may be ahead of what its scheduler has told, never behind: what it said of an earlier epoch is void.
        if news.mark_epoch == followed.epoch:
            followed.mark = Mark(news.base, news.next, news.layers)
        return True

    def _ask(self, transfer: Transfer, followed: Followed) -> None:
        remote, theirs = transfer.job.remote, followed.theirs
        question = self._client.await_handoff(
            Endpoint(remote.remote_host, remote.remote_port),
            remote.ticket.token,
            (theirs.pp_rank, theirs.tp_rank),
            followed.version,
            followed.stamp,
            PATIENCE_S,
            self._answer_timeout_s,
        )
        self._questions[question] = transfer, followed


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
