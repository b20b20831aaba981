"""link_clusters, unlink_clusters and switch_role between nodes: codes per cluster, data before and after."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.datadist_channels import ProcessChannel
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import LOOPBACK, Peer, RemoteCache
from support.datadist_values import cluster_info
from support.stopping import stopped

from vllm_datadist_connector.llm_datadist import LLMClusterInfo, LLMRole, LLMStatusCode

OK = LLMStatusCode.LLM_SUCCESS
TIMEOUT_MS = 20_000
LISTEN = "llm.listenIpInfo"


@pytest.fixture
def free_address() -> str:
    """A loopback IP of this test's own, and a port that no client is given: nobody else listens there."""
    return ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))]) + ":26000"


@pytest.fixture
def refusing() -> Iterator[LLMClusterInfo]:
    """A cluster whose port is taken and not listened to."""
    with socket.socket() as bound:
        bound.bind((LOOPBACK, 0))
        yield cluster_info(50, [(LOOPBACK, bound.getsockname()[1])], [(LOOPBACK, 0)])


@pytest.fixture
def silent() -> Iterator[LLMClusterInfo]:
    """A cluster that accepts and never answers."""
    with socket.create_server((LOOPBACK, 0)) as listening:
        yield cluster_info(51, [(LOOPBACK, listening.getsockname()[1])], [(LOOPBACK, 0)])


class Data:
    """A cache of each peer, and the check that data comes through between two of them."""

    def __init__(self, *peers: Peer) -> None:
        self._caches = {peer.cluster_id: peer.register("data") for peer in peers}
        self._next_row = 0

    def of(self, peer: Peer) -> RemoteCache:
        return self._caches[peer.cluster_id]

    def moves(self, initiator: Peer, other: Peer) -> None:
        """Pulls one row and pushes another."""
        mine, theirs = self.of(initiator), self.of(other)
        pulled, pushed = self._next_row % 6, (self._next_row + 1) % 6
        self._next_row += 1
        initiator.manager.pull_cache(theirs.row(pulled), mine, pushed)
        mine.expect_rows(theirs, [(pulled, pushed)])
        initiator.manager.push_cache(theirs.row(pushed), mine, pulled)
        theirs.expect_rows(mine, [(pulled, pushed)])
        for peer in (initiator, other):
            peer.check()

    def is_cut(self, initiator: Peer, other: Peer) -> bool:
        status = failure(initiator.manager.pull_cache, self.of(other).row(0), self.of(initiator), 0)
        return status == LLMStatusCode.LLM_NOT_YET_LINK


def test_links_carry_data_both_ways_until_unlinked(cluster: Cluster) -> None:
    server, client = cluster.open(1), cluster.open(2, listen="")
    data = Data(server, client)
    assert data.is_cut(client, server)
    client.link(server)
    data.moves(client, server)
    data.moves(server, client)
    assert client.datadist.unlink_clusters([server.info()], TIMEOUT_MS) == (OK, [OK])
    assert data.is_cut(client, server)
    assert data.is_cut(server, client)
    assert client.datadist.unlink_clusters([server.info()], TIMEOUT_MS) == (OK, [OK])  # again is nothing
    client.link(server)
    data.moves(server, client)


def test_both_ends_have_the_link_once_one_of_them_says_so(cluster: Cluster) -> None:
    """The server uses it at once, on the client's word; again and again, because it is a matter of microseconds."""
    server, client = cluster.open(1), cluster.open(2, listen="")
    data = Data(server, client)
    mine, theirs = data.of(server), data.of(client)
    for _ in range(50):
        client.link(server)
        server.manager.pull_cache(theirs.row(3), mine, 3)
        assert client.datadist.unlink_clusters([server.info()], TIMEOUT_MS) == (OK, [OK])
        assert data.is_cut(server, client)
    mine.expect_rows(theirs, [(3, 3)])
    cluster.check()


def test_a_link_that_exists(cluster: Cluster) -> None:
    server, client = cluster.open(1), cluster.open(2)
    data = Data(server, client)
    client.link(server)
    already = LLMStatusCode.LLM_ALREADY_LINK
    assert client.datadist.link_clusters([server.info()], TIMEOUT_MS) == (already, [already])
    assert server.datadist.link_clusters([client.info()], TIMEOUT_MS) == (already, [already])
    data.moves(client, server)


