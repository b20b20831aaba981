"""RankDriver: the one thread of a worker rank that owns its peers and transfers, whatever its role.

    step (vLLM's thread) ── submit, cancel ──> inbox ─┐
    side channel (answers) ───────────────────────────┼──> driver thread ──> outbox ──> next step
    transfer queue, own copies (completions) ─────────┘

It sleeps until one of them has something or a deadline passes, and never blocks on a peer: greetings are messages,
links, pulls and pushes are native calls in the transfer queue. What becomes of each: pulls.py, pushes.py.
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
from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import Home, PullJob
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.client import ChannelAnswer, Watched, open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.wakeup import Wakeup, wait_readable
from vllm_datadist_connector.worker import endings
from vllm_datadist_connector.worker.caches import RegisteredCaches
from vllm_datadist_connector.worker.calls import Calls
from vllm_datadist_connector.worker.copies import OwnCopies
from vllm_datadist_connector.worker.device import PASSED, Fence
from vllm_datadist_connector.worker.following import Followed
from vllm_datadist_connector.worker.links import Links
from vllm_datadist_connector.worker.offers import Offers
from vllm_datadist_connector.worker.pairing import Terms, rehearse
from vllm_datadist_connector.worker.peers import InstanceTable
from vllm_datadist_connector.worker.pulls import Pulls
from vllm_datadist_connector.worker.pushes import Pushes
from vllm_datadist_connector.worker.quarantine import Quarantine
from vllm_datadist_connector.worker.roles import RoleChange
from vllm_datadist_connector.worker.transfers import FinishedPulls, Outbox, Transfer, TransferObserver, TransferTable
from vllm_datadist_connector.worker.watcher import Watcher

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


class RankDriver:
    """No member but close() blocks, which waits for running native calls."""

    def __init__(
        self,
        datadist: _native.LlmDataDist,
        ours: RankGeometry,
        caches: RegisteredCaches,
        config: ConnectorConfig,
        observer: TransferObserver,
        capabilities: _native.Capabilities,
    ) -> None:
        """
        Args:
            ours: its `pushes` says whether the rank takes offers.
        """
        self._datadist = datadist
        self._capabilities = capabilities
        self._inbox: deque[_Order | str | Home] = deque()
        self._outbox = Outbox()
        self._wakeup = Wakeup()
        self._stopping = False
        self._linked: dict[Transport, int] = {}
        self._transfers = TransferTable()
        self._quarantine = Quarantine(self._transfers)
        self._queue = _native.TransferQueue(datadist, threads=config.queue_threads)
        self._longest_call_s = max(config.pull_timeout_s, config.link_timeout_s)
        self._copies = OwnCopies(caches, ended=self._wakeup.set)
        self._client = open_client(Trust(config.auth, config.insecure))
        self._links = Links(
            Endpoint(ours.host, ours.port),
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
        self._offers = Offers(datadist, ours, self._client, config.handshake_timeout_s, capabilities.grants_writes)
        self._pulls = Pulls(
            ours,
            self._transfers,
            Calls(self._queue, self._copies, caches, self._transfers),
            self._instances,
            self._links,
            self._offers,
            self._client,
            self._outbox,
            observer,
            handshake_timeout_s=config.handshake_timeout_s,
            call_timeout_s=config.pull_timeout_s,
            writes_end_with_call=capabilities.writes_end_with_call,
        )
        answer_s = config.handshake_timeout_s
        self._watcher = Watcher(self._client, (ours.pp_rank, ours.tp_rank), answer_s)
        self._pushes: Pushes | None = None
        if ours.pushes:
            self._pushes = Pushes(ours, self._queue, self._client, self._watcher, config.pull_timeout_s, answer_s)
        self._role = self._role_change(ours, answer_s) if config.role_switch else None
        rehearse(ours)
        self._thread = threading.Thread(target=self._run, name="datadist-driver", daemon=True)
        self._thread.start()

    def _role_change(self, ours: RankGeometry, answer_timeout_s: float) -> RoleChange:
        return RoleChange(
            self._datadist,
            ours,
            self._client,
            self._links,
            self._under_way,
            lambda: self._instances.leave_all("the role changes"),
            answer_timeout_s,
        )

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

    def watch(self, home: Home) -> None:
        """Offers come from there, and orders to change the role."""
        self._inbox.append(home)
        self._wakeup.set()

    def take_finished(self, wait_s: float = 0.0) -> FinishedPulls:
        """
        Args:
            wait_s: at most so long, for the first one.
        """
        return self._outbox.take(wait_s)

    def linked_peers(self) -> dict[Transport, int]:
        """As of the driver thread's last round: its tables must not be looked into from another thread."""
        return self._linked

    def close(self) -> bool:
        """False if a native call never came back: what it uses must stay."""
        self._stopping = True
        self._wakeup.set()
        self._thread.join()
        ended = endings.end(self._queue, self._longest_call_s)
        self._copies.close()
        return ended

    def quarantined_blocks(self) -> int:
        """Blocks of pulls that are over, and into which something may still write; as of the driver's last round."""
        return self._quarantine.num_blocks

    def _run(self) -> None:
        status = self._datadist.enter_thread()
        if status != _native.LLM_SUCCESS:
            logger.error("driver: %s: %s", _native.status_name(status), _native.last_error())
        while not self._stopping:
            try:
                self._round()
            except Exception:
                # Without this thread every later request of this rank would wait for ever; a fault that stays must
                # not spin.
                logger.exception("driver: a round failed")
                time.sleep(_PAUSE_AFTER_FAULT_S)
        if not self._capabilities.peer_drops_half:
            self._instances.part()
        self._client.close()

    def _round(self) -> None:
        fds = [self._wakeup.fileno(), self._queue.fileno(), self._client.fileno()]
        fences = time.monotonic() + _FENCE_POLL_S if self._transfers.fenced() else None
        ends = (self._transfers.next_deadline(), self._quarantine.next_wake())
        role = self._role.next_wake(time.monotonic()) if self._role is not None else None
        wakes = (fences, *ends, self._instances.next_wake(), self._offers.next_wake(), self._watcher.next_wake(), role)
        if self._wakeup.fileno() in wait_readable(fds, min((at for at in wakes if at is not None), default=None)):
            self._wakeup.clear()
        self._each(self._take, self._taken_from_inbox())
        # Before what else has come: when we are late, the end of a greeting's time is not to be told as the reason.
        self._each(self._pulls.on_deadline, self._transfers.overdue(time.monotonic()))
        self._each(self._on_completion, self._queue.poll() + self._copies.poll())
        self._each(self._pulls.on_gone, self._links.take_gone())
        self._each(self._on_answer, self._client.take())
        self._each(self._on_withdrawn, self._offers.take_ended(time.monotonic()))
        self._each(self._pulls.settle, self._instances.take_changed())
        self._each(self._pulls.begin, self._transfers.fenced())
        now = time.monotonic()
        self._pulls.submit_rest()
        self._pulls.end_stuck(now)
        self._watcher.try_again(now)
        if self._pushes is not None:
            self._pushes.round()
        if self._role is not None:
            self._role.round(now)
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
                logger.exception("driver: %s failed", type(event).__name__)

    def _on_completion(self, completion: _native.Completion) -> None:
        if self._pushes is None or not self._pushes.on_completion(completion):
            self._pulls.on_completion(completion)

    def _on_answer(self, answer: ChannelAnswer) -> None:
        is_watch, told = self._watcher.take(answer)
        if told is not None:
            self._on_told(told)
        elif is_watch or (self._role is not None and self._role.on_answer(answer)):
            return
        elif self._pushes is None or not self._pushes.on_answer(answer):
            self._pulls.on_answer(answer)

    def _on_told(self, told: Watched) -> None:
        if not told.role and self._pushes is not None:
            self._pushes.begin(told)
        elif told.role and self._role is not None and self._watcher.home is not None:
            self._role.begin(told, self._watcher.home, time.monotonic())

    def _under_way(self) -> str:
        """What a change of the role waits for."""
        pushes = len(self._pushes) if self._pushes is not None else 0
        counts = ((len(self._transfers), "pulls"), (pushes, "pushes"))
        return " and ".join(f"{count} {what}" for count, what in counts if count)

    def _on_withdrawn(self, ended: tuple[Transfer, Followed]) -> None:
        self._pulls.on_withdrawn(*ended)

    def _taken_from_inbox(self) -> list[_Order | str | Home]:
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def _take(self, item: _Order | str | Home) -> None:
        if isinstance(item, _Order):
            self._pulls.start(item.job, item.fence)
        elif isinstance(item, Home):
            if self._pushes is not None or self._role is not None:
                self._watcher.watch(item)
        else:
            self._pulls.cancel(item)
