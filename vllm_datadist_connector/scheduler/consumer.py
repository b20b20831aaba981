"""D's side of requests: which tokens come from P, into which blocks, and when P may forget them.

"P" is whoever holds the blocks and "D" we who pull them: the D of an earlier turn is the P of the next one's prefill.

    EXPECTED ──P has begun──> NEW
    NEW ──alloc, tokens to load──> PULLING ──finished_recving──> (gone; lease released)
     │ lease renewed at once          └──request_finished (abort)──> worker drains ──finished_recving──> (gone)
     ├──alloc, nothing to load or refused──> (gone; lease released)
     └──request_finished before any alloc──> (gone; lease released)

A request that is not in the table is an ordinary local one: that is how invalid params, a failed pull that is
recomputed, and a preempted request end up prefilling here. EXPECTED ones are in expected.py.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.labels import Reason
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.params import (
    ParamsError,
    RemotePrefill,
    Unusable,
    is_pushed,
    names_earlier_turn,
    names_handoff,
    parse_expected,
    parse_remote_prefill,
    wants_remote_prefill,
)
from vllm_datadist_connector.scheduler.adapters import is_same
from vllm_datadist_connector.scheduler.digests import PromptDigests
from vllm_datadist_connector.scheduler.expected import Expectations
from vllm_datadist_connector.scheduler.identity import adapter_of, is_token_prompt
from vllm_datadist_connector.scheduler.local_prefills import REASON_OF, LocalPrefills
from vllm_datadist_connector.side_channel.client import open_keeper
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

if TYPE_CHECKING:
    from vllm.v1.request import Request


COMPARED_AT_ONCE = 8192
"""Prompts of no more tokens do not wait for their comparison: it takes a tenth of a millisecond, and to wait for it
costs the request a step, of a millisecond at the very least."""


class _State(enum.Enum):
    NEW = enum.auto()
    PULLING = enum.auto()


class _Tracked(msgspec.Struct):
    remote: RemotePrefill
    loadable_tokens: int
    offered_from: int = 0
    """The first token that vLLM was offered last: it may take fewer than all that follow."""
    least_tokens: int = 1
    """Fewer than these are not worth a pull."""
    is_compared: bool = False
    """Whether the prompt was found to be P's, which takes time for a long one."""
    is_gone: bool = False
    """Whether nothing was offered last because the lease does not stand."""
    refusal: tuple[Reason, str] | None = None
    """Why nothing of it may be loaded. The request is tracked all the same, because P waits to hear of its lease: vLLM
    announces a request that its API server rejected with a prompt of its own making, only to abort it."""
    state: _State = _State.NEW
    from_ourselves: bool = False


