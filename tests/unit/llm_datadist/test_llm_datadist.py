"""LLMDataDist: its checks, and which native call each method becomes. The native side is a recorder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist import (
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from vllm_datadist_connector.llm_datadist.v2 import links
from vllm_datadist_connector.llm_datadist.v2 import llm_datadist as module

MANAGED = {"ge.exec.deviceId": "0", "llm.EnableCacheManager": "1"}
LEGACY = {"ge.exec.deviceId": "0"}
RANKS = {1: 0, 2: 1}


class Cluster(tuple[Any, ...]):
    """ClusterInfo as the tuple of its arguments."""

    def __new__(cls, *arguments: Any) -> Cluster:
        return super().__new__(cls, arguments)

    @property
    def local_ip_infos(self) -> Any:
        return self[2]


class Recorder:
    """Records calls and answers each with `answers[name]`, else success."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {
            "link_clusters": (0, [0]),
            "unlink_clusters": (0, [0]),
            "link_comm": (0, 1),
            "query_comm": (0, _native.COMM_OK, ""),
            "query_link": (0, None),
        }

    def __call__(self, *arguments: Any) -> Recorder:
        self.calls.append(("ManagedDataDist", *arguments))
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self.answers.get(name, 0)

        return call

    def take(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(module, "ManagedDataDist", recorder)
    monkeypatch.setattr(links._native, "ClusterInfo", Cluster)
    monkeypatch.setattr(_native, "last_error", lambda: "the reason")
    yield recorder
    module._shutdown_handler()


def started(native: Recorder, options: dict[str, str], role: LLMRole = LLMRole.PROMPT) -> LLMDataDist:
    datadist = LLMDataDist(role, 1)
    datadist.init(options)
    native.take()
    return datadist


def cluster(remote_cluster_id: int = 2, *, local: bool = True) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = remote_cluster_id
    info.append_remote_ip_info("10.0.0.2", 26000)
    if local:
        info.append_local_ip_info("10.0.0.1", 0)
    return info


# ---- construction, init, finalize ----


@pytest.mark.parametrize(
    ("role", "cluster_id", "error"),
    [(1, 0, TypeError), (None, 0, TypeError), (LLMRole.MIX, "0", TypeError), (LLMRole.MIX, -1, ValueError)],
)
def test_constructor_refuses(role: Any, cluster_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        LLMDataDist(role, cluster_id)


def test_what_upstream_s_tests_look_at() -> None:
    datadist = LLMDataDist(LLMRole.DECODER, 2**64 - 1)
    assert datadist.cluster_id == 2**64 - 1
    assert datadist._role_to_str(LLMRole.MIX) == "Mix"
    assert datadist._role is LLMRole.DECODER
    assert not any([datadist._is_initialized, datadist._enable_cache_mgr, datadist._enable_local_comm_res])
    assert datadist._engine_options == {}
    assert datadist._llm_datadist is datadist._kv_cache_manager is datadist._cache_manager is None
    assert not datadist._cluster_config
    assert LLMDataDist.llm_engine_instance is None


def test_init_in_cache_manager_mode(native: Recorder) -> None:
    datadist = LLMDataDist(LLMRole.DECODER, 7)
    options = MANAGED | {"llm.listenIpInfo": "127.0.0.1:0"}
    datadist.init(options)
    assert native.take() == [
        ("ManagedDataDist", 7, 2),
        ("initialize", {"llm.DeviceId": "0", "llm.ListenIpInfo": "127.0.0.1:0"}),
    ]
    assert datadist._engine_options == options | {
        "llm.Role": "Decoder",
        "llm.ListenIp": "127.0.0.1",
        "llm.ListenPort": "0",
    }
    assert datadist._is_initialized
    assert LLMDataDist.llm_engine_instance is datadist
    assert datadist.cache_manager._initialized
    with pytest.raises(LLMException, match=r"llm\.EnableCacheManager: '1', allowed: '0'") as caught:
        datadist.kv_cache_manager  # noqa: B018
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_init_in_legacy_mode(native: Recorder) -> None:
    datadist = started(native, LEGACY)
    assert datadist.kv_cache_manager._initialized
    with pytest.raises(LLMException, match=r"llm\.EnableCacheManager: '0', allowed: '1'") as caught:
        datadist.cache_manager  # noqa: B018
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_init_twice_is_once(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    datadist.init(LEGACY)
    assert native.take() == []


def test_one_per_process(native: Recorder) -> None:
    first = started(native, MANAGED)
    second = LLMDataDist(LLMRole.MIX, 2)
    with pytest.raises(LLMException, match="Cannot init multiple LLMDataDists: cluster 1 is initialised") as caught:
        second.init(MANAGED)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    first.finalize()
    second.init(MANAGED)
    assert LLMDataDist.llm_engine_instance is second


@pytest.mark.parametrize("options", [None, [], {"ge.exec.deviceId": 0}, {1: "0"}, {"ge.flowGraphMemMaxSize": 1}])
def test_init_checks_types(native: Recorder, options: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        LLMDataDist(LLMRole.MIX, 1).init(options)
    assert native.take() == []


def test_a_failed_init_can_be_repeated(native: Recorder) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    native.answers["initialize"] = 0xFFFFFFFF
    with pytest.raises(LLMException, match=r"\[init\] failed, .*LLM_FAILED.*the reason") as caught:
        datadist.init(MANAGED)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert LLMDataDist.llm_engine_instance is None
    native.answers["initialize"] = 0
    datadist.init(MANAGED)
    assert LLMDataDist.llm_engine_instance is datadist


def test_finalize(native: Recorder) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    datadist.finalize()
    assert native.take() == []
    datadist.init(MANAGED)
    manager = datadist.cache_manager
    native.take()
    datadist.finalize()
    datadist.finalize()
    assert native.take() == [("finalize",)]
    assert not manager._initialized
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.parametrize(
    "call",
    [
        lambda datadist: datadist.link_clusters([cluster()]),
        lambda datadist: datadist.unlink_clusters([cluster()]),
        lambda datadist: datadist.link("name", RANKS, ""),
        lambda datadist: datadist.unlink(1),
        lambda datadist: datadist.query_register_mem_status(1),
        lambda datadist: datadist.check_link_status(2),
        lambda datadist: datadist.switch_role(LLMRole.MIX),
        lambda datadist: datadist.cache_manager,
        lambda datadist: datadist.kv_cache_manager,
    ],
)
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.usefixtures("native")
def test_before_init_and_after_finalize(call: Any, finalized: bool) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    if finalized:
        datadist.init(MANAGED)
        datadist.finalize()
    with pytest.raises(RuntimeError, match=r"^llm datadist is not initialized$") as caught:
        call(datadist)
    assert not isinstance(caught.value, LLMException)


def test_exit_finalizes(native: Recorder) -> None:
    started(native, MANAGED)
    module._shutdown_handler()
    assert native.take() == [("finalize",)]
    module._shutdown_handler()
    assert native.take() == []


def test_the_exit_handler_is_registered() -> None:
    program = (
        "from vllm_datadist_connector.llm_datadist.v2 import llm_datadist\n"
        "class Left:\n"
        "    def finalize(self): print('finalized')\n"
        "llm_datadist.LLMDataDist.llm_engine_instance = Left()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "finalized\n"


# ---- links of a client ----


def test_link_and_unlink_clusters(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    expected = Cluster(2, [("10.0.0.2", 26000)], [("10.0.0.1", 0)], 0)
    assert datadist.link_clusters((cluster(),)) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
    assert datadist.unlink_clusters([cluster()], 5, True) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
    assert native.take() == [("link_clusters", [expected], 3000), ("unlink_clusters", [expected], 5, True)]


def test_link_failures_are_codes(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    native.answers["link_clusters"] = (0x5010B009, [0, 0x5010B009, 0x5010B017])
    overall, each = datadist.link_clusters([cluster(2), cluster(3), cluster(4)])
    assert overall is LLMStatusCode.LLM_LINK_FAILED
    assert each == [LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_FAILED]


def test_no_clusters(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    native.answers["link_clusters"] = (0x5010B005, [])
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
    native: Recorder, method: str, clusters: Any, timeout: Any, error: type[Exception], text: str
) -> None:
    datadist = started(native, MANAGED)
    with pytest.raises(error, match=text):
        getattr(datadist, method)(clusters, timeout)
    assert native.take() == []


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (MANAGED, True),
        (MANAGED | {"llm.LocalCommRes": ""}, True),
        (MANAGED | {"llm.LocalCommRes": "{}"}, False),
        (LEGACY, False),
    ],
)
def test_local_ip(native: Recorder, options: dict[str, str], needed: bool) -> None:
    datadist = started(native, options)
    without = cluster(local=False)
    if needed:
        with pytest.raises(LLMException, match=r"clusters\[0\]\.local_ip_info_list: .*at least one") as caught:
            datadist.link_clusters([without])
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        assert native.take() == []
    else:
        datadist.link_clusters([without])
    datadist.unlink_clusters([without])
    assert native.take()[-1][0] == "unlink_clusters"


def test_check_link_status(native: Recorder) -> None:
    datadist = started(native, LEGACY)
    alive = _native.LinkReport(True, "tcp", "", "10.0.0.2:1", 0, 0)
    native.answers["query_link"] = (0, alive)
    datadist.check_link_status(2)
    assert native.take() == [("query_link", 2)]
    native.answers["query_link"] = (0, alive._replace(alive=False))
    with pytest.raises(LLMException, match=r"cluster 2 at 10\.0\.0\.2:1 is lost") as lost:
        datadist.check_link_status(2)
    assert lost.value.status_code is LLMStatusCode.LLM_LINK_FAILED
    native.answers["query_link"] = (0x5010B007, None)
    with pytest.raises(LLMException, match="the reason") as none:
        datadist.check_link_status(2)
    assert none.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


def test_check_link_status_is_of_legacy_mode(native: Recorder) -> None:
    with pytest.raises(LLMException, match="check_link_status is of legacy mode") as caught:
        started(native, MANAGED).check_link_status(2)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


# ---- bilateral links ----


def test_link(native: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    datadist = started(native, MANAGED)
    assert datadist.link("n" * 127, RANKS, "{}") == 1
    assert native.take() == [("link_comm", "n" * 127, [(1, 0, "", 0), (2, 1, "", 0)], 120)]


def test_link_total_time_is_the_option_s(native: Recorder) -> None:
    datadist = started(native, MANAGED | {"llm.LinkTotalTime": "9"})
    datadist.link("name", RANKS, "")
    assert native.take()[0][-1] == 9


def test_only_a_successful_link_ends_registration(native: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    datadist = started(native, MANAGED)
    linked: list[bool] = []
    monkeypatch.setattr(datadist.cache_manager, "set_is_call_linked", lambda: linked.append(True))
    native.answers["link_comm"] = (0x5010B005, 0)
    with pytest.raises(LLMException, match="the reason") as caught:
        datadist.link("name", RANKS, "")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert linked == []
    native.answers["link_comm"] = (0, 1)
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
    native: Recorder, name: Any, ranks: Any, table: Any, error: type[Exception], text: str
) -> None:
    datadist = started(native, MANAGED)
    with pytest.raises(error, match=text) as caught:
        datadist.link(name, ranks, table)
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert native.take() == []


@pytest.mark.parametrize("members", [2, 4])
def test_link_member_counts(native: Recorder, members: int) -> None:
    started(native, MANAGED).link("n", {number: number for number in range(members)}, "")
    assert len(native.take()[0][2]) == members


def test_query_and_unlink(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    for state, status in (
        (_native.COMM_OK, RegisterMemStatus.OK),
        (_native.COMM_PREPARING, RegisterMemStatus.PREPARING),
        (_native.COMM_FAILED, RegisterMemStatus.FAILED),
    ):
        native.answers["query_comm"] = (0, state, "why")
        assert datadist.query_register_mem_status(4) is status
    datadist.unlink(4)
    assert native.take() == [("query_comm", 4)] * 3 + [("unlink_comm", 4)]
    native.answers |= {"query_comm": (0x5010B007, 0, ""), "unlink_comm": 0x5010B007}
    for call in (datadist.query_register_mem_status, datadist.unlink):
        with pytest.raises(LLMException, match="the reason") as caught:
            call(5)
        assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
        with pytest.raises(TypeError, match=r"comm_id: .*only support int"):
            call("5")  # type: ignore[arg-type]


# ---- roles ----


def test_switch_role(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    datadist.switch_role(LLMRole.DECODER)
    datadist.switch_role(LLMRole.DECODER, {"llm.listenIpInfo": "10.0.0.1:5"})
    assert native.take() == [("set_role", 2, {}), ("set_role", 2, {"llm.ListenIpInfo": "10.0.0.1:5"})]
    assert datadist._role is LLMRole.DECODER


@pytest.mark.parametrize(
    ("role", "options", "error"),
    [
        (2, None, TypeError),
        (None, None, TypeError),
        (LLMRole.MIX, [], TypeError),
        (LLMRole.MIX, {"llm.listenIpInfo": 1}, TypeError),
        (LLMRole.MIX, {"llm.listenIpInfo": "10.0.0.1"}, LLMException),
        (LLMRole.MIX, {"llm.listenIpInfo": "10.0.0.1:x"}, ValueError),
    ],
)
def test_switch_role_arguments(native: Recorder, role: Any, options: Any, error: type[Exception]) -> None:
    datadist = started(native, MANAGED)
    with pytest.raises(error):
        datadist.switch_role(role, options)
    assert native.take() == []
    assert datadist._role is LLMRole.PROMPT


def test_a_refused_switch_changes_nothing(native: Recorder) -> None:
    datadist = started(native, MANAGED)
    native.answers["set_role"] = 0x5010B018
    with pytest.raises(LLMException, match="the reason") as caught:
        datadist.switch_role(LLMRole.MIX)
    assert caught.value.status_code is LLMStatusCode.LLM_EXIST_LINK
    assert datadist._role is LLMRole.PROMPT


SWITCHABLE = LEGACY | {"llm.EnableSwitchRole": "1"}


@pytest.mark.parametrize(
    ("options", "start", "role", "switch_options", "code"),
    [
        (SWITCHABLE, LLMRole.PROMPT, LLMRole.PROMPT, None, LLMStatusCode.LLM_PARAM_INVALID),
        (SWITCHABLE, LLMRole.DECODER, LLMRole.PROMPT, None, LLMStatusCode.LLM_PARAM_INVALID),
        (LEGACY, LLMRole.PROMPT, LLMRole.DECODER, None, LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
    ],
)
def test_legacy_switch_refused(
    native: Recorder,
    options: dict[str, str],
    start: LLMRole,
    role: LLMRole,
    switch_options: dict[str, str] | None,
    code: LLMStatusCode,
) -> None:
    datadist = started(native, options, start)
    with pytest.raises(LLMException) as caught:
        datadist.switch_role(role, switch_options)
    assert caught.value.status_code is code
    assert native.take() == []


def test_legacy_switch(native: Recorder) -> None:
    datadist = started(native, SWITCHABLE, LLMRole.DECODER)
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:5"})
    datadist.switch_role(LLMRole.DECODER)
    assert native.take() == [("set_role", 1, {"llm.ListenIpInfo": "127.0.0.1:5"}), ("set_role", 2, {})]