def test_forced_unlinking_is_local(cluster: Cluster) -> None:
    server, client = cluster.open(1), cluster.open(2, listen="")
    data = Data(server, client)
    client.link(server)
    without_address = cluster_info(1, [], [])
    assert client.datadist.unlink_clusters([without_address], TIMEOUT_MS, True) == (OK, [OK])
    assert data.is_cut(client, server)
    left_behind = data.of(client).row(0)
    # Lost, and gone as soon as the server has noticed: it had not asked for the link.
    gone = (LLMStatusCode.LLM_FAILED, LLMStatusCode.LLM_NOT_YET_LINK)
    assert failure(server.manager.pull_cache, left_behind, data.of(server), 0) in gone
    client.link(server)
    data.moves(server, client)


def test_unlinking_without_force_needs_an_address(cluster: Cluster) -> None:
    server, client = cluster.open(1), cluster.open(2, listen="")
    data = Data(server, client)
    client.link(server)
    invalid = LLMStatusCode.LLM_PARAM_INVALID
    assert client.datadist.unlink_clusters([cluster_info(1, [], [])], TIMEOUT_MS) == (invalid, [invalid])
    data.moves(client, server)


def test_one_status_per_cluster_and_those_that_worked_stay(
    cluster: Cluster, refusing: LLMClusterInfo, silent: LLMClusterInfo
) -> None:
    first, second, client = cluster.open(1), cluster.open(2), cluster.open(3, listen="", insecure=True)
    data = Data(first, second, client)
    nowhere = cluster_info(52, [], [(LOOPBACK, 0)])
    clusters = [first.info(), refusing, silent, nowhere, second.info()]
    overall, each = client.datadist.link_clusters(clusters, 2_000)
    assert each == [
        OK,
        LLMStatusCode.LLM_LINK_FAILED,
        LLMStatusCode.LLM_LINK_FAILED,
        LLMStatusCode.LLM_PARAM_INVALID,
        OK,
    ]
    assert overall == LLMStatusCode.LLM_PARAM_INVALID  # the last that failed
    data.moves(client, first)
    data.moves(second, client)
    overall, each = client.datadist.unlink_clusters([first.info(), refusing, second.info()], TIMEOUT_MS)
    assert (overall, each) == (OK, [OK, OK, OK])  # there is no link with the one that cannot be reached
    assert data.is_cut(client, first)
    assert data.is_cut(client, second)


def test_a_stopped_peer_fails_a_link_and_its_end(processes: Cluster) -> None:
    """By the codes that programs wait for, and not by a transfer's."""
    server, client, other = processes.open(1), processes.open(2, listen=""), processes.open(3, listen="")
    client.link(server)
    assert isinstance(server.channel, ProcessChannel)
    address = server.info()
    link_failed, unlink_failed = LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_UNLINK_FAILED
    with stopped(server.channel.process.pid):
        assert other.datadist.link_clusters([address], 500) == (link_failed, [link_failed])
        assert client.datadist.unlink_clusters([address], 500) == (unlink_failed, [unlink_failed])


def test_calls_that_reach_nobody(cluster: Cluster) -> None:
    server, client = cluster.open(1), cluster.open(2, listen="")
    assert client.datadist.link_clusters([], TIMEOUT_MS) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    for timeout in (0, -1):
        assert failure(client.datadist.link_clusters, [server.info()], timeout) == LLMStatusCode.LLM_PARAM_INVALID
        assert failure(client.datadist.unlink_clusters, [server.info()], timeout) == LLMStatusCode.LLM_PARAM_INVALID
    without_local = cluster_info(1, [server.address], [])
    assert failure(client.datadist.link_clusters, [without_local]) == LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("server_accessible", [True, False])
def test_ends_of_different_modes_do_not_link(cluster: Cluster, server_accessible: bool) -> None:
    server = cluster.open(1, enable_remote_cache_accessible=server_accessible)
    client = cluster.open(2, listen="", enable_remote_cache_accessible=not server_accessible)
    invalid = LLMStatusCode.LLM_PARAM_INVALID
    assert client.datadist.link_clusters([server.info()], TIMEOUT_MS) == (invalid, [invalid])
    server.datadist.switch_role(LLMRole.PROMPT)  # nothing of a link is left


def test_a_restarted_client_links_again(processes: Cluster) -> None:
    server, client = processes.open(1), processes.open(2, listen="")
    Data(server, client)
    client.link(server)
    client.kill()
    again = processes.open(2, listen="")
    again.link(server)
    copy, theirs = again.register("copy"), server.caches["data"]
    again.manager.pull_cache(theirs.row(0), copy, 1)
    copy.expect_rows(theirs, [(0, 1)])
    again.check()
    server.check()


