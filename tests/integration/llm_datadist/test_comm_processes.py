"""Bilateral links between two and three nodes from a rank table, with the data between every two of them."""

from __future__ import annotations

import json
import random
import threading
import time
from itertools import permutations

import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import Peer, RemoteCache

from vllm_datadist_connector.llm_datadist import LLMRole, LLMStatusCode, RegisterMemStatus

OK, PREPARING, FAILED = RegisterMemStatus.OK, RegisterMemStatus.PREPARING, RegisterMemStatus.FAILED
NOT_YET = LLMStatusCode.LLM_NOT_YET_LINK
INVALID = LLMStatusCode.LLM_PARAM_INVALID
DEADLINE_S = 60


class RankTable:
    """Ranks on a loopback IP of this test's own, each with a port that no client is given."""

    def __init__(self) -> None:
        self._host = ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])

    def text(self, ranks: int) -> str:
        devices = [
            {"device_id": "0", "device_ip": self._host, "rank_id": str(rank), "device_port": str(27000 + rank)}
            for rank in range(ranks)
        ]
        servers = [{"server_id": f"node_{rank}", "device": [device]} for rank, device in enumerate(devices)]
        return json.dumps({"version": "1.0", "status": "completed", "server_count": str(ranks), "server_list": servers})


@pytest.fixture
def table() -> RankTable:
    return RankTable()


def link(peer: Peer, name: str, ranks: dict[int, int], table: str) -> int:
    comm_id: int = peer.datadist.link(name, ranks, table)
    return comm_id


