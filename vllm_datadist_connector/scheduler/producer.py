"""P's side of requests: grants a lease when a prefill is done, gives the blocks back when the lease has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metadata import GivingStep, Home
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.params import (
    BlockIds,
    LeaseTicket,
    ParamsError,
    RemotePrefill,
    build_params,
    names_handoff,
    parse_handoff,
    wants_remote_decode,
)
from vllm_datadist_connector.scheduler.digests import PromptDigests
from vllm_datadist_connector.scheduler.handoffs import Handoffs
from vllm_datadist_connector.scheduler.identity import InstanceIdentity, adapter_of, is_token_prompt
from vllm_datadist_connector.scheduler.leases import Leases
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import HandoffTable, LeaseTable, RoleSwitch, serve

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

_HELD_STATUSES = RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED
"""Ends of a prefill whose blocks D wants: max_tokens reached, or a stop token as the very first one."""

_PULL_GRACE_S = 5.0
"""Who pulls when we pause may go on for so long: a D that is paused, too, would never tell us that it is done."""


_LEFT_EVERY_S = 1.0
"""For Ds that have left, P looks so often."""


class ProducerScheduler:
    """Owns the leases and the side channel's listener, which answers from them by itself."""

    def __init__(
        self,
        identity: InstanceIdentity,
        endpoint: Endpoint,
        limit_s: float,
        trust: Trust,
        claim_s: float = float("inf"),
        group_ids: Sequence[int] | None = None,
        lease_s: float = 30.0,
        meter: SchedulerMeter | None = None,
        switches_roles: bool = False,
    ) -> None:
        """
        Args:
            group_ids: which of vLLM's KV cache groups those of the identity are; None: all, in their order.
            lease_s: of hand-offs.
            meter: is told what becomes of leases.
            switches_roles: an operator may tell the side channel to do less, or all again.
        """
        self._identity = identity
        self._forgets = any(group.forgets for group in identity.groups)
        block_sizes = tuple(group.block_size for group in identity.groups)
        self._leases = Leases(identity.incarnation, block_sizes, limit_s, claim_s)
        self._meter = meter if meter is not None else SchedulerMeter(identity.engine_id)
        self._changes = 0
        """Of the lease table, those that were heard of."""
        self._ended: list[str] = []
        """Requests whose lease has ended and whose workers were not told."""
        self._digests = PromptDigests()
        self._next_look = 0.0
        self._returning = 0
        self._paused_at: float | None = None
        self._lease_s = lease_s
        self._taken: dict[str, tuple[int, str]] = {}
        """Digests of the first so many tokens of requests with a hand-off that has begun."""
        handoffs = HandoffTable()
        group_ids = range(len(identity.groups)) if group_ids is None else group_ids
        self._handoffs = Handoffs(handoffs, identity.groups, group_ids, self._describe)
        self.roles = RoleSwitch(self._leases.table, handoffs) if switches_roles else None
        self._server = serve(
            endpoint, identity.engine_id, identity.incarnation, self._leases.table, trust, handoffs, self.roles
        )
        self.endpoint = Endpoint(endpoint.host, self._server.port)

    def set_geometries(self, geometries: dict[tuple[int, int], bytes]) -> None:
        """Geometry of every worker rank by (pp rank, tp rank), each a RankGeometry in msgpack."""
        self._server.set_geometries(geometries)

    def on_new_request(self, request: Request, gives: bool = True) -> None:
        """One whose blocks we may have to hold.

        Args:
            gives: whether we give any now.
        """
        self._digests.begin(request, request.num_prompt_tokens)
        params = request.kv_transfer_params
        # A D's request names the hand-off that it takes, also where its blocks are kept for the next turn.
        if params is None or not (wants_remote_decode(params) and names_handoff(params)):
            return
        try:
            token = parse_handoff(params)
        except ParamsError as error:
            logger.warning("request %s: kv_transfer_params: %s", request.request_id, error)
            return
        if not self._handoffs.promise(request, token, request.num_prompt_tokens):
            logger.warning("request %s: hand-off %s is another request's already", request.request_id, token)
        elif not gives:
            # Its D would wait for a hand-off that P has not heard of.
            self._handoffs.end(request.request_id, "P gives no KV in the role that it has now")
        elif not is_token_prompt(request):
            self._handoffs.end(request.request_id, "a prompt of embeddings cannot be compared with P's")

    @property
    def home(self) -> Home:
        return Home(self.endpoint, self._handoffs.key)

    def step(self, output: SchedulerOutput) -> GivingStep | None:
        """What our ranks are to report progress of."""
        return self._handoffs.step(output, self.endpoint)

    def request_finished(
        self,
        request: Request,
        tables: Sequence[Sequence[int]],
        lease_s: float,
        for_next_turn: bool = False,
        gives: bool = True,
    ) -> tuple[bool, dict[str, Any]]:
        """Whether vLLM shall keep the blocks, and the params for the router.

        Args:
            tables: the request's block table of every KV cache group.
            for_next_turn: the request was decoded here, and the blocks are kept for whoever prefills the conversation's
                next prompt; otherwise it was prefilled here for a D.
            gives: whether we give any blocks now; those of a hand-off were promised before.
        """
        num_tokens = self._held_tokens(request, for_next_turn)
        groups = self._identity.groups
        held = tuple([group.holding(table, num_tokens) for group, table in zip(groups, tables, strict=True)])
        ticket = None
        gives = gives or bool(self._handoffs.token_of(request.request_id))
        if gives and num_tokens and any(any(group) for group in held):
            ticket = self._grant(request, held, num_tokens, lease_s, for_next_turn)
        else:
            self._handoffs.end(request.request_id, f"P holds nothing of its request, which ended {request.status.name}")
        self._digests.forget(request.request_id)
        self._taken.pop(request.request_id, None)
        return ticket is not None, build_params(
            engine_id=self._identity.engine_id,
            request_id=request.request_id,
            host=self.endpoint.host,
            port=self.endpoint.port,
            block_ids=held if ticket is not None else tuple(() for _ in held),
            num_tokens=num_tokens if ticket is not None else 0,
            tp_size=self._identity.tp_size,
            pp_size=self._identity.pp_size,
            dcp_size=self._identity.dcp_size,
            ticket=ticket,
            for_next_turn=for_next_turn,
        )

    def _grant(
        self, request: Request, held: BlockIds, num_tokens: int, lease_s: float, for_next_turn: bool
    ) -> LeaseTicket | None:
        """None if the D of its hand-off has given it up."""
        token = self._handoffs.token_of(request.request_id)
        if token and self._handoffs.is_withdrawn(token):
            self._handoffs.end(request.request_id, "its D has given it up")
            return None
        # Whoever waits for a hand-off renews its lease from the start.
        is_renewed = not for_next_turn and not (token and self._handoffs.is_awaited(token))
        adapter = adapter_of(request)
        digest = self._digest_of(request, num_tokens, adapter)
        ticket = self._leases.grant(request.request_id, held, digest, lease_s, adapter, is_renewed, token)
        if token and not self._handoffs.seal(request.request_id, self._prefill(request, num_tokens, held, ticket)):
            self._leases.table.release([token])
        return ticket

    def _describe(self, request: Request, num_tokens: int, held: BlockIds) -> RemotePrefill | None:
        """What a hand-off's D is told while the prefill goes on; None while the digest is being computed."""
        if request.request_id not in self._taken and not self._digests.is_ready(request.request_id):
            return None
        adapter, token = adapter_of(request), self._handoffs.token_of(request.request_id)
        ticket = self._leases.ticket(token, 0, self._digest_of(request, num_tokens, adapter), self._lease_s, adapter)
        return self._prefill(request, num_tokens, held, ticket)

    def _digest_of(self, request: Request, num_tokens: int, adapter: str) -> str:
        known_tokens, digest = self._taken.get(request.request_id, (0, ""))
        if known_tokens != num_tokens:
            digest = self._digests.take(request, num_tokens, adapter)
            self._taken[request.request_id] = num_tokens, digest
        return digest

    def _prefill(self, request: Request, num_tokens: int, held: BlockIds, ticket: LeaseTicket) -> RemotePrefill:
        return RemotePrefill(
            remote_engine_id=self._identity.engine_id,
            remote_request_id=request.request_id,
            remote_host=self.endpoint.host,
            remote_port=self.endpoint.port,
            remote_block_ids=held,
            remote_num_tokens=num_tokens,
            ticket=ticket,
        )

    def take_ended(self) -> tuple[str, ...]:
        """Requests whose lease ended since the last step: their blocks go back to vLLM."""
        if self._paused_at is not None:
            self._revoke_for_pause(self._paused_at)
        self.hear()
        if not self._ended:
            return ()
        ended, self._ended = tuple(self._ended), []
        self._returning += len(ended)
        self._handoffs.forget(ended)
        return ended

    def hear(self) -> None:
        """Of what has become of leases. In most steps nothing has, and it costs one call to know that."""
        table = self._leases.table
        changes = table.changes()
        if changes == self._changes:
            return
        self._changes = changes
        for lease in table.take_ended():
            self._ended.append(lease.request_id)
            self._meter.count("leases_ended", 1, lease.why)
            if lease.why == "expired":
                logger.warning("request %s: its D, %s, fell silent; lease expired", lease.request_id, lease.asked_by)
            elif lease.why == "unclaimed":
                # As it should be for answers that carry no params; whose D did not find us, that D says.
                logger.info("request %s: nobody asked for its blocks in time", lease.request_id)
        refused, refusals = table.take_refused()
        for each in refusals:
            request = f"request {each.request_id}" if each.request_id else "a request that we do not remember"
            logger.warning("%s: refused to confirm a pull of %s: %s", request, each.asked_by, each.reason)
        requests, blocks = table.take_served()
        self._meter.count("refused_confirms", refused)
        self._meter.count("served_requests", requests)
        self._meter.count("served_blocks", blocks)
        self._meter.held(*table.held(), table.oldest_s())

    def take_left_askers(self) -> tuple[int, ...]:
        """Clusters of Ds that have gone since the last call. Looked for once a second: to unlink them is no hurry."""
        now = time.monotonic()
        if now < self._next_look:
            return ()
        self._next_look = now + _LEFT_EVERY_S
        return tuple(self._server.take_left_askers())

    def sent(self, count: int) -> None:
        """vLLM has the blocks of so many requests back."""
        self._returning = max(0, self._returning - count)

    @property
    def returning(self) -> int:
        """Requests whose lease has ended and whose blocks vLLM does not have back yet."""
        return self._returning

    @property
    def leases(self) -> LeaseTable:
        return self._leases.table

    def set_paused(self, paused: bool) -> None:
        """vLLM waits with a pause until nobody holds blocks: a paused P gives up whatever nobody pulls right now."""
        self._paused_at = time.monotonic() if paused else None
        if self._paused_at is not None:
            self._revoke_for_pause(self._paused_at)

    def _revoke_for_pause(self, paused_at: float) -> None:
        leases = self.held()[0]
        if leases:
            grace = time.monotonic() - paused_at < _PULL_GRACE_S
            revoked = self._leases.table.revoke("idle" if grace else "all", 0.0, leases)
            if revoked:
                logger.info("paused: gave up the leases of %d requests", revoked)

    def held(self) -> tuple[int, int]:
        """(leases, blocks) held now."""
        return self._leases.table.held()

    def close(self) -> None:
        self._server.close()
        self._digests.close()

    def _held_tokens(self, request: Request, for_next_turn: bool) -> int:
        """How many of its first tokens the request's blocks hold for others; 0: none."""
        if request.status not in _HELD_STATUSES or self._paused_at is not None or not is_token_prompt(request):
            return 0
        # The KV of the last token is computed when it is fed back, never if it ended the request.
        last = request.num_tokens - 1 if for_next_turn else request.num_prompt_tokens
        num_tokens = int(min(request.num_computed_tokens, last))
        if self._forgets:
            # A state cannot be taken back to an earlier token, nor a window to blocks that it has left. A request that
            # stopped by itself may have been fed a token too many by a step that was under way.
            exact = request.num_computed_tokens == num_tokens
            capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED or not for_next_turn
            return num_tokens if exact and capped else 0
        return num_tokens
