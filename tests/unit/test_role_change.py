"""What a rank does when its instance changes its role: engine and links are real, the side channel is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from support.endpoints import LOOPBACK, MIX, check
from support.kv_ranks import MIX_ROLE, Place, RankEngine, make_kv
from support.pd import BLOCK_SIZE, TOKEN, WAIT_S, wait_until

from vllm_datadist_connector import _native
from vllm_datadist_connector.metadata import Home
from vllm_datadist_connector.side_channel.client import ChannelAnswer, Reported, Watched
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.links import Links
from vllm_datadist_connector.worker.roles import RoleChange

HOME = Home(Endpoint(LOOPBACK, 5), TOKEN)
OURS, PEER = 1, 2
TIMED_OUT = (None, "did not answer in time", True)


class Declared(NamedTuple):
    endpoint: Endpoint
    key: str
    rank: tuple[int, int]
    attempt: int
    reason: str
    timeout_s: float


class Channel:
    def __init__(self) -> None:
        self.declared: list[Declared] = []

    def declare(self, *said: Any) -> int:
        self.declared.append(Declared(*said))
        return len(self.declared)


class Rank:
    def __init__(self) -> None:
        self.engine = RankEngine(OURS, MIX_ROLE, Place(), Place().part_of(make_kv(1, BLOCK_SIZE)), "auto")
        self.datadist = self.engine.datadist
        geometry = self.engine.geometry()
        self.at = Endpoint(LOOPBACK, geometry.port)
        self.queue = _native.TransferQueue(self.datadist)
        self.links = Links(self.at, self.queue, lambda _: None, WAIT_S, self.datadist.capabilities)
        self.channel: Any = Channel()
        self.under_way = ""
        self.left = 0
        self.change = RoleChange(
            self.datadist, geometry, self.channel, self.links, lambda: self.under_way, self._leave_all, WAIT_S
        )

    def _leave_all(self) -> None:
        self.left += 1

    def begin(self, role: str, attempt: int = 1, limit_s: float = WAIT_S) -> None:
        self.change.begin(Watched(1, "", 0, b"", role, attempt, limit_s), HOME, time.monotonic())

    def round(self) -> None:
        for completion in self.queue.poll():
            self.links.on_completion(completion)
        self.links.try_again(time.monotonic())
        self.change.round(time.monotonic())

    def declared(self) -> Declared:
        def is_told() -> bool:
            self.round()
            return bool(self.channel.declared)

        wait_until(is_told, "a word")
        return self.channel.declared[-1]  # type: ignore[no-any-return]

    def close(self) -> None:
        self.queue.close()
        self.datadist.finalize()


@pytest.fixture
def rank() -> Iterator[Rank]:
    with closing(Rank()) as rank:
        yield rank


@pytest.fixture
def peer(rank: Rank) -> Iterator[_native.LlmDataDist]:
    """It has linked with the rank, which did nothing."""
    peer = _native.LlmDataDist(PEER, MIX)
    check(peer.initialize({"llm.DeviceId": "0", "llm.ListenIpInfo": f"{LOOPBACK}:0"}))
    link(peer, rank)
    yield peer
    peer.finalize()


def link(peer: _native.LlmDataDist, rank: Rank) -> None:
    status, _ = peer.link_clusters([_native.ClusterInfo(OURS, [tuple(rank.at)])], 5000)
    check(status)
    wait_until(lambda: rank.datadist.linked_clusters() == (0, [PEER]), "the link")


def test_links_that_others_have_made_go_as_well(rank: Rank, peer: _native.LlmDataDist) -> None:
    rank.begin("decode", attempt=7)
    assert rank.declared() == Declared(HOME.endpoint, HOME.key, (0, 0), 7, "", WAIT_S)
    assert rank.left == 1
    assert rank.datadist.linked_clusters() == (0, [])
    assert rank.datadist.listen_port() == (0, rank.at.port), "peers know where it listens"
    wait_until(lambda: not is_alive(peer), "the end of the peer's half")


def is_alive(peer: _native.LlmDataDist) -> bool:
    _, report = peer.query_link(OURS)
    return report is not None and report.alive


@pytest.mark.usefixtures("peer")
def test_nothing_is_cut_off(rank: Rank) -> None:
    rank.under_way = "1 pulls"
    rank.begin("decode")
    rank.round()
    assert (rank.left, rank.datadist.linked_clusters()) == (0, (0, [PEER]))
    assert rank.change.next_wake(5.0) == pytest.approx(5.01)
    rank.under_way = ""
    assert rank.declared().reason == ""
    assert rank.change.next_wake(5.0) is None
    assert rank.left == 1


def test_what_does_not_end_in_time_fails_it(rank: Rank, peer: _native.LlmDataDist) -> None:
    rank.under_way = "1 pulls and 2 pushes"
    rank.begin("decode", limit_s=0.0)
    assert rank.declared().reason == "there are still 1 pulls and 2 pushes"
    assert is_alive(peer)
    assert rank.left == 0


@pytest.mark.usefixtures("peer")
def test_a_link_that_does_not_go_fails_it(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank.links, "unlink_cluster", lambda _: None)
    rank.begin("decode", limit_s=0.0)
    assert rank.declared().reason == "there are still links that do not go"


@pytest.mark.usefixtures("peer")
def test_a_link_that_comes_meanwhile_goes(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and SetRole."""
    looks = iter([(0, []), (0, [])])
    real = rank.datadist.linked_clusters

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(rank.datadist, name)

        def linked_clusters(self) -> Any:
            return next(looks, None) or real()

    monkeypatch.setattr(rank.change, "_datadist", Late())
    rank.begin("prefill")
    assert rank.declared().reason == ""
    assert real() == (0, [])


def test_a_provider_that_refuses_the_role_fails_it(rank: Rank) -> None:
    rank.datadist.finalize()
    rank.begin("decode")
    assert rank.declared().reason.startswith("SetRole: LLM_FAILED: ")


def test_a_word_that_was_not_heard_is_said_again(rank: Rank) -> None:
    rank.begin("decode")
    rank.declared()
    assert rank.change.on_answer(ChannelAnswer(1, *TIMED_OUT))
    assert [each.attempt for each in rank.channel.declared] == [1, 1]
    assert rank.change.on_answer(ChannelAnswer(2, Reported(), "", timed_out=False))
    assert not rank.change.on_answer(ChannelAnswer(3, Reported(), "", timed_out=False))
    assert len(rank.channel.declared) == 2


def test_the_last_order_counts(rank: Rank) -> None:
    rank.under_way = "1 pulls"
    rank.begin("decode", attempt=1)
    rank.round()
    rank.begin("prefill", attempt=2)
    rank.under_way = ""
    assert rank.declared().attempt == 2
