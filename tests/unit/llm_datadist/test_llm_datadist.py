"""LLMDataDist: init, finalize, roles: its checks, and which call of the engine each method becomes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from support.noted_engine import NotedEngine

from vllm_datadist_connector.llm_datadist import CacheKey, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2 import llm_datadist as module

Start = Callable[..., LLMDataDist]
MANAGED = {"ge.exec.deviceId": "0", "llm.EnableCacheManager": "1"}
LEGACY = {"ge.exec.deviceId": "0"}


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
    assert (datadist._llm_datadist, datadist._kv_cache_manager, datadist._cache_manager) == (None, None, None)
    assert not datadist._cluster_config
    assert LLMDataDist.llm_engine_instance is None


def test_init_in_cache_manager_mode(engine: NotedEngine) -> None:
    datadist = LLMDataDist(LLMRole.DECODER, 7)
    options = MANAGED | {"llm.listenIpInfo": "127.0.0.1:0"}
    datadist.init(options)
    assert engine.made == [(7, 2)]
    assert engine.take() == [("initialize", {"llm.DeviceId": "0", "llm.ListenIpInfo": "127.0.0.1:0"})]
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


def test_init_in_legacy_mode(start: Start) -> None:
    datadist = start(LEGACY)
    assert datadist.kv_cache_manager._initialized
    with pytest.raises(LLMException, match=r"llm\.EnableCacheManager: '0', allowed: '1'") as caught:
        datadist.cache_manager  # noqa: B018
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_init_twice_is_once(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    datadist.init(LEGACY)
    assert engine.take() == []


def test_one_per_process(start: Start) -> None:
    first = start(MANAGED)
    second = LLMDataDist(LLMRole.MIX, 2)
    with pytest.raises(LLMException, match="Cannot init multiple LLMDataDists: cluster 1 is initialised") as caught:
        second.init(MANAGED)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    first.finalize()
    second.init(MANAGED)
    assert LLMDataDist.llm_engine_instance is second


@pytest.mark.parametrize("options", [None, [], {"ge.exec.deviceId": 0}, {1: "0"}, {"ge.flowGraphMemMaxSize": 1}])
def test_init_checks_types(engine: NotedEngine, options: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        LLMDataDist(LLMRole.MIX, 1).init(options)
    assert engine.take() == []


def test_a_failed_init_can_be_repeated(engine: NotedEngine) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    engine.answers["initialize"] = 0xFFFFFFFF
    with pytest.raises(LLMException, match=r"\[init\] failed, .*LLM_FAILED.*the reason") as caught:
        datadist.init(MANAGED)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert LLMDataDist.llm_engine_instance is None
    engine.answers["initialize"] = 0
    datadist.init(MANAGED)
    assert LLMDataDist.llm_engine_instance is datadist


def test_finalize(engine: NotedEngine) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    datadist.finalize()
    assert engine.take() == []
    datadist.init(MANAGED)
    manager = datadist.cache_manager
    engine.take()
    datadist.finalize()
    datadist.finalize()
    assert engine.take() == [("finalize",)]
    assert not manager._initialized
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.parametrize(
    "call",
    [
        lambda datadist: datadist.link_clusters([]),
        lambda datadist: datadist.unlink_clusters([]),
        lambda datadist: datadist.link("name", {1: 0, 2: 1}, ""),
        lambda datadist: datadist.unlink(1),
        lambda datadist: datadist.query_register_mem_status(1),
        lambda datadist: datadist.check_link_status(2),
        lambda datadist: datadist.switch_role(LLMRole.MIX),
        lambda datadist: datadist.cache_manager,
        lambda datadist: datadist.kv_cache_manager,
    ],
)
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.usefixtures("engine")
def test_before_init_and_after_finalize(call: Any, finalized: bool) -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    if finalized:
        datadist.init(MANAGED)
        datadist.finalize()
    with pytest.raises(RuntimeError, match=r"^llm datadist is not initialized$") as caught:
        call(datadist)
    assert not isinstance(caught.value, LLMException)


def test_exit_finalizes(engine: NotedEngine, start: Start) -> None:
    start(MANAGED)
    module._shutdown_handler()
    assert engine.take() == [("finalize",)]
    module._shutdown_handler()
    assert engine.take() == []


def test_the_exit_handler_is_registered() -> None:
    program = (
        "from vllm_datadist_connector.llm_datadist.v2 import llm_datadist\n"
        "class Left:\n"
        "    def finalize(self): print('finalized')\n"
        "llm_datadist.LLMDataDist.llm_engine_instance = Left()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "finalized\n"


# ---- roles ----


def test_switch_role(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    datadist.switch_role(LLMRole.DECODER)
    datadist.switch_role(LLMRole.DECODER, {"llm.listenIpInfo": "10.0.0.1:5"})
    assert engine.take() == [("set_role", 2, {}), ("set_role", 2, {"llm.ListenIpInfo": "10.0.0.1:5"})]
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
def test_switch_role_arguments(
    engine: NotedEngine, start: Start, role: Any, options: Any, error: type[Exception]
) -> None:
    datadist = start(MANAGED)
    with pytest.raises(error):
        datadist.switch_role(role, options)
    assert engine.take() == []
    assert datadist._role is LLMRole.PROMPT


def test_a_refused_switch_changes_nothing(engine: NotedEngine, start: Start) -> None:
    datadist = start(MANAGED)
    engine.answers["set_role"] = 0x5010B018
    with pytest.raises(LLMException, match="the reason") as caught:
        datadist.switch_role(LLMRole.MIX)
    assert caught.value.status_code is LLMStatusCode.LLM_EXIST_LINK
    assert datadist._role is LLMRole.PROMPT


SWITCHABLE = LEGACY | {"llm.EnableSwitchRole": "1"}


@pytest.mark.parametrize(
    ("options", "first", "role", "switch_options", "code"),
    [
        (SWITCHABLE, LLMRole.PROMPT, LLMRole.PROMPT, None, LLMStatusCode.LLM_PARAM_INVALID),
        (SWITCHABLE, LLMRole.DECODER, LLMRole.PROMPT, None, LLMStatusCode.LLM_PARAM_INVALID),
        (LEGACY, LLMRole.PROMPT, LLMRole.DECODER, None, LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
    ],
)
def test_legacy_switch_refused(
    engine: NotedEngine,
    start: Start,
    options: dict[str, str],
    first: LLMRole,
    role: LLMRole,
    switch_options: dict[str, str] | None,
    code: LLMStatusCode,
) -> None:
    datadist = start(options, first)
    with pytest.raises(LLMException) as caught:
        datadist.switch_role(role, switch_options)
    assert caught.value.status_code is code
    assert engine.take() == []


def test_legacy_switch(engine: NotedEngine, start: Start) -> None:
    datadist = start(SWITCHABLE, LLMRole.DECODER)
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:5"})
    datadist.switch_role(LLMRole.DECODER)
    assert engine.take() == [("set_role", 1, {"llm.ListenIpInfo": "127.0.0.1:5"}), ("set_role", 2, {})]


def test_a_legacy_switch_changes_what_the_manager_allows(start: Start) -> None:
    datadist = start(SWITCHABLE, LLMRole.DECODER)
    key = CacheKey(1, 2)
    with pytest.raises(LLMException, match="DECODER"):
        datadist.kv_cache_manager.remove_cache_key(key)
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:5"})
    datadist.kv_cache_manager.remove_cache_key(key)