def test_a_link_to_a_dead_server_is_kept_until_it_is_forced(processes: Cluster, free_address: str) -> None:
    host, port = free_address.split(":")
    server, client = processes.open(1, listen=free_address), processes.open(2, listen="")
    server_info = cluster_info(1, [(host, int(port))], [(LOOPBACK, 0)])
    assert client.datadist.link_clusters([server_info], TIMEOUT_MS) == (OK, [OK])
    server.kill()
    failed = LLMStatusCode.LLM_UNLINK_FAILED
    assert client.datadist.unlink_clusters([server_info], TIMEOUT_MS) == (failed, [failed])
    assert failure(client.datadist.switch_role, LLMRole.PROMPT) == LLMStatusCode.LLM_EXIST_LINK
    assert client.datadist.unlink_clusters([server_info], TIMEOUT_MS, True) == (OK, [OK])
    restarted = processes.open(1, listen=free_address)
    data = Data(restarted, client)
    assert client.datadist.link_clusters([server_info], TIMEOUT_MS) == (OK, [OK])
    data.moves(client, restarted)


def test_roles_are_switched_between_links(cluster: Cluster, free_address: str) -> None:
    """The client becomes a server and the server a client, with data each way before and after."""
    first, second = cluster.open(1, role="PROMPT"), cluster.open(2, role="DECODER", listen="")
    data = Data(first, second)
    second.link(first)
    data.moves(second, first)
    for peer in (first, second):
        assert failure(peer.datadist.switch_role, LLMRole.DECODER) == LLMStatusCode.LLM_EXIST_LINK
    assert second.datadist.unlink_clusters([first.info()], TIMEOUT_MS) == (OK, [OK])
    first.datadist.switch_role(LLMRole.DECODER)
    second.datadist.switch_role(LLMRole.PROMPT, {LISTEN: free_address})
    host, port = free_address.split(":")
    now = cluster_info(2, [(host, int(port))], [(LOOPBACK, 0)])
    no_longer = LLMStatusCode.LLM_LINK_FAILED
    assert second.datadist.link_clusters([first.info()], TIMEOUT_MS) == (no_longer, [no_longer])
    assert first.datadist.link_clusters([now], TIMEOUT_MS) == (OK, [OK])
    data.moves(first, second)
    data.moves(second, first)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({LISTEN: "127.0.0.1"}, LLMStatusCode.LLM_PARAM_INVALID),
        ({LISTEN: "127.0.0.1:65536"}, LLMStatusCode.LLM_PARAM_INVALID),
        ({LISTEN: "192.0.2.1:26000"}, LLMStatusCode.LLM_FAILED),
    ],
)
def test_roles_with_nowhere_to_listen(cluster: Cluster, options: dict[str, str], expected: LLMStatusCode) -> None:
    peer = cluster.open(1, listen="", insecure=True)
    assert failure(peer.datadist.switch_role, LLMRole.PROMPT, options) == expected
    peer.datadist.switch_role(LLMRole.PROMPT)


# ---- hixl ----


def hixl(cluster: Cluster, cluster_id: int, **settings: Any) -> Peer:
    return cluster.open(cluster_id, transfer_backend="hixl", **settings)


def test_hixl_needs_a_listener(cluster: Cluster) -> None:
    assert failure(hixl, cluster, 1, listen="") == LLMStatusCode.LLM_PARAM_INVALID
    refused = {"enable_remote_cache_accessible": False}
    assert failure(hixl, cluster, 1, **refused) == LLMStatusCode.LLM_PARAM_INVALID
    assert failure(cluster.open, 1, transfer_backend="roce") == LLMStatusCode.LLM_PARAM_INVALID


def test_hixl_links(cluster: Cluster) -> None:
    first, second = hixl(cluster, 1), hixl(cluster, 2)
    data = Data(first, second)
    first.link(second)
    data.moves(first, second)
    already = LLMStatusCode.LLM_ALREADY_LINK
    assert first.datadist.link_clusters([second.info()], TIMEOUT_MS) == (already, [already])
    data.moves(second, first)
    assert first.datadist.unlink_clusters([second.info()], TIMEOUT_MS, True) == (OK, [OK])
    assert data.is_cut(first, second)


def test_hixl_has_no_bilateral_links_and_keeps_its_listener(cluster: Cluster, free_address: str) -> None:
    peer = hixl(cluster, 1)
    disabled = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    assert failure(peer.datadist.link, "comm", {1: 0, 2: 1}, "{}") == disabled
    assert failure(peer.datadist.unlink, 1) == disabled
    assert failure(peer.datadist.query_register_mem_status, 1) == disabled
    assert failure(peer.datadist.switch_role, LLMRole.PROMPT, {LISTEN: free_address}) == disabled
    peer.datadist.switch_role(LLMRole.PROMPT)
