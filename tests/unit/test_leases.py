"""Leases and their native table against a model, and what a confirmation may prove."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from support.pd import OTHER_TOKEN, TOKEN

from vllm_datadist_connector.labels import LeaseEnd
from vllm_datadist_connector.protocol.digest import blocks_digest
from vllm_datadist_connector.protocol.params import BlockIds, LeaseTicket
from vllm_datadist_connector.scheduler.leases import Leases
from vllm_datadist_connector.side_channel.server import EndedLease, ManualClock

LEASE_S, LONG_LEASE_S, LIMIT_S = 10.0, 50.0, 35.0
"""A lease may outlast the limit of renewals: one for a conversation's next turn is never renewed."""
CLAIM_S = 4.0
BLOCK_SIZES = (16,)
BLOCKS: BlockIds = ((4, 2, 9),)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def leases(clock: ManualClock) -> Leases:
    return Leases(TOKEN, BLOCK_SIZES, LIMIT_S, CLAIM_S, clock)


def confirm(leases: Leases, ticket: LeaseTicket, blocks: BlockIds = BLOCKS, **changes: object) -> str:
    values = {"token": ticket.token, "generation": ticket.generation, "prompt_digest": ticket.prompt_digest}
    return leases.table.confirm(**(values | changes), blocks_digest=blocks_digest(blocks))  # type: ignore[arg-type]


def test_ticket_tells_what_d_needs(leases: Leases) -> None:
    first = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    second = leases.grant("b", BLOCKS, OTHER_TOKEN, LONG_LEASE_S)
    assert (first.incarnation, first.prompt_digest, first.block_sizes) == (TOKEN, OTHER_TOKEN, BLOCK_SIZES)
    assert (first.lease_s, second.lease_s) == (LEASE_S, LONG_LEASE_S)
    assert first.token != second.token
    assert first.generation != second.generation
    assert confirm(leases, first) == ""


@pytest.mark.parametrize(
    "changes", [{"token": TOKEN}, {"generation": 2}, {"generation": 0}, {"prompt_digest": "0" * 32}]
)
def test_confirmation_of_something_else_is_refused(leases: Leases, changes: dict[str, object]) -> None:
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    assert confirm(leases, ticket, **changes) != ""
    assert confirm(leases, ticket) == ""
    assert leases.table.take_refused()[0] == 1
    assert leases.table.take_refused() == (0, [])


@pytest.mark.parametrize("blocks", [((4, 2),), ((2, 4, 9),), ((4, 2, 9, 9),), ((4, 2, 8),), ((4, 2, 9), ()), ((),), ()])
def test_only_exactly_the_granted_blocks_are_confirmed(leases: Leases, blocks: BlockIds) -> None:
    """Params pass through clients: other blocks, or the same in another order, are another prompt's KV to D."""
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    assert "blocks" in confirm(leases, ticket, blocks)


def test_expires_at_its_time_and_not_before(leases: Leases, clock: ManualClock) -> None:
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    assert leases.table.renew([ticket.token]) == ()
    clock.now += LEASE_S - 0.001
    assert confirm(leases, ticket) == ""
    assert leases.table.take_ended() == []
    clock.now += 0.001
    assert "ended" in confirm(leases, ticket)
    assert leases.table.take_ended() == [EndedLease("a", "expired", "")]


def test_ends_have_the_names_of_the_metric(leases: Leases, clock: ManualClock) -> None:
    """The metric has no series for another."""
    released, revoked, expired, _ = (leases.grant(name, BLOCKS, OTHER_TOKEN, LEASE_S) for name in "abcd")
    leases.table.release([released.token])
    assert leases.table.revoke_idle(revoked.token)
    leases.table.renew([expired.token])
    clock.now += LEASE_S
    assert {lease.why for lease in leases.table.take_ended()} == {end.value for end in LeaseEnd}


