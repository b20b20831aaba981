"""Pulls: what becomes of each transfer of a rank, from its job to the outbox. See transfers.py for its states.

A pull ends at its deadline at the latest, and until then a fault of a link costs it time only: it waits for the next
link and reads everything once more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.digest import blocks_digest
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, Confirmed, HandoffNews
from vllm_datadist_connector.worker.caches import EngineError
from vllm_datadist_connector.worker.calls import Calls
from vllm_datadist_connector.worker.device import Fence
from vllm_datadist_connector.worker.following import Followed, FollowError, Following, Mover, Source, news_of
from vllm_datadist_connector.worker.instances import MAX_FAULTS, Instance, InstanceState
from vllm_datadist_connector.worker.links import Links
from vllm_datadist_connector.worker.offers import Offers
from vllm_datadist_connector.worker.peers import InstanceTable
from vllm_datadist_connector.worker.plan import PlanError, TokenRange, plan_pull
from vllm_datadist_connector.worker.transfers import Outbox, Phase, Transfer, TransferObserver, TransferTable

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

MAX_CALLS = 2
"""Of one pull to one P rank at once: one that runs, and one behind it. What becomes final meanwhile goes together."""


class Pulls:
    """Belongs to the driver thread, and never waits."""

    def __init__(
        self,
        ours: RankGeometry,
        transfers: TransferTable,
        calls: Calls,
        instances: InstanceTable,
        links: Links,
        offers: Offers,
        client: ChannelClient,
        outbox: Outbox,
        observer: TransferObserver,
        handshake_timeout_s: float,
        call_timeout_s: float,
        writes_end_with_call: bool,
    ) -> None:
        self._ours = ours
        self._transfers = transfers
        self._calls = calls
        self._instances = instances
        self._links = links
        self._client = client
        self._following: Following[Transfer] = Following(client, handshake_timeout_s)
        self._offers = offers
        self._call_timeout_s = call_timeout_s
        self._outbox = outbox
        self._observer = observer
        self._handshake_timeout_s = handshake_timeout_s
        self._writes_end_with_call = writes_end_with_call

    def start(self, job: PullJob, fence: Fence) -> None:
        deadline = time.monotonic() + job.deadline_s
        try:
            instance = self._instances.meet(job.remote, deadline, job.from_ourselves)
        except Exception:
            # No deadline watches over this request yet: it would wait for ever.
            logger.exception("%s: pull failed (internal)", job)
            self._observer.failed(Failure.INTERNAL)
            self._outbox.put(job, failed=True)
            return
        self.begin(self._transfers.add(job, instance, deadline, fence))

    def begin(self, transfer: Transfer) -> None:
        """As soon as its instance is linked with, and its fence has passed."""
        instance = transfer.instance
        transfer.phase, transfer.interrupted = Phase.WAITING, False
        if instance.state is InstanceState.READY:
            if transfer.fence.has_passed():
                self._pull(transfer)
            else:
                transfer.phase = Phase.FENCED
        elif instance.state is InstanceState.BROKEN:
            self._fail(transfer, Failure(instance.failed_step), instance.reason)
        else:
            instance.waiting.append(transfer.job.request_id)

    def _pull(self, transfer: Transfer) -> None:
        """One call per pair of caches and rank of P; those of different ranks run side by side."""
        job, instance = transfer.job, transfer.instance
        remote = job.remote
        held = remote.remote_num_tokens
        tokens = TokenRange(job.first_token, job.end_token, remote.remote_block_ids, job.local_blocks, held)
        transfer.phase, transfer.meeting = Phase.PULLING, instance.meeting
        transfer.transport = instance.transport
        transfer.num_bytes = transfer.early_bytes = transfer.pushed_bytes = 0
        if job.is_handoff:
            source = Source(instance.key.endpoint, remote.ticket.token, held)
            transfer.followed = [
                Followed.start(source, self._ours, theirs, peer.pairings) for peer, theirs in instance.givers
            ]
            for followed in transfer.followed:
                self._following.ask(transfer, followed)
            return
        try:
            for peer, theirs in instance.givers:
                pulls = plan_pull(self._ours, theirs, peer.pairings, tokens)
                transfer.unsubmitted.extend((theirs, pull) for pull in pulls)
        except PlanError as error:
            self._fail(transfer, Failure.PLAN, str(error))
            return
        transfer.num_bytes = sum(pull.num_bytes for _, pull in transfer.unsubmitted)
        if transfer.unsubmitted:
            self._submit(transfer)
        else:
            self._confirm(transfer)

    def _submit(self, transfer: Transfer) -> bool:
        """As many of its calls as there is room for; False if that was not enough."""
        try:
            return self._calls.submit(transfer)
        except EngineError as error:
            self._fail(transfer, Failure.PLAN, str(error))
            return True

    def submit_rest(self) -> None:
        """What takes the queue's places wakes us when it ends."""
        for transfer in self._transfers.unsubmitted():
            if not self._submit(transfer):
                return

    def on_completion(self, completion: _native.Completion) -> None:
        taken = self._transfers.take_call(completion.id)
        if taken is None:
            self._instances.on_completion(completion)
            return
        transfer, cluster_id = taken
        transfer.queued_s = max(transfer.queued_s, completion.queued_s)
        # Calls of a hand-off run one after another, others beside one another.
        transfer.run_s = (
            transfer.run_s + completion.run_s if transfer.followed else max(transfer.run_s, completion.run_s)
        )
        reason = f"{_native.status_name(completion.status)}: {completion.error}"
        if completion.status == _native.LLM_SUCCESS:
            transfer.instance.faults = 0
        elif completion.cancelled:
            # It never ran, which says nothing of the link: by its deadline, or because we took it back.
            if completion.status == _native.LLM_TIMEOUT:
                self.on_deadline(transfer)
                return
        elif self._links.is_fault(completion.status) and not transfer.instance.is_ourselves:
            if not self._writes_end_with_call:
                transfer.writers.add(cluster_id)
            self._on_link_fault(transfer, reason)
            return
        else:
            self._fail(transfer, Failure.TRANSFER, reason)
            return
        if not (transfer.is_over or transfer.interrupted):
            self._follow(transfer, [each for each in transfer.followed if each.theirs.cluster_id == cluster_id])
        self._end_if_done(transfer)

    def _follow(self, transfer: Transfer, ranks: Sequence[Followed]) -> None:
        """Pulls what has become final at those ranks of P."""
        job = transfer.job
        try:
            for followed in ranks:
                if followed.mover is not Mover.PULL or transfer.calls_to(followed.theirs.cluster_id) >= MAX_CALLS:
                    continue
                due = followed.due(job.first_token, job.end_token, job.local_blocks)
                transfer.unsubmitted.extend((followed.theirs, pull) for pull in due)
                num_bytes = sum(pull.num_bytes for pull in due)
                transfer.num_bytes += num_bytes
                transfer.early_bytes += 0 if followed.is_sealed else num_bytes
        except PlanError as error:
            self._fail(transfer, Failure.PLAN, str(error))
            return
        self._submit(transfer)

    def _end_if_done(self, transfer: Transfer) -> None:
        if not (transfer.is_written or transfer.unsubmitted or (transfer.is_followed and not transfer.is_over)):
            self._on_all_back(transfer)

    def on_gone(self, cluster_id: int) -> None:
        """No link with that cluster is left, and so nobody who writes over one."""
        for transfer in self._transfers.written_over(cluster_id):
            transfer.writers.discard(cluster_id)
            if not transfer.is_written:
                self._on_all_back(transfer)

    def _on_all_back(self, transfer: Transfer) -> None:
        """Nothing writes into its blocks any more."""
        if transfer.is_over:
            self._end(transfer)
        elif transfer.interrupted:
            self.begin(transfer)
        else:
            # What P may still say of its progress is of no use any more.
            transfer.followed = []
            self._confirm(transfer)

    def _on_link_fault(self, transfer: Transfer, reason: str) -> None:
        """Interrupts all that pulls over the instance's links, or each would wait for its own time-out."""
        instance = transfer.instance
        hits_all = transfer.meeting == instance.meeting
        if hits_all:
            self._instances.rest(instance, f"pull from {instance.key.endpoint}: {reason}")
        transfer.faults += 1
        if transfer.deadline <= time.monotonic():
            self.on_deadline(transfer)
        elif transfer.faults >= MAX_FAULTS:
            # Others' pulls pass over the links that this one breaks.
            self._fail(transfer, Failure.TRANSFER, f"{reason} ({transfer.faults} times)")
        else:
            self._interrupt(transfer)
        if hits_all:
            self._interrupt_all(instance)

    def _interrupt_all(self, instance: Instance) -> None:
        for other in self._transfers.pulling_from(instance):
            self._interrupt(other)

    def _interrupt(self, transfer: Transfer) -> None:
        transfer.interrupted, transfer.followed = True, []
        self._calls.take_back(transfer)
        self._offers.withdraw(transfer)
        if not transfer.is_written:
            self._on_all_back(transfer)

    def _confirm(self, transfer: Transfer) -> None:
        """Asks P whether the lease was held all the while: only then the bytes count."""
        transfer.phase = Phase.CONFIRMING
        job, ticket = transfer.job, transfer.remote.ticket
        timeout_s = min(self._handshake_timeout_s, max(0.001, transfer.deadline - time.monotonic()))
        sent = self._client.confirm(
            transfer.instance.key.endpoint,
            ticket.token,
            ticket.generation,
            job.prompt_digest,
            blocks_digest(transfer.remote.remote_block_ids),
            timeout_s,
        )
        self._transfers.add_confirm(transfer, sent)

    def on_answer(self, answer: ChannelAnswer) -> None:
        if self._instances.on_answer(answer):
            return
        followed = self._following.take(answer)
        if followed is not None:
            self._on_news(*followed, answer)
            return
        if self._offers.on_answer(answer):
            return
        transfer = self._transfers.take_confirm(answer.id)
        if transfer is None:
            return
        if answer.timed_out:
            # P may be busy: to ask again costs less than to throw the bytes away. The deadline bounds it.
            self._confirm(transfer)
        elif isinstance(answer.response, Confirmed) and answer.response.held:
            seconds = time.monotonic() - transfer.accepted_at
            self._end(transfer)
            self._observer.pulled(transfer, seconds)
        else:
            reason = answer.response.reason if isinstance(answer.response, Confirmed) else answer.error
            self._fail(transfer, Failure.LEASE, f"not confirmed by P: {reason}")

    def _on_news(self, transfer: Transfer, followed: Followed, answer: ChannelAnswer) -> None:
        if transfer.is_over or followed not in transfer.followed:
            return
        seen = followed.version, followed.stamp
        try:
            news = news_of(answer)
            if news is not None and not self._note(transfer, followed, news):
                logger.info("%s: P was preempted; pulling again from the start", transfer.job)
                self._interrupt(transfer)
                return
        except FollowError as error:
            self._fail(transfer, Failure.LEASE, f"hand-off: {error}")
            return
        if not followed.is_settled and followed.mover is not Mover.WITHDRAWN:
            self._following.ask(transfer, followed)
        if seen != (followed.version, followed.stamp):
            # P makes progress: its deadline is of a P that makes none.
            transfer.deadline = time.monotonic() + transfer.job.deadline_s
            transfer.instance.wanted_until = max(transfer.instance.wanted_until, transfer.deadline)
        self._follow(transfer, [followed])
        self._end_if_done(transfer)

    def _note(self, transfer: Transfer, followed: Followed, news: HandoffNews) -> bool:
        """What P says of one of its ranks; False if what we have pulled is void.

        Raises:
            FollowError: nothing will come of it.
        """
        if not followed.note(news):
            if followed.mover is Mover.PULL:
                return False
            # It is P that begins anew; what it had written is void, and not counted.
            followed.forget()
            followed.note(news)
        if followed.is_sealed and followed.remote is not None:
            transfer.remote = followed.remote
        elif followed.is_first and transfer.job.is_pushed:
            self._offers.make(transfer, followed)
        followed.is_first = False
        self._offers.hear(transfer, followed, news)
        return True

    def on_withdrawn(self, transfer: Transfer, followed: Followed) -> None:
        """P writes nothing more by an offer: what it has not written is pulled."""
        if not transfer.is_over and followed in transfer.followed:
            if not followed.is_settled:
                self._following.ask(transfer, followed)
            self._follow(transfer, [followed])
        self._end_if_done(transfer)

    def end_stuck(self, now: float) -> None:
        """A peer that writes for too long after its offer was withdrawn loses its links, and with them the write."""
        for transfer in self._offers.take_stuck(now, self._call_timeout_s):
            instance = transfer.instance
            self._instances.rest(instance, f"a push from {instance.key.endpoint} does not end")
            self._interrupt_all(instance)

    def settle(self, instance: Instance) -> None:
        """An instance has become READY or BROKEN: starts or fails whoever waits for it."""
        ready = instance.state is InstanceState.READY
        if ready:
            self._observer.handshake(time.monotonic() - instance.met_at)
        for request_id in self._instances.take_waiting(instance):
            transfer = self._transfers.get(request_id)
            if transfer is not None and transfer.instance is instance and transfer.phase is Phase.WAITING:
                self.begin(transfer)

    def cancel(self, request_id: str) -> None:
        transfer = self._transfers.get(request_id)
        if transfer is None:
            return
        transfer.cancelled = True
        self._abandon_calls(transfer)

    def on_deadline(self, transfer: Transfer) -> None:
        instance, unmet = transfer.instance, ""
        if transfer.phase is Phase.WAITING:
            unmet = f": {instance.key.endpoint} was not met" + (f", {instance.reason}" if instance.reason else "")
        self._fail(transfer, Failure.DEADLINE, f"not done within {transfer.job.deadline_s:g} s{unmet}")

    def _fail(self, transfer: Transfer, failure: Failure, reason: str) -> None:
        if not transfer.is_over:
            transfer.failure = failure
            self._observer.failed(failure)
            logger.warning("%s: pull failed (%s): %s", transfer.job, failure.value, reason)
        self._abandon_calls(transfer)

    def _abandon_calls(self, transfer: Transfer) -> None:
        """Takes back queued calls; ends the transfer now or, if one runs, when that writes no more."""
        self._calls.take_back(transfer)
        self._offers.withdraw(transfer)
        if not transfer.is_written:
            self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        self._transfers.remove(transfer)
        # A cancelled request is gone in the scheduler: it only waits to get its blocks back.
        self._outbox.put(transfer.job, failed=transfer.failure is not None and not transfer.cancelled)
