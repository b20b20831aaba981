"""LeaseKeeper against a real side channel with a real lease table."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from support.channels import BareServer
from support.frames import RELEASE, RELEASED, RENEW, RENEWED, Frame, pack_tokens, unpack_renewal, unpack_tokens
from support.pd import LOOPBACK, OTHER_TOKEN, TOKEN, WAIT_S, make_ticket, wait_until

from vllm_datadist_connector.protocol.params import LeaseTicket
from vllm_datadist_connector.scheduler import keeper as keeper_module
from vllm_datadist_connector.scheduler.keeper import LeaseKeeper
from vllm_datadist_connector.scheduler.leases import Leases
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import EndedLease

LEASE_S, TOLD_LEASE_S = 4.0, 1.0
"""P grants more than it tells, so that a busy machine cannot lose a lease between two renewals."""


class Producer:
    """A lease table behind a side channel that can be told not to hear."""

    def __init__(self) -> None:
        self._leases = Leases(TOKEN, (16,), 600.0)
        self.table = self._leases.table
        self.seen: list[int] = []
        self.pulling: dict[str, bool] = {}
        self.deaf_to_releases = 0
        self.deaf_to_renewals = False
        self.answers = threading.Lock()
        """Held by a test, it keeps back the next answer."""
        self.ended: list[EndedLease] = []
        self._server = BareServer(self._answer)
        self.endpoint = self._server.endpoint

    def grant(self, request_id: str = "r") -> LeaseTicket:
        ticket = self._leases.grant(request_id, ((1,),), OTHER_TOKEN, LEASE_S)
        return msgspec.structs.replace(ticket, lease_s=TOLD_LEASE_S)

    def count(self, kind: int) -> int:
        return self.seen.count(kind)

    def has_ended(self) -> bool:
        self.ended += self.table.take_ended()
        return bool(self.ended)

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: Frame) -> Frame | None:
        self.seen.append(request.kind)
        if request.kind == RENEW:
            tokens, pulling = unpack_renewal(request.body)
            self.pulling.update(dict.fromkeys(tokens, pulling))
            if self.deaf_to_renewals:
                return None
            with self.answers:
                pass
            return Frame(RENEWED, request.seq, pack_tokens(self.table.renew(tokens, pulling)))
        tokens = unpack_tokens(request.body)
        if self.deaf_to_releases:
            self.deaf_to_releases -= 1
            return None
        self.table.release(tokens)
        return Frame(RELEASED, request.seq, b"")


@pytest.fixture
def producer() -> Iterator[Producer]:
    producer = Producer()
    yield producer
    producer.close()


@pytest.fixture
def keeper() -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(0.2, Trust())
    yield keeper
    keeper.close()


def test_renews_for_longer_than_the_lease_then_releases(producer: Producer, keeper: LeaseKeeper) -> None:
    ticket = producer.grant()
    assert keeper.hold(producer.endpoint, ticket)
    wait_until(lambda: producer.count(RENEW) > 4 * LEASE_S / TOLD_LEASE_S, "renewals beyond the first lease")
    assert not producer.has_ended()
    assert keeper.holds(ticket)
    keeper.release(ticket)
    assert not keeper.holds(ticket)
    wait_until(producer.has_ended, "the release")
    assert producer.ended == [EndedLease("r", "released", "")]


def test_p_hears_of_a_lease_at_once_and_of_its_pull(producer: Producer, keeper: LeaseKeeper) -> None:
    """Not when a quarter of the lease has passed: a request may come late, and a lease not asked for is short."""
    ticket = msgspec.structs.replace(producer.grant(), lease_s=3600.0)
    keeper.hold(producer.endpoint, ticket)
    wait_until(lambda: producer.pulling.get(ticket.token) is False, "the first renewal")
    keeper.pulls(ticket, 3600.0)
    wait_until(lambda: producer.pulling[ticket.token], "the news of a pull")
    keeper.lose(ticket)
    assert not keeper.holds(ticket)
    keeper.pulls(ticket, 1.0)
    keeper.release(ticket)
    assert producer.count(RELEASE) == 0


def test_a_pull_is_told_of_only_so_long(producer: Producer, keeper: LeaseKeeper) -> None:
    """A D that is paused renews, and makes no progress."""
    ticket = producer.grant()
    keeper.hold(producer.endpoint, ticket)
    keeper.pulls(ticket, 0.3)
    wait_until(lambda: producer.pulling.get(ticket.token, False), "the news of a pull")
    wait_until(lambda: not producer.pulling[ticket.token], "a renewal without it")


class TestHolds:
    """Whether a lease is worth a pull: P may have ended it, and what is gone costs a computation, not a failed pull."""

    @pytest.fixture
    def endless_news(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeper_module, "_NEWS_S", 3600.0)

    @pytest.fixture
    def old_news(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeper_module, "_NEWS_S", 0.0)

    @pytest.mark.usefixtures("endless_news")
    def test_what_was_just_granted(self, producer: Producer, keeper: LeaseKeeper) -> None:
        ticket = producer.grant()
        with producer.answers:
            keeper.hold(producer.endpoint, ticket)
            assert keeper.holds(ticket)
        keeper.release(ticket)
        assert keeper.holds(ticket) is False

    def test_an_earlier_turn_once_p_has_said_so(self, producer: Producer, keeper: LeaseKeeper) -> None:
        ticket = producer.grant()
        with producer.answers:
            keeper.hold(producer.endpoint, ticket, is_news=False)
            assert keeper.holds(ticket) is None
        wait_until(lambda: keeper.holds(ticket), "the answer")

    @pytest.mark.usefixtures("old_news")
    def test_any_lease_after_a_while(self, producer: Producer, keeper: LeaseKeeper) -> None:
        """Though steps be further apart than news lasts, the answer is told."""
        ticket = msgspec.structs.replace(producer.grant(), lease_s=3600.0)
        keeper.hold(producer.endpoint, ticket)
        for _ in range(3):
            assert keeper.holds(ticket) is None
            wait_until(lambda: keeper.holds(ticket), "the answer")
        wait_until(lambda: producer.count(RENEW) >= 2, "a question beside the first renewal")

    @pytest.mark.parametrize("is_news", [True, False])
    @pytest.mark.usefixtures("old_news")
    def test_what_p_has_ended(self, producer: Producer, keeper: LeaseKeeper, is_news: bool) -> None:
        gone = make_ticket(lease_s=3600.0)
        keeper.hold(producer.endpoint, gone, is_news)
        assert keeper.holds(gone) is not True
        wait_until(lambda: keeper.holds(gone) is False, "the news that the lease is gone")

    @pytest.mark.parametrize("is_news", [True, False])
    @pytest.mark.parametrize("listens", [True, False], ids=["silent", "dead"])
    @pytest.mark.usefixtures("old_news")
    def test_silence_ends_only_what_was_never_known(self, keeper: LeaseKeeper, listens: bool, is_news: bool) -> None:
        """A busy P may miss renewals of a lease that stands; for its answer D waits only so long."""
        ticket = make_ticket(lease_s=3600.0)
        with socket.create_server((LOOPBACK, 0)) as server:
            endpoint = Endpoint(LOOPBACK, server.getsockname()[1])
            if not listens:
                server.close()
            keeper.hold(endpoint, ticket, is_news)
            wait_until(lambda: keeper.holds(ticket) is is_news, "the end of the waiting")

    @pytest.mark.usefixtures("old_news")
    def test_what_p_has_said_once_outlasts_its_silence(self, producer: Producer, keeper: LeaseKeeper) -> None:
        ticket = msgspec.structs.replace(producer.grant(), lease_s=3600.0)
        keeper.hold(producer.endpoint, ticket, is_news=False)
        wait_until(lambda: keeper.holds(ticket), "the answer")
        producer.deaf_to_renewals = True
        for _ in range(2):
            assert keeper.holds(ticket) is None
            wait_until(lambda: keeper.holds(ticket), "the end of the waiting")


def test_the_last_of_several_users_releases(producer: Producer, keeper: LeaseKeeper) -> None:
    ticket, marker = producer.grant(), producer.grant("marker")
    for _ in range(3):
        assert keeper.hold(producer.endpoint, ticket)
    keeper.release(ticket)
    keeper.release(ticket)
    keeper.hold(producer.endpoint, marker)
    keeper.release(marker)
    wait_until(producer.has_ended, "the marker's release")
    assert producer.ended == [EndedLease("marker", "released", "")]
    keeper.release(ticket)
    producer.ended.clear()
    wait_until(producer.has_ended, "the release by the last user")
    assert producer.ended == [EndedLease("r", "released", "")]


def test_a_lost_answer_is_asked_for_again(
    producer: Producer, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_RELEASE_RETRY_S", 0.05)
    producer.deaf_to_releases = 2
    ticket = producer.grant()
    keeper.hold(producer.endpoint, ticket)
    keeper.release(ticket)
    wait_until(producer.has_ended, "the release")
    assert producer.ended == [EndedLease("r", "released", "")]
    assert producer.count(RELEASE) == 3


def test_gives_up_when_the_lease_has_run_out_anyway(
    producer: Producer, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_RELEASE_RETRY_S", 0.05)
    producer.deaf_to_releases = 10**6
    ticket = producer.grant()
    keeper.hold(producer.endpoint, ticket)
    keeper.release(ticket)
    wait_until(lambda: not keeper._kept, "the end of the retries")
    assert producer.count(RELEASE) >= 2


def test_a_lease_that_is_gone_is_known_and_no_longer_renewed(producer: Producer, keeper: LeaseKeeper) -> None:
    stale = make_ticket(lease_s=1.0)
    keeper.hold(producer.endpoint, stale)
    wait_until(lambda: not keeper.holds(stale), "the news that the lease is gone")
    assert producer.count(RENEW) == 1
    keeper.release(stale)
    assert producer.count(RELEASE) == 0


def test_a_dead_endpoint_does_not_starve_another(producer: Producer, keeper: LeaseKeeper) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        dead = make_ticket(lease_s=1.0)
        keeper.hold(Endpoint(LOOPBACK, silent.getsockname()[1]), dead)
        ticket = producer.grant()
        keeper.hold(producer.endpoint, ticket)
        wait_until(lambda: producer.count(RENEW) >= 5, "renewals beside a dead endpoint")
        assert not producer.has_ended()
        assert keeper.holds(dead) is not False


def test_many_leases_of_one_endpoint_share_messages(producer: Producer, keeper: LeaseKeeper) -> None:
    tickets = [producer.grant(str(i)) for i in range(500)]
    for ticket in tickets:
        keeper.hold(producer.endpoint, ticket)
    for ticket in tickets:
        keeper.release(ticket)
    wait_until(lambda: producer.table.held() == (0, 0), "all releases")
    assert producer.count(RELEASE) < 500


def test_bounded(producer: Producer, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MAX_HELD", 2)
    tickets = [producer.grant(str(i)) for i in range(3)]
    assert [keeper.hold(producer.endpoint, ticket) for ticket in tickets] == [True, True, False]
    assert keeper.hold(producer.endpoint, tickets[0])


def test_survives_a_round_that_fails(
    producer: Producer, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()

    def fail_once(tokens: list[str]) -> list[tuple[str, ...]]:
        del tokens
        failed.set()
        monkeypatch.undo()
        raise ValueError("bug")

    monkeypatch.setattr(keeper_module, "_batches", fail_once)
    keeper.hold(producer.endpoint, producer.grant())
    assert failed.wait(WAIT_S)
    wait_until(lambda: producer.count(RENEW) >= 2, "renewals after the fault")
    assert "a round failed" in caplog.text


def test_closes_without_having_held_anything() -> None:
    keeper = LeaseKeeper(0.2, Trust())
    keeper.close()
    keeper.close()