def test_what_was_served_counts_once_however_many_ranks_confirm(leases: Leases) -> None:
    first, second, left = (leases.grant(name, BLOCKS, OTHER_TOKEN, LEASE_S) for name in "abc")
    assert confirm(leases, left, prompt_digest="0" * 32) != ""
    for ticket in (first, first, second):
        assert confirm(leases, ticket) == ""
    assert leases.table.take_served() == (2, 6)
    assert confirm(leases, first) == ""
    leases.table.release([first.token, second.token, left.token])
    assert leases.table.take_served() == (0, 0)


def test_the_oldest_is_the_first_that_is_still_held(leases: Leases, clock: ManualClock) -> None:
    assert leases.table.oldest_s() == 0.0
    tickets = []
    for name in "abc":
        tickets.append(leases.grant(name, BLOCKS, OTHER_TOKEN, LEASE_S))
        clock.now += 1.0
    for gone, oldest_s in (([], 3.0), ([tickets[1]], 3.0), ([tickets[0]], 1.0), ([tickets[2]], 0.0)):
        leases.table.release([ticket.token for ticket in gone])
        assert leases.table.oldest_s() == oldest_s


def test_a_lease_that_ran_out_cannot_be_renewed(leases: Leases, clock: ManualClock) -> None:
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    clock.now += CLAIM_S
    assert leases.table.renew([ticket.token]) == (ticket.token,)
    assert leases.table.take_ended() == [EndedLease("a", "unclaimed", "")]


def test_one_that_nobody_has_asked_for_is_short(leases: Leases, clock: ManualClock) -> None:
    """Streams, batches, lists of prompts: P cannot know that their params reach nobody."""
    claimed, left = (leases.grant(name, BLOCKS, OTHER_TOKEN, LEASE_S) for name in ("claimed", "left"))
    next_turn = leases.grant("next turn", BLOCKS, OTHER_TOKEN, LEASE_S, is_renewed=False)
    clock.now += CLAIM_S - 0.001
    assert leases.table.renew([claimed.token]) == ()
    clock.now += 0.001
    assert leases.table.take_ended() == [EndedLease("left", "unclaimed", "")]
    assert "ended" in confirm(leases, left)
    clock.now += LEASE_S - CLAIM_S - 0.001
    assert leases.table.take_ended() == []
    assert confirm(leases, claimed) == confirm(leases, next_turn) == ""


def test_revoked_are_not_confirmed(leases: Leases, clock: ManualClock) -> None:
    tickets = [leases.grant(str(i), BLOCKS, OTHER_TOKEN, LEASE_S) for i in range(5)]
    pulled, waited_for = tickets[1], tickets[2]
    leases.table.renew([waited_for.token])
    leases.table.renew([pulled.token], pulling=True)
    clock.now += 1.0
    assert leases.table.revoke("unclaimed", 1.001, 5) == 0, "none is so old"
    assert leases.table.revoke("unclaimed", 1.0, 2) == 2
    assert [lease.request_id for lease in leases.table.take_ended()] == ["0", "3"], "the oldest first"
    assert not leases.table.revoke_idle(pulled.token)
    assert not leases.table.revoke_idle(TOKEN)
    assert leases.table.revoke_idle(tickets[4].token)
    assert leases.table.revoke("idle", 0.0, 5) == 1
    assert [confirm(leases, ticket) == "" for ticket in tickets] == [False, True, False, False, False]
    leases.table.renew([pulled.token], pulling=True)
    assert leases.table.revoke("all", 0.0, 5) == 1
    assert "ended" in confirm(leases, pulled)
    ended = [EndedLease(name, "revoked", "") for name in ("4", "2", "1")]
    assert leases.table.take_ended() == ended
    assert leases.table.held() == (0, 0)


def test_renewals_end_at_the_limit(leases: Leases, clock: ManualClock) -> None:
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    granted = clock.now
    while leases.table.renew([ticket.token]) == ():
        clock.now += LEASE_S / 4
        assert clock.now <= granted + LIMIT_S
    assert clock.now == granted + LIMIT_S


