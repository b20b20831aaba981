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
from typing import Protocol, TypeVar

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.digest import blocks_digest
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.client import ChannelAnswer, Confirmed, open_client
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.wakeup import Wakeup, wait_readable
from vllm_datadist_connector.worker.caches import EngineError, RegisteredCaches
from vllm_datadist_connector.worker.copies import OwnCopies
from vllm_datadist_connector.worker.instances import MAX_FAULTS, Instance, InstanceState, Peer
from vllm_datadist_connector.worker.pairing import Terms, rehearse
from vllm_datadist_connector.worker.peers import InstanceTable
from vllm_datadist_connector.worker.plan import PlanError, TokenRange, plan_pull
from vllm_datadist_connector.worker.transfers import Failure, FinishedPulls, Outbox, Phase, Transfer, TransferTable

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())
T = TypeVar("T")

_PAUSE_AFTER_FAULT_S = 0.1

_TENSORS_PER_LAYER = 1
"""Our caches count one tensor per layer; without a layer range the value has no other effect than to divide."""

_LINK_LOST = frozenset(
    {_native.LLM_FAILED, _native.LLM_TIMEOUT, _native.LLM_NOT_YET_LINK, _native.LLM_KV_CACHE_NOT_EXIST}
)
"""Codes after which the link must be made anew before anything else is pulled over it."""


class TransferObserver(Protocol):
    """Takes measurements; called on the driver thread."""

    def pulled(self, transfer: Transfer, seconds: float) -> None: ...
    def failed(self, reason: Failure) -> None: ...
    def handshake(self, seconds: float) -> None: ...