def settled(peer: Peer, comm_id: int) -> RegisterMemStatus:
    """What the preparation came to; the API can only be asked again and again."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        status: RegisterMemStatus = peer.datadist.query_register_mem_status(comm_id)
        if status != PREPARING:
            return status
        threading.Event().wait(0.005)
    raise TimeoutError(f"comm {comm_id} of cluster {peer.cluster_id} is still preparing")


def ranks_of(peers: list[Peer]) -> dict[int, int]:
    return {peer.cluster_id: rank for rank, peer in enumerate(peers)}


def exchange(peers: list[Peer], caches: list[RemoteCache], remote_accessible: bool) -> None:
    """Every one pulls from every other, and pushes to it where the mode has that."""
    pairs = list(permutations(range(len(peers)), 2))
    for row, (mine, other) in enumerate(pairs):
        peers[mine].manager.pull_cache(caches[other].row(row), caches[mine], (row + 1) % 6)
        caches[mine].expect_rows(caches[other], [(row, (row + 1) % 6)])
        if remote_accessible:
            peers[mine].manager.push_cache(caches[other].row(row), caches[mine], (row + 2) % 6)
            caches[other].expect_rows(caches[mine], [((row + 2) % 6, row)])


@pytest.mark.parametrize("remote_accessible", [True, False])
@pytest.mark.parametrize("members", [2, 3])
def test_all_members_link_with_each_other(
    cluster: Cluster, table: RankTable, members: int, remote_accessible: bool
) -> None:
    peers = [cluster.open(10 + i, listen="", enable_remote_cache_accessible=remote_accessible) for i in range(members)]
    caches = [peer.register("data") for peer in peers]
    comms = [link(peer, "all", ranks_of(peers), table.text(members)) for peer in peers]
    assert comms == [1] * members
    assert [settled(peer, 1) for peer in peers] == [OK] * members
    exchange(peers, caches, remote_accessible)
    cluster.check()


def test_nobody_transfers_before_the_last_member_came(cluster: Cluster, table: RankTable) -> None:
    peers = [cluster.open(10 + i, listen="") for i in range(3)]
    caches = [peer.register("data") for peer in peers]
    early, late = peers[:2], peers[2]
    for peer in early:
        link(peer, "all", ranks_of(peers), table.text(3))
    for mine, other in ((0, 1), (1, 0), (0, 2)):
        assert early[mine].datadist.query_register_mem_status(1) == PREPARING
        assert failure(early[mine].manager.pull_cache, caches[other].row(0), caches[mine]) == NOT_YET
        assert failure(early[mine].manager.push_cache, caches[other].row(0), caches[mine]) == NOT_YET
    assert failure(early[0].datadist.switch_role, LLMRole.PROMPT) == LLMStatusCode.LLM_EXIST_LINK
    link(late, "all", ranks_of(peers), table.text(3))
    assert [settled(peer, 1) for peer in peers] == [OK] * 3
    exchange(peers, caches, remote_accessible=True)
    cluster.check()


def test_a_member_that_never_comes(cluster: Cluster, table: RankTable) -> None:
    """The others say FAILED after llm.LinkTotalTime, keep no link, and may try again."""
    peers = [cluster.open(10 + i, listen="", link_total_time=1) for i in range(2)]
    caches = [peer.register("data") for peer in peers]
    everyone = ranks_of(peers) | {99: 2}
    for peer in peers:
        link(peer, "all", everyone, table.text(3))
    assert [settled(peer, 1) for peer in peers] == [FAILED, FAILED]
    for mine, other in ((0, 1), (1, 0)):
        assert failure(peers[mine].manager.pull_cache, caches[other].row(0), caches[mine]) == NOT_YET
        peers[mine].datadist.unlink(1)
        assert failure(peers[mine].datadist.query_register_mem_status, 1) == NOT_YET
    for peer in peers:
        assert link(peer, "both", ranks_of(peers), table.text(2)) == 2
    assert [settled(peer, 2) for peer in peers] == [OK, OK]
    exchange(peers, caches, remote_accessible=True)
    cluster.check()


def test_unlinked_and_linked_again(cluster: Cluster, table: RankTable) -> None:
    peers = [cluster.open(10 + i, listen="") for i in range(2)]
    caches = [peer.register("data") for peer in peers]
    for attempt in range(1, 4):
        for peer in peers:
            assert link(peer, "pair", ranks_of(peers), table.text(2)) == attempt
        assert [settled(peer, attempt) for peer in peers] == [OK, OK]
        exchange(peers, caches, remote_accessible=True)
        for peer in peers:
            peer.datadist.unlink(attempt)
            assert failure(peer.datadist.unlink, attempt) == NOT_YET
        assert failure(peers[0].manager.pull_cache, caches[1].row(0), caches[0]) == NOT_YET
        assert failure(peers[1].manager.pull_cache, caches[0].row(0), caches[1]) == NOT_YET
    peers[0].datadist.switch_role(LLMRole.PROMPT)  # no link is left
    cluster.check()


def test_unlinking_ends_a_preparation(cluster: Cluster, table: RankTable) -> None:
    """At once, not after the two minutes that linking may take."""
    peer = cluster.open(10, listen="")
    began = time.monotonic()
    comm_id = link(peer, "pair", {10: 0, 11: 1}, table.text(2))
    peer.datadist.unlink(comm_id)
    assert time.monotonic() - began < DEADLINE_S
    peer.datadist.switch_role(LLMRole.PROMPT)


@pytest.mark.parametrize(("name", "remote_accessible"), [("pair", False), ("another", True)])
def test_names_and_modes_must_agree(cluster: Cluster, table: RankTable, name: str, remote_accessible: bool) -> None:
    one = cluster.open(10, listen="", link_total_time=1)
    two = cluster.open(11, listen="", link_total_time=1, enable_remote_cache_accessible=remote_accessible)
    link(one, "pair", {10: 0, 11: 1}, table.text(2))
    link(two, name, {10: 0, 11: 1}, table.text(2))
    assert [settled(one, 1), settled(two, 1)] == [FAILED, FAILED]


def test_what_was_registered_after_link_is_not_reachable(cluster: Cluster, table: RankTable) -> None:
    peers = [cluster.open(10 + i, listen="") for i in range(2)]
    caches = [peer.register("data") for peer in peers]
    for peer in peers:
        link(peer, "pair", ranks_of(peers), table.text(2))
    assert [settled(peer, 1) for peer in peers] == [OK, OK]
    hidden = peers[1].register("hidden")
    assert failure(peers[1].register, "open", remote_accessible=True) == INVALID
    assert failure(peers[0].manager.pull_cache, hidden.row(0), caches[0]) == INVALID
    exchange(peers, caches, remote_accessible=True)
    cluster.check()


def test_members_of_the_wrong_kind(cluster: Cluster, table: RankTable) -> None:
    peer = cluster.open(10)
    for members in ({11: 0, 12: 1}, {10: 0}, {10: 1, 11: 0}, {10: 0, 11: 5}, dict.fromkeys(range(8, 13), 0)):
        assert failure(peer.datadist.link, "pair", members, table.text(2)) == INVALID, members
    for name in ("", "x" * 128):
        assert failure(peer.datadist.link, name, {10: 0, 11: 1}, table.text(2)) == INVALID
    assert failure(peer.datadist.unlink, 1) == NOT_YET


def test_a_member_that_dies(processes: Cluster, table: RankTable) -> None:
    """Its peers' transfers end; the survivors go on, and a successor is linked with anew."""
    peers = [processes.open(10 + i, listen="") for i in range(3)]
    caches = [peer.register("data") for peer in peers]
    for peer in peers:
        link(peer, "all", ranks_of(peers), table.text(3))
    assert [settled(peer, 1) for peer in peers] == [OK] * 3
    peers[2].kill()
    lost = {LLMStatusCode.LLM_FAILED, LLMStatusCode.LLM_TIMEOUT}
    assert failure(peers[0].manager.pull_cache, caches[2].row(0), caches[0]) in lost
    exchange(peers[:2], caches[:2], remote_accessible=True)
    for peer in peers[:2]:
        peer.datadist.unlink(1)
    successor = processes.open(12, listen="")
    peers, caches = [*peers[:2], successor], [*caches[:2], successor.register("data")]
    comms = [link(peer, "all again", ranks_of(peers), table.text(3)) for peer in peers]
    assert [settled(peer, comm) for peer, comm in zip(peers, comms, strict=True)] == [OK] * 3
    exchange(peers, caches, remote_accessible=True)
    for peer in peers:
        peer.check()