def test_one_that_is_renewed_does_not_keep_another_alive(leases: Leases, clock: ManualClock) -> None:
    renewed = leases.grant("renewed", BLOCKS, OTHER_TOKEN, LEASE_S)
    left = leases.grant("left", BLOCKS, OTHER_TOKEN, LEASE_S)
    assert leases.table.renew([left.token]) == ()
    clock.now += CLAIM_S / 2
    assert leases.table.renew([renewed.token, TOKEN]) == (TOKEN,)
    clock.now += LEASE_S - CLAIM_S / 2
    assert leases.table.take_ended() == [EndedLease("left", "expired", "")]
    assert "ended" in confirm(leases, left)
    assert confirm(leases, renewed) == ""
    assert leases.table.held() == (1, 3)


def test_each_lease_lasts_its_own_time(leases: Leases, clock: ManualClock) -> None:
    long, short = (leases.grant(str(s), BLOCKS, OTHER_TOKEN, s) for s in (LONG_LEASE_S, LEASE_S))
    leases.table.renew([long.token, short.token])
    clock.now += LEASE_S
    assert leases.table.take_ended() == [EndedLease(str(LEASE_S), "expired", "")]
    assert "ended" in confirm(leases, short)
    clock.now += LONG_LEASE_S - LEASE_S - 0.001
    assert confirm(leases, long) == ""
    clock.now += 0.001
    assert leases.table.take_ended() == [EndedLease(str(LONG_LEASE_S), "expired", "")]


def test_a_renewal_lasts_as_long_as_the_lease_and_shortens_none(leases: Leases, clock: ManualClock) -> None:
    short = leases.grant("short", BLOCKS, OTHER_TOKEN, LEASE_S)
    long = leases.grant("long", BLOCKS, OTHER_TOKEN, LONG_LEASE_S, is_renewed=False)
    assert leases.table.renew([short.token]) == ()
    clock.now += LEASE_S / 2
    assert leases.table.renew([long.token, short.token]) == ()
    clock.now += LEASE_S
    assert leases.table.take_ended() == [EndedLease("short", "expired", "")]
    # Renewed or not, the long lease ends at its limit, which is its own duration here.
    clock.now += LONG_LEASE_S - 1.5 * LEASE_S - 0.001
    assert confirm(leases, long) == ""
    clock.now += 0.001
    assert leases.table.renew([long.token]) == (long.token,)


def test_null_blocks_are_confirmed_but_not_counted(leases: Leases) -> None:
    blocks = ((0, 0, 7, 8), (3,))
    ticket = leases.grant("a", blocks, OTHER_TOKEN, LEASE_S)
    assert confirm(leases, ticket, blocks) == ""
    for others in (((7, 8), (3,)), ((0, 7, 0, 8), (3,)), ((3,), (0, 0, 7, 8))):
        assert "blocks" in confirm(leases, ticket, others)
    assert leases.table.held() == (1, 3)


def test_released_twice_ends_once(leases: Leases) -> None:
    ticket = leases.grant("a", BLOCKS, OTHER_TOKEN, LEASE_S)
    leases.table.release([ticket.token, ticket.token, TOKEN])
    leases.table.release([ticket.token])
    assert leases.table.take_ended() == [EndedLease("a", "released", "")]
    assert leases.table.take_ended() == []
    assert leases.table.held() == (0, 0)


@dataclass
class Expected:
    request_id: str
    ticket: LeaseTicket
    expires: float
    limit: float
    claimed: bool = False
    pulling: bool = False


