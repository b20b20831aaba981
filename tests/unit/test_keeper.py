"""The lease keeper against a real side channel with a real lease table."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator

import pytest
from support.frames import RELEASE, RENEW
from support.leasing_producer import Producer
from support.pd import LOOPBACK, OTHER_TOKEN, TOKEN, WAIT_S, wait_until
from support.wire import OWN

from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.scheduler.leases import Leases
from vllm_datadist_connector.side_channel.client import MAX_LEASES_PER_MESSAGE, LeaseKeeper, open_keeper
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import EndedLease, serve

LEASE_S, TOLD_LEASE_S = 4.0, 1.0
"""P grants more than it tells, so that a busy machine cannot lose a lease between two renewals."""
LONG_S = 3600.0
"""No renewal for its own sake while a test runs."""
PULL_S = 2.0
"""Of a pull that outlasts the way of its news to P."""
REMEMBERED = 1024
"""Leases that have ended."""
ANSWER_S = 0.2
"""Of those whose tests are about silence: a busy machine may need longer for an answer."""


@pytest.fixture
def producer() -> Iterator[Producer]:
    producer = Producer(LEASE_S)
    yield producer
    producer.close()


@pytest.fixture
def keeper() -> Iterator[LeaseKeeper]:
    keeper = open_keeper(Trust(), WAIT_S)
    yield keeper
    keeper.close()


@pytest.fixture
def impatient() -> Iterator[LeaseKeeper]:
    """Whose news is old at once, and who asks for an answer to a release again at once."""
    keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, news_s=0.0, release_retry_s=0.05)
    yield keeper
    keeper.close()


def test_renews_for_longer_than_the_lease_then_releases(producer: Producer, keeper: LeaseKeeper) -> None:
    token = producer.grant()
    assert keeper.hold(producer.endpoint, token, TOLD_LEASE_S)
    wait_until(lambda: producer.count(RENEW) > 4 * LEASE_S / TOLD_LEASE_S, "renewals beyond the first lease")
    assert not producer.has_ended()
    wait_until(lambda: keeper.holds(token) is True, "news that is not old")
    keeper.release(token)
    assert keeper.holds(token) is False
    wait_until(producer.has_ended, "the release")
    assert producer.ended == [EndedLease("r", "released", "")]
    wait_until(lambda: len(keeper) == 0, "the answer")
    assert producer.count(RELEASE) == 1


def test_p_hears_of_a_lease_at_once_and_of_its_pull(producer: Producer, keeper: LeaseKeeper) -> None:
    """Not when a quarter of the lease has passed: a request may come late, and a lease not asked for is short."""
    token = producer.grant()
    keeper.hold(producer.endpoint, token, LONG_S)
    wait_until(lambda: producer.renewals(token) == [False], "the first renewal")
    keeper.pulls(token, LONG_S)
    wait_until(lambda: producer.renewals(token) == [False, True], "the news of a pull")
    keeper.lose(token)
    assert keeper.holds(token) is False
    keeper.pulls(token, 1.0)
    keeper.release(token)
    assert len(keeper) == 0
    assert producer.count(RELEASE) == 0


def test_a_pull_is_told_of_only_so_long(producer: Producer, keeper: LeaseKeeper) -> None:
    """A D that is paused renews, and makes no progress."""
    token = producer.grant()
    keeper.hold(producer.endpoint, token, TOLD_LEASE_S)
    keeper.pulls(token, PULL_S)
    wait_until(lambda: True in producer.renewals(token), "the news of a pull")
    wait_until(lambda: not producer.renewals(token)[-1], "a renewal without it")


class TestHolds:
    """Whether a lease is worth a pull: P may have ended it, and what is gone costs a computation, not a failed pull."""

    def test_what_was_just_granted(self, producer: Producer) -> None:
        keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, news_s=LONG_S)
        token = producer.grant()
        with producer.answers:
            keeper.hold(producer.endpoint, token, TOLD_LEASE_S)
            assert keeper.holds(token)
        keeper.release(token)
        assert keeper.holds(token) is False
        keeper.close()

    def test_an_earlier_turn_once_p_has_said_so(self, producer: Producer, keeper: LeaseKeeper) -> None:
        token = producer.grant()
        with producer.answers:
            keeper.hold(producer.endpoint, token, TOLD_LEASE_S, is_news=False)
            assert keeper.holds(token) is None
        wait_until(lambda: keeper.holds(token) is True, "the answer")

    def test_any_lease_after_a_while(self, producer: Producer, impatient: LeaseKeeper) -> None:
        """Though steps be further apart than news lasts, the answer is told."""
        token = producer.grant()
        impatient.hold(producer.endpoint, token, LONG_S)
        for _ in range(3):
            assert impatient.holds(token) is None
            wait_until(lambda: impatient.holds(token) is True, "the answer")
        wait_until(lambda: producer.count(RENEW) >= 2, "a question beside the first renewal")

    @pytest.mark.parametrize("is_news", [True, False])
    def test_what_p_has_ended(self, producer: Producer, impatient: LeaseKeeper, is_news: bool) -> None:
        impatient.hold(producer.endpoint, TOKEN, LONG_S, is_news)
        assert impatient.holds(TOKEN) is not True
        wait_until(lambda: impatient.holds(TOKEN) is False, "the news that the lease is gone")

    @pytest.mark.parametrize("is_news", [True, False])
    @pytest.mark.parametrize("listens", [True, False], ids=["silent", "dead"])
    def test_silence_ends_only_what_was_never_known(self, impatient: LeaseKeeper, listens: bool, is_news: bool) -> None:
        """A busy P may miss renewals of a lease that stands; for its answer D waits only so long."""
        with socket.create_server((OWN, 0)) as server:
            endpoint = Endpoint(*server.getsockname())
            if not listens:
                server.close()
            impatient.hold(endpoint, TOKEN, LONG_S, is_news)
            wait_until(lambda: impatient.holds(TOKEN) is is_news, "the end of the waiting")

    def test_a_host_that_is_no_address_holds_nothing(self, keeper: LeaseKeeper) -> None:
        keeper.hold(("p\ud800.example", 1), TOKEN, LONG_S, is_news=False)
        wait_until(lambda: keeper.holds(TOKEN) is False, "the end of the waiting")

    def test_what_p_has_said_once_outlasts_its_silence(self, producer: Producer, impatient: LeaseKeeper) -> None:
        token = producer.grant()
        impatient.hold(producer.endpoint, token, LONG_S, is_news=False)
        wait_until(lambda: impatient.holds(token) is True, "the answer")
        producer.deaf_to_renewals = True
        for _ in range(2):
            assert impatient.holds(token) is None
            wait_until(lambda: impatient.holds(token) is True, "the end of the waiting")


def test_the_last_of_several_users_releases(producer: Producer, keeper: LeaseKeeper) -> None:
    token, marker = producer.grant(), producer.grant("marker")
    for _ in range(3):
        assert keeper.hold(producer.endpoint, token, TOLD_LEASE_S)
    keeper.release(token)
    keeper.release(token)
    keeper.hold(producer.endpoint, marker, TOLD_LEASE_S)
    keeper.release(marker)
    wait_until(producer.has_ended, "the marker's release")
    assert producer.ended == [EndedLease("marker", "released", "")]
    keeper.release(token)
    producer.ended.clear()
    wait_until(producer.has_ended, "the release by the last user")
    assert producer.ended == [EndedLease("r", "released", "")]


class TestLatecomers:
    """Requests that share a lease (n > 1), of which the first is done with it before the last has come."""

    def test_before_p_is_told(self, producer: Producer) -> None:
        keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, news_s=LONG_S, release_after_s=LONG_S)
        token, others = producer.grant(), [producer.grant(str(i)) for i in range(2)]
        keeper.hold(producer.endpoint, token, LONG_S)
        keeper.pulls(token, LONG_S)
        wait_until(lambda: True in producer.renewals(token), "the news of a pull")
        keeper.release(token)
        for other in others:
            # Messages to one endpoint arrive in order, but those of one round: what was due has come with the second.
            keeper.hold(producer.endpoint, other, LONG_S)
            wait_until(lambda other=other: bool(producer.renewals(other)), "a later message")  # type: ignore[misc]
        assert producer.count(RELEASE) == 0
        assert keeper.holds(token) is False
        assert keeper.hold(producer.endpoint, token, LONG_S)
        assert keeper.holds(token) is True, "without a question"
        wait_until(lambda: not producer.renewals(token)[-1], "news that nobody pulls")
        keeper.close()

    def test_p_is_told_when_the_last_has_gone(self, producer: Producer, keeper: LeaseKeeper) -> None:
        token = producer.grant()
        for _ in range(3):
            keeper.hold(producer.endpoint, token, LONG_S)
            keeper.release(token)
        wait_until(producer.has_ended, "the release")
        wait_until(lambda: len(keeper) == 0, "the answer")
        assert producer.count(RELEASE) == 1

    @pytest.mark.parametrize("is_lost", [False, True], ids=["released", "lost"])
    def test_p_answers_who_comes_when_it_has_ended(self, producer: Producer, is_lost: bool) -> None:
        """Its pull would be refused."""
        keeper = LeaseKeeper(PROTOCOL_VERSION, WAIT_S, news_s=LONG_S, release_after_s=0.0)
        token = producer.grant()
        keeper.hold(producer.endpoint, token, LONG_S)
        if is_lost:
            producer.table.release([token])
            keeper.lose(token)
        else:
            keeper.release(token)
            wait_until(lambda: len(keeper) == 0, "the release")
        with producer.answers:
            assert keeper.hold(producer.endpoint, token, LONG_S)
            assert keeper.holds(token) is None
        wait_until(lambda: keeper.holds(token) is False, "P's word")
        keeper.close()

    def test_p_answers_who_comes_while_it_is_being_told(self, producer: Producer) -> None:
        """It may have heard, and its answer is lost: or it has not, and the lease stands."""
        keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, news_s=LONG_S, release_retry_s=LONG_S, release_after_s=0.0)
        producer.deaf_to_releases = 1
        token = producer.grant()
        keeper.hold(producer.endpoint, token, LONG_S)
        keeper.release(token)
        wait_until(lambda: producer.count(RELEASE) == 1, "the release")
        with producer.answers:
            keeper.hold(producer.endpoint, token, LONG_S)
            assert keeper.holds(token) is None
        wait_until(lambda: keeper.holds(token) is True, "P's word")
        keeper.close()

    def test_no_more_are_remembered_than_may_come_late(self, producer: Producer) -> None:
        keeper = LeaseKeeper(PROTOCOL_VERSION, WAIT_S, news_s=LONG_S)
        tokens = [producer.grant(str(i)) for i in range(REMEMBERED + 1)]
        for token in tokens:
            keeper.hold(producer.endpoint, token, LONG_S)
            keeper.lose(token)
        with producer.answers:
            for token in (tokens[0], tokens[1]):
                keeper.hold(producer.endpoint, token, LONG_S)
            assert [keeper.holds(token) for token in (tokens[0], tokens[1])] == [True, None]
        keeper.close()


def test_a_lost_answer_is_asked_for_again(producer: Producer, impatient: LeaseKeeper) -> None:
    producer.deaf_to_releases = 2
    token = producer.grant()
    impatient.hold(producer.endpoint, token, LEASE_S)
    impatient.release(token)
    wait_until(producer.has_ended, "the release")
    assert producer.ended == [EndedLease("r", "released", "")]
    assert producer.count(RELEASE) >= 3


def test_gives_up_when_the_lease_has_run_out_anyway(producer: Producer, impatient: LeaseKeeper) -> None:
    producer.deaf_to_releases = 10**6
    token = producer.grant()
    impatient.hold(producer.endpoint, token, 2 * TOLD_LEASE_S)
    impatient.release(token)
    wait_until(lambda: len(impatient) == 0, "the end of the retries")
    wait_until(lambda: producer.count(RELEASE) >= 2, "more than one try")


def test_held_anew_while_its_release_is_not_heard(producer: Producer) -> None:
    """The answer to the release is about another time: the lease is in use, and is released again."""
    keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, release_retry_s=LONG_S)
    producer.deaf_to_releases = 1
    token = producer.grant()
    keeper.hold(producer.endpoint, token, LONG_S)
    keeper.release(token)
    wait_until(lambda: producer.count(RELEASE) == 1, "a release that nobody answers")
    assert keeper.hold(producer.endpoint, token, TOLD_LEASE_S)
    assert keeper.holds(token) is not False
    wait_until(lambda: producer.count(RENEW) >= 3, "renewals")
    keeper.release(token)
    wait_until(lambda: len(keeper) == 0, "the release")
    keeper.close()


def test_a_lease_that_is_gone_is_known_and_no_longer_renewed(producer: Producer, keeper: LeaseKeeper) -> None:
    keeper.hold(producer.endpoint, TOKEN, TOLD_LEASE_S)
    wait_until(lambda: keeper.holds(TOKEN) is False, "the news that the lease is gone")
    keeper.release(TOKEN)
    marker = producer.grant("marker")
    keeper.hold(producer.endpoint, marker, TOLD_LEASE_S)
    # Messages to one endpoint arrive in order: with the marker, all that was ever said of the lease has come.
    wait_until(lambda: bool(producer.renewals(marker)), "the marker")
    before = len(producer.renewals(TOKEN))
    wait_until(lambda: len(producer.renewals(marker)) > 4, "renewals of another lease")
    assert len(producer.renewals(TOKEN)) == before
    assert producer.count(RELEASE) == 0
    keeper.release(marker)


def test_a_dead_endpoint_does_not_starve_another(producer: Producer, keeper: LeaseKeeper) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        keeper.hold(Endpoint(LOOPBACK, silent.getsockname()[1]), TOKEN, TOLD_LEASE_S)
        keeper.hold(producer.endpoint, producer.grant(), TOLD_LEASE_S)
        wait_until(lambda: producer.count(RENEW) >= 5, "renewals beside a dead endpoint")
        assert not producer.has_ended()
        assert keeper.holds(TOKEN) is not False


@pytest.mark.parametrize("count", [500, MAX_LEASES_PER_MESSAGE + 1])
def test_many_leases_of_one_endpoint_share_messages(producer: Producer, keeper: LeaseKeeper, count: int) -> None:
    tokens = [producer.grant(str(i)) for i in range(count)]
    for token in tokens:
        keeper.hold(producer.endpoint, token, LONG_S)
    for token in tokens:
        keeper.release(token)
    wait_until(lambda: producer.table.held() == (0, 0), "all releases")
    assert producer.count(RELEASE) < count / 10


def test_bounded(producer: Producer) -> None:
    keeper = LeaseKeeper(PROTOCOL_VERSION, ANSWER_S, max_leases=2)
    tokens = [producer.grant(str(i)) for i in range(3)]
    assert [keeper.hold(producer.endpoint, token, TOLD_LEASE_S) for token in tokens] == [True, True, False]
    assert keeper.hold(producer.endpoint, tokens[0], TOLD_LEASE_S)
    keeper.close()


def test_needs_no_interpreter(keeper: LeaseKeeper) -> None:
    """While another thread has the GIL for longer than the lease lasts, as a long compilation may."""
    leases = Leases(TOKEN, (16,), 600.0)
    server = serve(Endpoint(LOOPBACK, 0), "engine-p", TOKEN, leases.table, Trust())
    token = leases.grant("r", ((1,),), OTHER_TOKEN, LEASE_S).token
    keeper.hold(Endpoint(LOOPBACK, server.port), token, TOLD_LEASE_S)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(LONG_S)
    try:
        end = time.monotonic() + LEASE_S + TOLD_LEASE_S
        while time.monotonic() < end:
            pass
        assert leases.table.held() == (1, 1)
    finally:
        sys.setswitchinterval(interval)
    server.close()


def test_closes_without_having_held_anything(keeper: LeaseKeeper) -> None:
    keeper.close()
    keeper.close()


def test_a_forked_child_has_none(keeper: LeaseKeeper) -> None:
    """The thread is the parent's: a child that waited for it would wait for ever."""
    child = os.fork()
    if child == 0:
        try:
            keeper.hold((LOOPBACK, 1), TOKEN, LONG_S)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
