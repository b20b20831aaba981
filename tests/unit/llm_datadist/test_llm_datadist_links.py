"""Links of LLMDataDist: its checks, and which call of the engine each method becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.noted_engine import NotedEngine

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist import (
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)

Start = Callable[..., LLMDataDist]
MANAGED = {"ge.exec.deviceId": "0", "llm.EnableCacheManager": "1"}
LEGACY = {"ge.exec.deviceId": "0"}
RANKS = {1: 0, 2: 1}


def cluster(remote_cluster_id: int = 2, *, local: bool = True) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = remote_cluster_id
    info.append_remote_ip_info("10.0.0.2", 26000)
    if local:
        info.append_local_ip_info("10.0.0.1", 0)
    return info


# ---- links of a client ----


def test_link_and_unlink_clusters(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    peer = cluster()
    peer.remote_role_type = LLMRole.DECODER
    success = (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
    assert datadist.link_clusters((peer,)) == success
    assert datadist.unlink_clusters([peer], 5, True) == success
    (link, linked, *link_rest), (unlink, unlinked, *unlink_rest) = engine.take()
    assert (link, link_rest) == ("link_clusters", [3000])
    assert (unlink, unlink_rest) == ("unlink_clusters", [5, True])
    for (info,) in (linked, unlinked):
        assert info.remote_cluster_id == 2
        assert info.remote_role_type == 2
        assert info.remote_ip_infos == [("10.0.0.2", 26000)]
        assert info.local_ip_infos == [("10.0.0.1", 0)]


def test_link_failures_are_codes(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    engine.answers["link_clusters"] = (0x5010B009, [0, 0x5010B009, 0x5010B017])
    overall, each = datadist.link_clusters([cluster(2), cluster(3), cluster(4)])
    assert overall is LLMStatusCode.LLM_LINK_FAILED
    assert each == [LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_FAILED]


def test_no_clusters(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    engine.answers["link_clusters"] = (0x5010B005, [])
    assert datadist.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])


@pytest.mark.parametrize("method", ["link_clusters", "unlink_clusters"])
@pytest.mark.parametrize(
    ("clusters", "timeout", "error", "text"),
    [
        (None, 1, TypeError, "clusters: .*only support list or tuple"),
        ([1], 1, TypeError, r"clusters\[0\]: .*inner type only support LLMClusterInfo"),
        ([cluster(), LLMClusterInfo()], 1, TypeError, r"clusters\[1\]\.remote_cluster_id: not set"),
        ([cluster()], "1", TypeError, "timeout: .*only support int"),
        ([cluster()], 2**31, ValueError, "timeout: .*value is out of range"),
        ([cluster()], 0, LLMException, "timeout: 0, allowed: milliseconds above 0"),
        ([cluster()], -1, LLMException, "timeout: -1, allowed"),
    ],
)
def test_link_arguments(
    engine: NotedEngine, start: Start, method: str, clusters: Any, timeout: Any, error: type[Exception], text: str
) -> None:
    datadist = start(MANAGED)
    with pytest.raises(error, match=text):
        getattr(datadist, method)(clusters, timeout)
    assert engine.take() == []


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (MANAGED, True),
        (MANAGED | {"llm.LocalCommRes": ""}, True),
        (MANAGED | {"llm.LocalCommRes": "{}"}, False),
        (LEGACY, False),
    ],
)
def test_local_ip(engine: NotedEngine, start: Start, options: dict[str, str], needed: bool) -> None:
    datadist = start(options)
    without = cluster(local=False)
    if needed:
        with pytest.raises(LLMException, match=r"clusters\[0\]\.local_ip_info_list: .*at least one") as caught:
            datadist.link_clusters([without])
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        assert engine.take() == []
    else:
        datadist.link_clusters([without])
    datadist.unlink_clusters([without])
    assert engine.take()[-1][0] == "unlink_clusters"


def test_check_link_status(engine: NotedEngine, start: Start) -> None:
    datadist = start(LEGACY)
    alive = _native.LinkReport(True, "tcp", "", "10.0.0.2:1", 0, 0, 0, 0)
    engine.answers["query_link"] = (0, alive)
    datadist.check_link_status(2)
    assert engine.take() == [("query_link", 2)]
    engine.answers["query_link"] = (0, alive._replace(alive=False))
    with pytest.raises(LLMException, match=r"cluster 2 at 10\.0\.0\.2:1 is lost") as lost:
        datadist.check_link_status(2)
    assert lost.value.status_code is LLMStatusCode.LLM_LINK_FAILED
    engine.answers["query_link"] = (0x5010B007, None)
    with pytest.raises(LLMException, match="the reason") as none:
        datadist.check_link_status(2)
    assert none.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


def test_check_link_status_is_of_legacy_mode(start: Start) -> None:
    with pytest.raises(LLMException, match="check_link_status is of legacy mode") as caught:
        start(MANAGED).check_link_status(2)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


# ---- bilateral links ----


def test_link(engine: NotedEngine, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    datadist = start(MANAGED)
    assert datadist.link("n" * 127, RANKS, "{}") == 1
    assert engine.take() == [("link_comm", "n" * 127, [(1, 0, "", 0), (2, 1, "", 0)], 120)]


def test_link_total_time_is_the_option_s(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED | {"llm.LinkTotalTime": "9"})
    datadist.link("name", RANKS, "")
    assert engine.take()[0][-1] == 9


def test_only_a_successful_link_ends_registration(
    engine: NotedEngine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    datadist = start(MANAGED)
    linked: list[bool] = []
    monkeypatch.setattr(datadist.cache_manager, "set_is_call_linked", lambda: linked.append(True))
    engine.answers["link_comm"] = (0x5010B005, 0)
    with pytest.raises(LLMException, match="the reason") as caught:
        datadist.link("name", RANKS, "")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert linked == []
    engine.answers["link_comm"] = (0, 1)
    datadist.link("name", RANKS, "")
    assert linked == [True]


@pytest.mark.parametrize(
    ("name", "ranks", "table", "error", "text"),
    [
        (None, RANKS, "", TypeError, "comm_name: .*only support str"),
        (1, RANKS, "", TypeError, "comm_name: .*only support str"),
        ("", RANKS, "", LLMException, "comm_name: '', allowed: 1 to 127 characters"),
        ("n" * 128, RANKS, "", LLMException, "comm_name: .*allowed: 1 to 127 characters"),
        ("n", None, "", TypeError, "cluster_rank_info: .*only support dict"),
        ("n", {"1": 0, 2: 1}, "", TypeError, "cluster_rank_info: .*dict key only support int"),
        ("n", {1: "0", 2: 1}, "", TypeError, "cluster_rank_info.*dict value only support int"),
        ("n", {1: 0}, "", LLMException, "cluster_rank_info: .*allowed: 2 to 4 members"),
        ("n", dict.fromkeys(range(5), 0), "", LLMException, "cluster_rank_info: .*allowed: 2 to 4 members"),
        ("n", {1: 1, 2: 0}, "", LLMException, "cluster_rank_info: .*ascending"),
        ("n", {1: 0, 2: 0}, "", LLMException, "cluster_rank_info: .*ascending"),
        ("n", {-1: 0, 2: 1}, "", ValueError, "cluster_rank_info key: -1, value is out of range"),
        ("n", {2**64: 0, 2: 1}, "", ValueError, "cluster_rank_info key: .*value is out of range"),
        ("n", {1: 0, 2: 2**32}, "", ValueError, r"cluster_rank_info\[2\]: .*value is out of range"),
        ("n", RANKS, None, TypeError, "rank_table: .*only support str"),
        ("n", RANKS, '{"server_list": 1}', LLMException, "rank_table: server_list: 1"),
    ],
)
def test_link_comm_arguments(
    engine: NotedEngine, start: Start, name: Any, ranks: Any, table: Any, error: type[Exception], text: str
) -> None:
    datadist = start(MANAGED)
    with pytest.raises(error, match=text) as caught:
        datadist.link(name, ranks, table)
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert engine.take() == []


@pytest.mark.parametrize("members", [2, 4])
def test_link_member_counts(engine: NotedEngine, start: Start, members: int) -> None:
    start(MANAGED).link("n", {number: number for number in range(members)}, "")
    assert len(engine.take()[0][2]) == members


def test_query_and_unlink(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    for state, status in (
        (_native.COMM_OK, RegisterMemStatus.OK),
        (_native.COMM_PREPARING, RegisterMemStatus.PREPARING),
        (_native.COMM_FAILED, RegisterMemStatus.FAILED),
    ):
        engine.answers["query_comm"] = (0, state, "why")
        assert datadist.query_register_mem_status(4) is status
    datadist.unlink(4)
    assert engine.take() == [("query_comm", 4)] * 3 + [("unlink_comm", 4)]
    engine.answers |= {"query_comm": (0x5010B007, 0, ""), "unlink_comm": 0x5010B007}
    for call in (datadist.query_register_mem_status, datadist.unlink):
        with pytest.raises(LLMException, match="the reason") as caught:
            call(5)
        assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
        with pytest.raises(TypeError, match=r"comm_id: .*only support int"):
            call("5")  # type: ignore[arg-type]