class LeaseModel(RuleBasedStateMachine):
    """Every lease is held exactly as long as its model says, and ends exactly once."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.leases = Leases(TOKEN, BLOCK_SIZES, LIMIT_S, CLAIM_S, self.clock)
        self.held: dict[str, Expected] = {}
        self.to_end: list[EndedLease] = []
        self.granted = 0

    @rule(target=tickets, lease_s=st.sampled_from([1.0, LEASE_S, LONG_LEASE_S]))
    def grant(self, lease_s: float) -> LeaseTicket:
        self.granted += 1
        request_id = str(self.granted)
        ticket = self.leases.grant(request_id, BLOCKS, OTHER_TOKEN, lease_s)
        now = self.clock.now
        limit = round(now + max(LIMIT_S, lease_s), 3)
        self.held[ticket.token] = Expected(request_id, ticket, round(now + min(lease_s, CLAIM_S), 3), limit)
        return ticket

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.5, 5.0, 9.999, 10.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now = round(self.clock.now + seconds, 3)
        for token, lease in list(self.held.items()):
            if lease.expires <= self.clock.now:
                del self.held[token]
                self.to_end.append(EndedLease(lease.request_id, "expired" if lease.claimed else "unclaimed", ""))

    @rule(tickets=st.lists(tickets, max_size=3), pulling=st.booleans())
    def renew(self, tickets: list[LeaseTicket], pulling: bool) -> None:
        gone = self.leases.table.renew([ticket.token for ticket in tickets], pulling)
        assert gone == tuple(ticket.token for ticket in tickets if ticket.token not in self.held)
        for ticket in tickets:
            lease = self.held.get(ticket.token)
            if lease is not None:
                lease.expires = min(round(self.clock.now + lease.ticket.lease_s, 3), lease.limit)
                lease.claimed, lease.pulling = True, pulling

    @rule(which=st.sampled_from(["unclaimed", "idle", "all"]), most=st.integers(0, 3))
    def revoke(self, which: Literal["unclaimed", "idle", "all"], most: int) -> None:
        left_alone = {"unclaimed": lambda x: x.claimed, "idle": lambda x: x.pulling, "all": lambda _: False}[which]
        chosen = [token for token, lease in self.held.items() if not left_alone(lease)][:most]
        assert self.leases.table.revoke(which, 0.0, most) == len(chosen)
        for token in chosen:
            self.to_end.append(EndedLease(self.held.pop(token).request_id, "revoked", ""))

    @rule(ticket=tickets)
    def release(self, ticket: LeaseTicket) -> None:
        self.leases.table.release([ticket.token])
        lease = self.held.pop(ticket.token, None)
        if lease is not None:
            self.to_end.append(EndedLease(lease.request_id, "released", ""))

    @rule(ticket=tickets)
    def confirm(self, ticket: LeaseTicket) -> None:
        assert (confirm(self.leases, ticket) == "") == (ticket.token in self.held)

    @rule()
    def take_ended(self) -> None:
        assert sorted(self.leases.table.take_ended()) == sorted(self.to_end)
        self.to_end = []

    @invariant()
    def held_counts(self) -> None:
        # What ran out leaves the table with the next call that looks; held() is only a measurement.
        leases, blocks = self.leases.table.held()
        assert leases >= len(self.held)
        assert blocks == 3 * leases


TestLeaseModel = LeaseModel.TestCase


def test_threads_that_race_end_each_lease_once() -> None:
    leases = Leases(TOKEN, BLOCK_SIZES, LIMIT_S)
    tickets = [leases.grant(str(i), BLOCKS, OTHER_TOKEN, LEASE_S) for i in range(400)]
    start = threading.Barrier(5)
    ended: list[EndedLease] = []

    def release_all() -> None:
        start.wait()
        for ticket in tickets:
            leases.table.renew([ticket.token])
            leases.table.release([ticket.token])
            assert confirm(leases, ticket) != ""

    threads = [threading.Thread(target=release_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        ended += leases.table.take_ended()
    for thread in threads:
        thread.join()
    ended += leases.table.take_ended()
    assert Counter(lease.request_id for lease in ended) == Counter(str(i) for i in range(400))
    assert leases.table.take_refused()[0] == 1600
    assert leases.table.held() == (0, 0)