class ConsumerScheduler:
    def __init__(
        self,
        groups: tuple[KVGroup, ...],
        allows_peer: Callable[[str], bool],
        recv_deadline_s: float,
        answer_timeout_s: float,
        trust: Trust,
        recompute_threshold: int | None,
        prompt_tail: int = 1,
        ourselves: tuple[Endpoint, str] | None = None,
        local: LocalPrefills | None = None,
        handoff_wait_s: float = 30.0,
        transfer_mode: str = "pull",
        meter: SchedulerMeter | None = None,
    ) -> None:
        """
        Args:
            recompute_threshold: of a P request that names an earlier turn's blocks, so many tokens at least are pulled
                at once; None: such blocks are not pulled.
            prompt_tail: so many of a prompt's last tokens at least are computed here.
            ourselves: our own side channel and incarnation, where we may be the P of our own requests.
            transfer_mode: of hand-offs that do not say theirs.
            local: notes what is prefilled here after all.
            meter: is told what becomes of pulls.
        """
        self._groups = groups
        self._forgets = any(group.forgets for group in groups)
        self._largest_block = max([1, *(group.block_size for group in groups)])
        self._prompt_tail = max(1, prompt_tail)
        self._recompute_threshold = recompute_threshold
        self._ourselves = ourselves
        self._allows_peer = allows_peer
        self._recv_deadline_s = recv_deadline_s
        self._transfer_mode = transfer_mode
        self._meter = meter if meter is not None else SchedulerMeter("")
        self._local = local if local is not None else LocalPrefills(self._meter)
        self._keeper = open_keeper(trust, answer_timeout_s)
        self._expected = Expectations(trust, handoff_wait_s, answer_timeout_s)
        self._requests: dict[str, _Tracked] = {}
        self._pulls: list[PullJob] = []
        self._cancels: list[str] = []
        self._digests = PromptDigests(COMPARED_AT_ONCE)
        self._pulling = 0

    def on_new_request(self, request: Request, gives: bool = False) -> None:
        """
        Args:
            gives: we prefill for others as well.
        """
        params = request.kv_transfer_params
        earlier_turn = self._recompute_threshold is not None and names_earlier_turn(params)
        if not (wants_remote_prefill(params) or earlier_turn) or self._is_known(request.request_id):
            return
        try:
            if names_handoff(params) and not earlier_turn:
                self._expect(request, gives)
            else:
                self._admit(request, parse_remote_prefill(params if params is not None else {}), earlier_turn)
        except ParamsError as error:
            self._local.note(request.request_id, REASON_OF[error.why], f"kv_transfer_params: {error}")

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._requests or request_id in self._expected

    def _expect(self, request: Request, gives: bool) -> None:
        expected = parse_expected(request.kv_transfer_params or {})
        self._check_host(expected.remote_host)
        # Blocks that wait for a prefill elsewhere while a prefill here waits for blocks: of instances that are both,
        # such waits can close to a circle, and vLLM preempts no request that waits for its KV cache.
        if not self._expected.expect(request.request_id, expected, until_sealed=gives):
            self._local.note(request.request_id, Reason.TOO_MANY, "as many prefills are waited for as can be")

    def _admit(self, request: Request, remote: RemotePrefill, earlier_turn: bool = False) -> None:
        """One of which it is known what P holds, or will."""
        tracked = self._track(request, remote)
        if earlier_turn and self._recompute_threshold is not None:
            tracked.least_tokens = max(tracked.least_tokens, self._recompute_threshold)
        if self._digests.begin(request, remote.remote_num_tokens):
            self._compare(request, tracked)
        ticket = remote.ticket
        if self._keeper.hold(_endpoint_of(remote), ticket.token, ticket.lease_s, not earlier_turn):
            self._requests[request.request_id] = tracked
        else:
            self._digests.forget(request.request_id)
            self._local.note(request.request_id, Reason.TOO_MANY, "as many leases are kept alive as can be")

    def _hear_of(self, request: Request) -> bool:
        """Whether it is known by now what P has begun for the request, or that it will not."""
        heard = self._expected.take(request.request_id)
        if heard is None:
            return False
        if isinstance(heard, str):
            self._local.note(request.request_id, Reason.NO_PREFILL, heard)
            return True
        try:
            self._admit(request, heard)
        except ParamsError as error:
            self._local.note(request.request_id, REASON_OF[error.why], f"hand-off: {error}")
        return True

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Tokens that P can give beyond those computed here; None: not known yet, vLLM asks again in its next step.

        vLLM may ask many times: the last answer counts.
        """
        if request.request_id in self._expected and not self._hear_of(request):
            return None
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.state is not _State.NEW:
            return 0
        tracked.offered_from, tracked.is_gone = num_computed_tokens, False
        if not tracked.is_compared and not self._compare(request, tracked):
            return None
        count = tracked.loadable_tokens - num_computed_tokens
        if count < tracked.least_tokens:
            return 0
        held = self._keeper.holds(tracked.remote.ticket.token)
        tracked.is_gone = held is False
        return None if held is None else count * held

    def waiting_on_ourselves(self) -> list[str]:
        """Requests that have not begun to pull blocks which we hold for them ourselves, the newest first."""
        requests = reversed(self._requests.items())
        return [name for name, each in requests if each.from_ourselves and each.state is _State.NEW]

    def taken(self) -> int:
        """Requests whose KV is pulled here, or will be."""
        return len(self._requests) + len(self._expected)

    def prefill_here(self, request_id: str, why: tuple[Reason, str]) -> None:
        """One that has not begun to pull does not begin."""
        if request_id in self._expected:
            self._expected.give_up(request_id)
            self._local.note(request_id, *why)
            return
        tracked = self._requests.get(request_id)
        if tracked is not None and tracked.state is _State.NEW and tracked.refusal is None:
            tracked.loadable_tokens, tracked.refusal = 0, why

    def token_of(self, request_id: str) -> str:
        return self._requests[request_id].remote.ticket.token

    def lose_lease(self, request_id: str) -> None:
        """It is prefilled here."""
        self._keeper.lose(self.token_of(request_id))

    def after_alloc(self, request: Request, tables: Sequence[Sequence[int]], num_external_tokens: int) -> None:
        """Blocks were allocated.

        Args:
            tables: if there are external tokens, the request's whole block table of every KV cache group.
        """
        self._expected.give_up(request.request_id)
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.state is not _State.NEW:
            return
        self._digests.forget(request.request_id)
        # The flag is what the rest of vLLM sees of "not loaded yet"; a requeued request must not find it set.
        if wants_remote_prefill(request.kv_transfer_params) and request.kv_transfer_params is not None:
            request.kv_transfer_params["do_remote_prefill"] = False
        if num_external_tokens <= 0:
            if tracked.refusal is not None:
                self._local.note(request.request_id, *tracked.refusal)
            elif tracked.is_gone:
                gone = f"the lease of {tracked.remote} is gone, or nobody answers for it"
                self._local.note(request.request_id, Reason.LEASE_GONE, gone)
            self._forget(request.request_id)
            return
        tracked.state = _State.PULLING
        is_handoff = tracked.remote.ticket.generation == 0
        self._count_pulls(1)
        first, end = tracked.offered_from, tracked.offered_from + num_external_tokens
        self._keeper.pulls(tracked.remote.ticket.token, self._recv_deadline_s)
        grouped = zip(self._groups, tables, strict=True)
        self._pulls.append(
            PullJob(
                request_id=request.request_id,
                remote=tracked.remote,
                local_blocks=tuple(group.covering(table, first, end) for group, table in grouped),
                first_token=first,
                end_token=end,
                prompt_digest=tracked.remote.ticket.prompt_digest,
                from_ourselves=tracked.from_ourselves,
                deadline_s=self._recv_deadline_s,
                is_handoff=is_handoff,
                is_pushed=is_handoff and is_pushed(request.kv_transfer_params, self._transfer_mode),
            )
        )

    def request_finished(self, request_id: str) -> None:
        self._expected.give_up(request_id)
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        if tracked.state is _State.PULLING:
            # The blocks stay until the worker reports that nothing writes into them any more.
            self._cancels.append(request_id)
        else:
            self._forget(request_id)

    def received(self, request_ids: Iterable[str]) -> None:
        """Every worker rank has reported these as received, well or not: P may free its blocks."""
        for request_id in request_ids:
            self._forget(request_id)

    def take_jobs(self) -> tuple[tuple[PullJob, ...], tuple[str, ...]]:
        """(pulls, cancels) since the last step."""
        if not (self._pulls or self._cancels):
            return (), ()
        pulls, self._pulls = tuple(self._pulls), []
        cancels, self._cancels = tuple(self._cancels), []
        return pulls, cancels

    def pulling(self) -> int:
        return self._pulling

    def close(self) -> None:
        self._keeper.close()
        self._expected.close()
        self._digests.close()

    def _check_host(self, host: str) -> None:
        if not self._allows_peer(host):
            raise ParamsError(f"remote_host: {host!r:.80} is not among allowed_peers", Unusable.HOST)

    def _track(self, request: Request, remote: RemotePrefill) -> _Tracked:
        self._check_host(remote.remote_host)
        loadable = self._loadable(request, remote)
        refusal = self._refusal(request, remote, loadable)
        tracked = _Tracked(remote, 0 if refusal else loadable, refusal=refusal)
        if self._ourselves == (_endpoint_of(remote), remote.ticket.incarnation):
            # What our prefix cache has of it needs no second copy: released, the blocks are the request's own.
            tracked.from_ourselves, tracked.least_tokens = True, self._largest_block
        return tracked

    def _compare(self, request: Request, tracked: _Tracked) -> bool:
        """Compares the prompt with P's, whose KV would be another's; False if that takes a while longer."""
        if tracked.refusal is None:
            if not self._digests.is_ready(request.request_id):
                return False
            remote, ticket = tracked.remote, tracked.remote.ticket
            # Of an adapter that only P can read, P's word: the confirmation fails if it is not P's.
            if ticket.prompt_digest != self._digests.take(request, remote.remote_num_tokens, ticket.adapter):
                tracked.loadable_tokens = 0
                tracked.refusal = Reason.PROMPT, f"the tokens of {remote} are not how this prompt begins"
        tracked.is_compared = True
        return True

    def _loadable(self, request: Request, remote: RemotePrefill) -> int:
        """Tokens of the prompt, from the first one on, that P's blocks can give and that are worth having.

        The last one is not: vLLM feeds it once more for the first logits. Were it loaded, vLLM would feed it with a
        sliding window that has moved on by one token, and may have lost a block that it still needs.
        """
        covered = min(len(request.prompt_token_ids or ()) - self._prompt_tail, remote.remote_num_tokens)
        if remote.ticket.generation == 0:
            # P allocates its blocks as it goes on.
            return covered
        for table, size in zip(remote.remote_block_ids, remote.ticket.block_sizes, strict=False):
            if size:
                covered = min(covered, len(table) * size)
        return covered

    def _refusal(self, request: Request, remote: RemotePrefill, loadable: int) -> tuple[Reason, str] | None:
        """Why P's blocks would be wrong for this request; None if they fit."""
        if len(remote.remote_block_ids) != len(remote.ticket.block_sizes):
            groups, leased = len(remote.remote_block_ids), len(remote.ticket.block_sizes)
            return Reason.PARAMS, f"remote_block_ids: {groups} KV cache groups, the lease is for {leased}"
        if not is_token_prompt(request):
            return Reason.PROMPT, "a prompt of embeddings cannot be compared with P's"
        ours, theirs = adapter_of(request), remote.ticket.adapter
        if not is_same(ours, theirs):
            return Reason.ADAPTER, f"LoRA adapter: ours {ours or 'none'}, that of {remote} {theirs or 'none'}"
        if self._forgets and loadable != remote.remote_num_tokens:
            # A state cannot be taken back to an earlier token, nor a window to blocks that it has left.
            have = request.num_prompt_tokens
            fit = f"after {remote.remote_num_tokens} tokens; of the prompt's {have} {loadable} fit"
            return Reason.PROMPT, f"the blocks of {remote} are those {fit}"
        return None

    def _forget(self, request_id: str) -> None:
        tracked = self._requests.pop(request_id, None)
        self._digests.forget(request_id)
        if tracked is not None:
            self._meter.count("releases")
            if tracked.state is _State.PULLING:
                self._count_pulls(-1)
            self._keeper.release(tracked.remote.ticket.token)

    def _count_pulls(self, more: int) -> None:
        self._pulling += more
        self._meter.pulling(self._pulling)


def _endpoint_of(remote: RemotePrefill) -> Endpoint:
    return Endpoint(remote.remote_host, remote.remote_port)
