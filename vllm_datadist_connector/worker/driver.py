"""PullDriver: the one thread of a D rank that owns its peers and transfers.

    step (vLLM's thread) ── submit, cancel ──> inbox ─┐
    side channel (answers) ───────────────────────────┼──> driver thread ──> outbox ──> next step
    transfer queue, own copies (completions) ─────────┘

It sleeps until one of them has something or a deadline passes, and never blocks on a peer: greetings are messages,
links and pulls are native calls in the transfer queue.

A pull ends at its deadline at the latest, and until then a fault of a link costs it time only: it waits for the next
link and reads everything once more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.digest import blocks_digest
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.client import ChannelAnswer, Confirmed, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.wakeup import Wakeup, wait_readable
from vllm_datadist_connector.worker.caches import EngineError, RegisteredCaches
from vllm_datadist_connector.worker.calls import Calls
from vllm_datadist_connector.worker.copies import OwnCopies
from vllm_datadist_connector.worker.device import PASSED, Fence
from vllm_datadist_connector.worker.instances import MAX_FAULTS, Instance, InstanceState
from vllm_datadist_connector.worker.links import Links
from vllm_datadist_connector.worker.pairing import Terms, rehearse
from vllm_datadist_connector.worker.peers import InstanceTable
from vllm_datadist_connector.worker.plan import PlanError, TokenRange, plan_pull
from vllm_datadist_connector.worker.quarantine import Quarantine
from vllm_datadist_connector.worker.transfers import (
    FinishedPulls,
    Outbox,
    Phase,
    Transfer,
    TransferObserver,
    TransferTable,
)

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())
T = TypeVar("T")

_PAUSE_AFTER_FAULT_S = 0.1

_FENCE_POLL_S = 0.001
_QUIET_S = 240.0
"""Less than a connection of the side channel stays open unused."""


class _Order(NamedTuple):
    job: PullJob
    fence: Fence


class PullDriver:
    """submit(), cancel() and take_finished() never block; close() waits for running native calls."""

    def __init__(
        self,
        datadist: _native.LlmDataDist,
        ours: RankGeometry,
        caches: RegisteredCaches,
        config: ConnectorConfig,
        observer: TransferObserver,
        capabilities: _native.Capabilities,
    ) -> None:
        self._ours = ours
        self._datadist = datadist
        self._capabilities = capabilities
        self._caches = caches
        self._config = config
        self._observer = observer
        self._inbox: deque[_Order | str] = deque()
        self._outbox = Outbox()
        self._wakeup = Wakeup()
        self._stopping = False
        self._linked: dict[Transport, int] = {}
        self._transfers = TransferTable()
        self._quarantine = Quarantine(self._transfers)
        self._queue = _native.TransferQueue(datadist, threads=config.queue_threads)
        self._copies = OwnCopies(caches, ended=self._wakeup.set)
        self._calls = Calls(self._queue, self._copies, caches, self._transfers)
        self._client = open_client(Trust(config.auth, config.insecure))
        self._links = Links(
            ours.host,
            self._queue,
            report=lambda cluster_id: datadist.query_link(cluster_id)[1],
            timeout_s=config.link_timeout_s,
            capabilities=capabilities,
        )
        self._instances = InstanceTable(
            ours,
            self._client,
            self._links,
            busy=self._transfers.instances,
            allows_peer=config.allows_peer,
            handshake_timeout_s=config.handshake_timeout_s,
            backoff_s=config.peer_backoff_s,
            # A P that hears nothing of us for as long as our side channel stays open would end its half of a link.
            ttl_s=config.peer_ttl_s if capabilities.peer_drops_half else min(config.peer_ttl_s, _QUIET_S),
            may_differ=config.may_differ,
            terms=Terms(capabilities.register_before_link, capabilities.min_run_bytes),
        )
        rehearse(ours)
        self._thread = threading.Thread(target=self._run, name="datadist-pull-driver", daemon=True)
        self._thread.start()

    def submit(self, job: PullJob, fence: Fence = PASSED) -> None:
        """
        Args:
            fence: nothing is written before it has passed.
        """
        self._inbox.append(_Order(job, fence))
        self._wakeup.set()

    def cancel(self, request_id: str) -> None:
        """The request ended: its pull is drained and reported as received."""
        self._inbox.append(request_id)
        self._wakeup.set()

    def take_finished(self) -> FinishedPulls:
        return self._outbox.take()

    def linked_peers(self) -> dict[Transport, int]:
        """As of the driver thread's last round: its tables must not be looked into from another thread."""
        return self._linked

    def close(self) -> None:
        self._stopping = True
        self._wakeup.set()
        self._thread.join()
        self._queue.close()
        self._copies.close()

    def quarantined_blocks(self) -> int:
        """Blocks of pulls that are over, and into which something may still write; as of the driver's last round."""
        return self._quarantine.num_blocks

    def _run(self) -> None:
        status = self._datadist.enter_thread()
        if status != _native.LLM_SUCCESS:
            logger.error("pull driver: %s: %s", _native.status_name(status), _native.last_error())
        while not self._stopping:
            try:
                self._round()
            except Exception:
                # Without this thread every later request of this rank would wait for ever; a fault that stays must
                # not spin.
                logger.exception("pull driver: a round failed")
                time.sleep(_PAUSE_AFTER_FAULT_S)
        if not self._capabilities.peer_drops_half:
            self._instances.part()
        self._client.close()

    def _round(self) -> None:
        fds = [self._wakeup.fileno(), self._queue.fileno(), self._client.fileno()]
        fences = time.monotonic() + _FENCE_POLL_S if self._transfers.fenced() else None
        ends = (self._transfers.next_deadline(), self._quarantine.next_wake())
        wakes = (fences, *ends, self._instances.next_wake())
        if self._wakeup.fileno() in wait_readable(fds, min((at for at in wakes if at is not None), default=None)):
            self._wakeup.clear()
        self._each(self._take, self._taken_from_inbox())
        # Before what else has come: when we are late, the end of a greeting's time is not to be told as the reason.
        self._each(self._on_deadline, self._transfers.overdue(time.monotonic()))
        self._each(self._on_completion, self._queue.poll() + self._copies.poll())
        self._each(self._on_gone, self._links.take_gone())
        self._each(self._on_answer, self._client.take())
        self._each(self._settle, self._instances.take_changed())
        self._each(self._begin, self._transfers.fenced())
        self._submit_rest()
        now = time.monotonic()
        self._instances.try_again(now)
        self._instances.drop_unused(now)
        self._linked = self._instances.linked()
        self._quarantine.watch(now)

    def _each(self, handle: Callable[[T], None], events: Iterable[T]) -> None:
        for event in events:
            try:
                handle(event)
            except Exception:
                # One bad event must not leave every later request of this rank waiting for ever.
                logger.exception("pull driver: %s failed", type(event).__name__)

    def _taken_from_inbox(self) -> list[_Order | str]:
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def _take(self, item: _Order | str) -> None:
        if isinstance(item, _Order):
            self._start(item.job, item.fence)
        else:
            self._cancel(item)

    def _start(self, job: PullJob, fence: Fence) -> None:
        deadline = time.monotonic() + job.deadline_s
        try:
            instance = self._instances.meet(job.remote, deadline, job.from_ourselves)
        except Exception:
            # No deadline watches over this request yet: it would wait for ever.
            logger.exception("%s: pull failed (internal)", job)
            self._observer.failed(Failure.INTERNAL)
            self._outbox.put(job, failed=True)
            return
        self._begin(self._transfers.add(job, instance, deadline, fence))

    def _begin(self, transfer: Transfer) -> None:
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

    def _submit_rest(self) -> None:
        """What takes the queue's places wakes us when it ends."""
        for transfer in self._transfers.unsubmitted():
            if not self._submit(transfer):
                return

    def _on_completion(self, completion: _native.Completion) -> None:
        taken = self._transfers.take_call(completion.id)
        if taken is None:
            self._instances.on_completion(completion)
            return
        transfer, cluster_id = taken
        transfer.queued_s = max(transfer.queued_s, completion.queued_s)
        transfer.run_s = max(transfer.run_s, completion.run_s)
        reason = f"{_native.status_name(completion.status)}: {completion.error}"
        if completion.status == _native.LLM_SUCCESS:
            transfer.instance.faults = 0
        elif completion.cancelled:
            # It never ran, which says nothing of the link: by its deadline, or because we took it back.
            if completion.status == _native.LLM_TIMEOUT:
                self._on_deadline(transfer)
                return
        elif self._links.is_fault(completion.status) and not transfer.instance.is_ourselves:
            if not self._capabilities.writes_end_with_call:
                transfer.writers.add(cluster_id)
            self._on_link_fault(transfer, reason)
            return
        else:
            self._fail(transfer, Failure.TRANSFER, reason)
            return
        if not (transfer.is_written or transfer.unsubmitted):
            self._on_all_back(transfer)

    def _on_gone(self, cluster_id: int) -> None:
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
            self._begin(transfer)
        else:
            self._confirm(transfer)

    def _on_link_fault(self, transfer: Transfer, reason: str) -> None:
        """Interrupts all that pulls over the instance's links, or each would wait for its own time-out."""
        instance = transfer.instance
        hits_all = transfer.meeting == instance.meeting
        if hits_all:
            self._instances.rest(instance, f"pull from {instance.key.endpoint}: {reason}")
        transfer.faults += 1
        if transfer.deadline <= time.monotonic():
            self._on_deadline(transfer)
        elif transfer.faults >= MAX_FAULTS:
            # Others' pulls pass over the links that this one breaks.
            self._fail(transfer, Failure.TRANSFER, f"{reason} ({transfer.faults} times)")
        else:
            self._interrupt(transfer)
        if hits_all:
            for other in self._transfers.pulling_from(instance):
                self._interrupt(other)

    def _interrupt(self, transfer: Transfer) -> None:
        transfer.interrupted = True
        self._calls.take_back(transfer)
        if not transfer.is_written:
            self._on_all_back(transfer)

    def _confirm(self, transfer: Transfer) -> None:
        """Asks P whether the lease was held all the while: only then the bytes count."""
        transfer.phase = Phase.CONFIRMING
        job, ticket = transfer.job, transfer.job.remote.ticket
        timeout_s = min(self._config.handshake_timeout_s, max(0.001, transfer.deadline - time.monotonic()))
        sent = self._client.confirm(
            transfer.instance.key.endpoint,
            ticket.token,
            ticket.generation,
            job.prompt_digest,
            blocks_digest(job.remote.remote_block_ids),
            timeout_s,
        )
        self._transfers.add_confirm(transfer, sent)

    def _on_answer(self, answer: ChannelAnswer) -> None:
        if self._instances.on_answer(answer):
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

    def _settle(self, instance: Instance) -> None:
        """An instance has become READY or BROKEN: starts or fails whoever waits for it."""
        ready = instance.state is InstanceState.READY
        if ready:
            self._observer.handshake(time.monotonic() - instance.met_at)
        for request_id in self._instances.take_waiting(instance):
            transfer = self._transfers.get(request_id)
            if transfer is not None and transfer.instance is instance and transfer.phase is Phase.WAITING:
                self._begin(transfer)

    def _cancel(self, request_id: str) -> None:
        transfer = self._transfers.get(request_id)
        if transfer is None:
            return
        transfer.cancelled = True
        self._abandon_calls(transfer)

    def _on_deadline(self, transfer: Transfer) -> None:
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
        if not transfer.is_written:
            self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        self._transfers.remove(transfer)
        # A cancelled request is gone in the scheduler: it only waits to get its blocks back.
        self._outbox.put(transfer.job, failed=transfer.failure is not None and not transfer.cancelled)
