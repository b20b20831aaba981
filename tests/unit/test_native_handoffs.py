"""_native's hand-offs over a real side channel; more of them: native/tests/handoff_*.cc."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.channels import wait_for
from support.pd import LOOPBACK, OTHER_TOKEN, TOKEN, WAIT_S, wait_until

from vllm_datadist_connector._native import (
    ChannelClient,
    ChannelServer,
    HandoffNews,
    HandoffTable,
    LeaseTable,
    ProgressReporter,
    Released,
    Renewed,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.client import open_client
from vllm_datadist_connector.side_channel.endpoint import Trust

PATIENCE_S = 30.0
NO_DELIVERY = "none", 0, 0, 0, 0.0, ""
NO_MARK = (0, 0, 0, b"")


class Ends:
    """One instance's table and server, a worker of it, and a D."""

    def __init__(self) -> None:
        self.handoffs = HandoffTable()
        self.leases = LeaseTable(600.0)
        self.server = ChannelServer(LOOPBACK, 0, "engine", TOKEN, PROTOCOL_VERSION, self.leases, handoffs=self.handoffs)
        self.endpoint = (LOOPBACK, self.server.port)
        self.client: ChannelClient = open_client(Trust())
        self.reporter = ProgressReporter(PROTOCOL_VERSION, 1, 2)

    def close(self) -> None:
        self.reporter.close()
        self.client.close()
        self.server.close()

    def ask(self, rank: tuple[int, int] | None, version: int, stamp: int, patience_s: float = PATIENCE_S) -> int:
        return self.client.await_handoff(self.endpoint, TOKEN, rank, version, stamp, patience_s, WAIT_S)

    def news(self, sent: int) -> HandoffNews:
        response = wait_for(self.client, sent).response
        assert isinstance(response, HandoffNews)
        return response


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_d_follows_a_prefill(ends: Ends) -> None:
    early = ends.ask(None, 0, 0)
    assert ends.handoffs.promise(TOKEN, "request-\ud800")
    promised = ends.news(early)
    assert promised == HandoffNews("promised", 0, 0, promised.stamp, None, *NO_MARK, "", *NO_DELIVERY)
    assert ends.handoffs.is_awaited(TOKEN)
    sent = ends.ask(None, promised.version, promised.stamp)
    ends.handoffs.begin(TOKEN, 3, b"blocks")
    begun = ends.news(sent)
    assert (begun.state, begun.epoch, begun.version, begun.blob) == ("begun", 3, 1, b"blocks")
    ends.reporter.begin_step(ends.endpoint, ends.handoffs.key, [(TOKEN, 3, 16, 64)])
    mark = ends.news(ends.ask((1, 2), begun.version, begun.stamp))
    assert (mark.blob, mark.mark_epoch, mark.base, mark.next, mark.layers) == (None, 3, 16, 64, b"")
    ends.reporter.layer(9)
    mark = ends.news(ends.ask((1, 2), mark.version, mark.stamp))
    assert (mark.base, mark.next, mark.layers) == (16, 64, b"\x00\x02")
    ends.reporter.end_step()
    mark = ends.news(ends.ask((1, 2), mark.version, mark.stamp))
    assert (mark.base, mark.next, mark.layers) == (64, 64, b"")
    wait_until(lambda: len(ends.reporter) == 0, "the worker has been heard")
    assert ends.leases.grant("r", TOKEN, OTHER_TOKEN, 3, 60.0, 60.0, TOKEN) == (TOKEN, 1)
    assert ends.handoffs.seal(TOKEN, 3, b"all blocks")
    sealed = ends.news(ends.ask(None, begun.version, begun.stamp))
    assert sealed == HandoffNews("sealed", 3, 2, sealed.stamp, b"all blocks", *NO_MARK, "", *NO_DELIVERY)
    assert len(ends.handoffs) == 1
    ends.handoffs.forget([TOKEN, OTHER_TOKEN])
    assert len(ends.handoffs) == 0
    gone = ends.news(ends.ask(None, sealed.version, sealed.stamp))
    assert (gone.state, gone.blob, gone.reason) == ("ended", b"", "its lease has ended")


def test_a_token_of_nobody_is_unknown_when_patience_is_over(ends: Ends) -> None:
    assert ends.news(ends.ask((0, 0), 0, 0, 0.0)) == HandoffNews("unknown", 0, 0, 0, None, *NO_MARK, "", *NO_DELIVERY)


def test_ended_says_why(ends: Ends) -> None:
    assert ends.handoffs.promise(TOKEN, "r")
    assert not ends.handoffs.promise(TOKEN, "r")
    ends.handoffs.end(TOKEN, "aborted\nby \ud800")
    assert not ends.handoffs.seal(TOKEN, 0, b"")
    assert not ends.handoffs.promise(TOKEN, "r"), "nobody can be told of two"
    news = ends.news(ends.ask(None, 0, 0))
    assert news.state == "ended"
    assert news.reason.startswith("aborted by ")


def test_renewed_and_released_before_there_is_a_lease(ends: Ends) -> None:
    ends.handoffs.promise(TOKEN, "r")
    assert not ends.handoffs.is_awaited(TOKEN)
    sent = ends.client.renew(ends.endpoint, [TOKEN, OTHER_TOKEN], WAIT_S)
    assert wait_for(ends.client, sent).response == Renewed((OTHER_TOKEN,))
    assert ends.handoffs.is_awaited(TOKEN)
    assert not ends.handoffs.is_withdrawn(TOKEN)
    sent = ends.client.release(ends.endpoint, [TOKEN], WAIT_S)
    assert wait_for(ends.client, sent).response == Released()
    assert ends.handoffs.is_withdrawn(TOKEN)
    assert not ends.handoffs.seal(TOKEN, 0, b"")


def test_arguments_out_of_range() -> None:
    handoffs = HandoffTable(1)
    assert len(handoffs.key) == 32
    assert handoffs.key != HandoffTable().key
    assert handoffs.promise(TOKEN, "r")
    assert not handoffs.promise(OTHER_TOKEN, "r"), "too many"
    for call in (handoffs.begin, handoffs.seal):
        with pytest.raises(ValueError, match="blob of 1048576 bytes"):
            call(TOKEN, 0, bytes(1 << 20))
        with pytest.raises(ValueError, match="32 hex digits"):
            call("no token", 0, b"")
    with pytest.raises(ValueError, match="rank"):
        ProgressReporter(PROTOCOL_VERSION, 4096, 0)
    leases = LeaseTable(600.0)
    leases.grant("r", TOKEN, OTHER_TOKEN, 3, 60.0, 60.0, TOKEN)
    with pytest.raises(ValueError, match="held"):
        leases.grant("r", TOKEN, OTHER_TOKEN, 3, 60.0, 60.0, TOKEN)


def test_a_step_that_goes_backwards_is_refused(ends: Ends) -> None:
    with pytest.raises(ValueError, match="from 5 back to 4"):
        ends.reporter.begin_step(ends.endpoint, ends.handoffs.key, [(TOKEN, 1, 5, 4)])
    assert len(ends.reporter) == 0


def test_a_forked_child_has_no_reporter(ends: Ends) -> None:
    child = os.fork()
    if child == 0:
        try:
            ends.reporter.end_step()
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