class PullDriver:
    """submit(), cancel() and take_finished() never block; close() waits for running native calls."""

    def __init__(
        self,
        datadist: _native.LlmDataDist,
        ours: RankGeometry,
        caches: RegisteredCaches,
        config: ConnectorConfig,
        observer: TransferObserver,
    ) -> None:
        self._ours = ours
        self._caches = caches
        self._config = config
        self._observer = observer
        self._inbox: deque[PullJob | str] = deque()
        self._outbox = Outbox()
        self._wakeup = Wakeup()
        self._stopping = False
        self._linked = 0
        self._transfers = TransferTable()
        self._queue = _native.TransferQueue(datadist, threads=config.queue_threads)
        self._copies = OwnCopies(caches, ended=self._wakeup.set)
        self._client = open_client(Trust(config.auth, config.insecure))
        self._instances = InstanceTable(
            ours,
            self._client,
            self._queue,
            link_report=lambda cluster_id: datadist.query_link(cluster_id)[1],
            allows_peer=config.allows_peer,
            handshake_timeout_s=config.handshake_timeout_s,
            link_timeout_s=config.link_timeout_s,
            backoff_s=config.peer_backoff_s,
            ttl_s=config.peer_ttl_s,
            may_differ=config.may_differ,
            terms=Terms(datadist.capabilities.register_before_link, datadist.capabilities.min_run_bytes),
        )
        rehearse(ours)
        self._thread = threading.Thread(target=self._run, name="datadist-pull-driver", daemon=True)
        self._thread.start()

    def submit(self, job: PullJob) -> None:
        self._inbox.append(job)
        self._wakeup.set()

    def cancel(self, request_id: str) -> None:
        """The request ended: its pull is drained and reported as received."""
        self._inbox.append(request_id)
        self._wakeup.set()

    def take_finished(self) -> FinishedPulls:
        return self._outbox.take()

    def linked_peers(self) -> int:
        """As of the driver thread's last round: its tables must not be looked into from another thread."""
        return self._linked

    def close(self) -> None:
        self._stopping = True
        self._wakeup.set()
        self._thread.join()
        self._queue.close()
        self._copies.close()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._round()
            except Exception:
                # Without this thread every later request of this rank would wait for ever; a fault that stays must
                # not spin.
                logger.exception("pull driver: a round failed")
                time.sleep(_PAUSE_AFTER_FAULT_S)
        self._client.close()

    def _round(self) -> None:
        fds = [self._wakeup.fileno(), self._queue.fileno(), self._client.fileno()]
        wakes = (self._transfers.next_deadline(), self._instances.next_wake())
        if self._wakeup.fileno() in wait_readable(fds, min((at for at in wakes if at is not None), default=None)):
            self._wakeup.clear()
        self._each(self._take, self._taken_from_inbox())
        # Before what else has come: when we are late, the end of a greeting's time is not to be told as the reason.
        self._each(self._on_deadline, self._transfers.overdue(time.monotonic()))
        self._each(self._on_completion, self._queue.poll() + self._copies.poll())
        self._each(self._on_answer, self._client.take())
        self._each(self._settle, self._instances.take_changed())
        now = time.monotonic()
        busy = self._transfers.instances()
        self._instances.try_again(now, busy)
        self._instances.drop_unused(now, busy)
        self._linked = self._instances.linked()

    def _each(self, handle: Callable[[T], None], events: Iterable[T]) -> None:
        for event in events:
            try:
                handle(event)
            except Exception:
                # One bad event must not leave every later request of this rank waiting for ever.
                logger.exception("pull driver: %s failed", type(event).__name__)

    def _taken_from_inbox(self) -> list[PullJob | str]:
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def _take(self, item: PullJob | str) -> None:
        if isinstance(item, PullJob):
            self._start(item)
        else:
            self._cancel(item)

    def _start(self, job: PullJob) -> None:
        deadline = time.monotonic() + job.deadline_s
        try:
            instance = self._instances.meet(job.remote, deadline, job.from_ourselves)
        except Exception:
            # No deadline watches over this request yet: it would wait for ever.
            logger.exception("%s: pull failed (internal)", job)
            self._observer.failed(Failure.INTERNAL)
            self._outbox.put(job, failed=True)
            return
        self._begin(self._transfers.add(job, instance, deadline))

    def _begin(self, transfer: Transfer) -> None:
        """As soon as its instance is linked with."""
        instance = transfer.instance
        transfer.phase, transfer.interrupted = Phase.WAITING, False
        if instance.state is InstanceState.READY:
            self._pull(transfer)
        elif instance.state is InstanceState.BROKEN:
            self._fail(transfer, Failure(instance.failed_step), instance.reason)
        else:
            instance.waiting.append(transfer.job.request_id)

    def _pull(self, transfer: Transfer) -> None:
        """Submits one call per pair of caches and rank of P; those of different ranks run side by side."""
        job = transfer.job
        remote = job.remote
        held = remote.remote_num_tokens
        tokens = TokenRange(job.first_token, job.end_token, remote.remote_block_ids, job.local_blocks, held)
        transfer.phase, transfer.meeting, transfer.num_bytes = Phase.PULLING, transfer.instance.meeting, 0
        try:
            for peer, geometry in transfer.instance.givers:
                self._pull_from(transfer, peer, geometry, tokens)
        except (PlanError, EngineError) as error:
            self._fail(transfer, Failure.PLAN, str(error))
        except RuntimeError as error:
            # The queue is full, or closing.
            self._fail(transfer, Failure.TRANSFER, str(error))
        else:
            if not transfer.calls:
                self._confirm(transfer)

    def _pull_from(self, transfer: Transfer, peer: Peer, theirs: RankGeometry, tokens: TokenRange) -> None:
        for pull in plan_pull(self._ours, theirs, peer.pairings, tokens):
            transfer.num_bytes += pull.num_bytes
            if transfer.instance.is_ourselves:
                self._transfers.add_call(transfer, self._copies.submit(pull, transfer.deadline))
                continue
            call = self._queue.submit_pull_blocks(
                theirs.cluster_id,
                pull.src_cache_id,
                self._caches.view(pull.dst_index, pull.granule),
                pull.src_blocks,
                pull.dst_blocks,
                deadline_ms=max(1, int((transfer.deadline - time.monotonic()) * 1000)),
                src_layer_range=pull.src_layers,
                dst_layer_range=pull.dst_layers,
                tensor_num_per_layer=_TENSORS_PER_LAYER,
            )
            self._transfers.add_call(transfer, call)

    def _on_completion(self, completion: _native.Completion) -> None:
        transfer = self._transfers.take_call(completion.id)
        if transfer is None:
            self._instances.on_completion(completion)
            return
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
        elif completion.status in _LINK_LOST and not transfer.instance.is_ourselves:
            self._on_link_fault(transfer, reason)
            return
        else:
            self._fail(transfer, Failure.TRANSFER, reason)
            return
        if not transfer.calls:
            self._on_all_back(transfer)

    def _on_all_back(self, transfer: Transfer) -> None:
        """No call of it is queued or running."""
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
        for call in transfer.calls:
            self._take_back(call)
        if not transfer.calls:
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
        """Takes back queued calls; ends the transfer now or, if one runs, when that has come back."""
        for call in transfer.calls:
            self._take_back(call)
        if not transfer.calls:
            self._end(transfer)

    def _take_back(self, call: int) -> None:
        """If it has not started, it completes as cancelled."""
        if call < 0:
            self._copies.cancel(call)
        else:
            self._queue.cancel(call)

    def _end(self, transfer: Transfer) -> None:
        self._transfers.remove(transfer)
        # A cancelled request is gone in the scheduler: it only waits to get its blocks back.
        self._outbox.put(transfer.job, failed=transfer.failure is not None and not transfer.cancelled)
