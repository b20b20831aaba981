"""LLMConfig: each property's default, check and option, and the dict that comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_datadist_connector.llm_datadist import LLMConfig, LlmConfig, LLMException, LLMRole, LLMStatusCode

ALWAYS = {"llm.MemoryUtilization": "0.95"}
DEFAULTS: dict[str, Any] = {
    "ge_options": {},
    "device_id": None,
    "sync_kv_timeout": None,
    "deploy_res_path": "",
    "listen_ip_info": "",
    "buf_pool_cfg": "",
    "mem_pool_cfg": "",
    "host_mem_pool_cfg": "",
    "enable_cache_manager": False,
    "enable_remote_cache_accessible": False,
    "link_total_time": 0,
    "link_retry_count": 1,
    "rdma_traffic_class": None,
    "rdma_service_level": None,
    "local_comm_res": "",
    "transfer_backend": "",
    "global_resource_config": "",
    "cluster_info": "",
    "output_max_size": None,
    "enable_switch_role": False,
    "mem_utilization": 0.95,
}
EMITTED: list[tuple[str, Any, dict[str, str]]] = [
    ("ge_options", {"datadist.Transport": "tcp"}, {"datadist.Transport": "tcp"}),
    ("device_id", 3, {"ge.exec.deviceId": "3", "ge.session_device_id": "3"}),
    ("device_id", [2, 5], {"ge.exec.deviceId": "2;5", "ge.session_device_id": "2"}),
    ("device_id", (0,), {"ge.exec.deviceId": "0", "ge.session_device_id": "0"}),
    ("sync_kv_timeout", 5000, {"llm.SyncKvCacheWaitTime": "5000"}),
    ("sync_kv_timeout", "5000", {"llm.SyncKvCacheWaitTime": "5000"}),
    ("deploy_res_path", "/x", {"llm.deployResPath": "/x"}),
    ("deploy_res_path", "", {}),
    ("listen_ip_info", "127.0.0.1:26000", {"llm.listenIpInfo": "127.0.0.1:26000"}),
    ("listen_ip_info", "", {}),
    ("buf_pool_cfg", "{}", {"llm.BufPoolCfg": "{}"}),
    ("mem_pool_cfg", "{}", {"llm.MemPoolConfig": "{}"}),
    ("mem_pool_cfg", "", {}),
    ("host_mem_pool_cfg", "{}", {"llm.HostMemPoolConfig": "{}"}),
    ("enable_cache_manager", True, {"llm.EnableCacheManager": "1"}),
    ("enable_cache_manager", False, {"llm.EnableCacheManager": "0"}),
    ("enable_remote_cache_accessible", True, {"llm.EnableRemoteCacheAccessible": "1"}),
    ("enable_remote_cache_accessible", False, {"llm.EnableRemoteCacheAccessible": "0"}),
    ("link_total_time", 0, {"llm.LinkTotalTime": "0"}),
    ("link_total_time", 2**32 - 1, {"llm.LinkTotalTime": "4294967295"}),
    ("link_total_time", True, {"llm.LinkTotalTime": "1"}),
    ("link_retry_count", 100, {"llm.LinkRetryCount": "100"}),
    ("rdma_traffic_class", 132, {"llm.RdmaTrafficClass": "132"}),
    ("rdma_service_level", 0, {"llm.RdmaServiceLevel": "0"}),
    ("local_comm_res", "", {"llm.LocalCommRes": ""}),
    ("local_comm_res", "{}", {"llm.LocalCommRes": "{}"}),
    ("local_comm_res", None, {}),
    ("transfer_backend", "hixl", {"llm.TransferBackend": "hixl"}),
    ("transfer_backend", "", {"llm.TransferBackend": ""}),
    ("global_resource_config", "", {"llm.GlobalResourceConfig": ""}),
    ("output_max_size", 7, {"llm.OutputMaxSize": "7"}),
    ("enable_switch_role", True, {"llm.EnableSwitchRole": "1"}),
    ("enable_switch_role", False, {}),
    ("mem_utilization", 0.5, {"llm.MemoryUtilization": "0.5"}),
]
WRONG_TYPES: list[tuple[str, Any]] = [
    *((name, 1) for name, default in DEFAULTS.items() if isinstance(default, str)),
    *((name, "1") for name, default in DEFAULTS.items() if isinstance(default, bool)),
    ("ge_options", []),
    ("ge_options", {1: "1"}),
    ("ge_options", {"1": 1}),
    ("device_id", "0"),
    ("device_id", [0, "1"]),
    ("sync_kv_timeout", 1.0),
    ("link_total_time", None),
    ("link_retry_count", "1"),
    ("rdma_traffic_class", None),
    ("rdma_service_level", "4"),
    ("output_max_size", "7"),
    ("mem_utilization", "0.5"),
]
OUT_OF_WIDTH: list[tuple[str, Any]] = [
    ("device_id", 2**31),
    ("sync_kv_timeout", 2**31),
    ("sync_kv_timeout", str(2**31)),
    ("link_total_time", -1),
    ("link_total_time", 2**32),
    ("rdma_traffic_class", -1),
    ("rdma_service_level", 2**32),
]
NOT_ALLOWED: list[tuple[str, Any]] = [
    ("device_id", -1),
    ("device_id", [0, -1]),
    ("device_id", []),
    ("sync_kv_timeout", 0),
    ("sync_kv_timeout", "0"),
    ("sync_kv_timeout", ""),
    ("sync_kv_timeout", "-5"),
    ("sync_kv_timeout", "5s"),
    ("sync_kv_timeout", "\u0665"),
    ("link_retry_count", 0),
    ("link_retry_count", 101),
    ("mem_utilization", -0.1),
    ("mem_utilization", 1.1),
    ("mem_utilization", float("nan")),
    ("transfer_backend", "hccl"),
    ("transfer_backend", "HIXL"),
    ("cluster_info", "{"),
    ("cluster_info", "[]"),
    ("cluster_info", '{"listen_ip_info": [1]}'),
]


def test_defaults() -> None:
    config = LLMConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.generate_options() == ALWAYS


def test_unknown_options_are_refused() -> None:
    config = LLMConfig()
    with pytest.raises(AttributeError, match="no option 'listen_ip'; did you mean listen_ip_info"):
        config.listen_ip = "127.0.0.1:1"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no option 'xyz', allowed: ge_options, device_id"):
        config.xyz = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no option 'gen_options'"):
        config.gen_options = dict  # type: ignore[method-assign]
    assert config.generate_options() == ALWAYS


@pytest.mark.parametrize(("name", "value", "options"), EMITTED)
def test_set_read_emit(name: str, value: Any, options: dict[str, str]) -> None:
    config = LLMConfig()
    setattr(config, name, value)
    assert getattr(config, name) == value
    assert config.generate_options() == ALWAYS | options


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_type(name: str, value: Any) -> None:
    config = LLMConfig()
    with pytest.raises(TypeError, match=f"{name}.*only support"):
        setattr(config, name, value)
    assert config.generate_options() == ALWAYS


@pytest.mark.parametrize(("name", "value"), OUT_OF_WIDTH)
def test_out_of_width(name: str, value: Any) -> None:
    config = LLMConfig()
    with pytest.raises(ValueError, match=f"{name}: .*value is out of range"):
        setattr(config, name, value)
    assert config.generate_options() == ALWAYS


@pytest.mark.parametrize(("name", "value"), NOT_ALLOWED)
def test_not_allowed(name: str, value: Any) -> None:
    config = LLMConfig()
    with pytest.raises(LLMException, match=f"{name}: .*allowed: ") as caught:
        setattr(config, name, value)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert config.generate_options() == ALWAYS


def test_cluster_info_gets_little_endian_ips() -> None:
    config = LLMConfig()
    config.cluster_info = json.dumps(
        {"cluster_id": 1, "listen_ip_info": [{"ip": "10.0.0.1", "port": 26000}, {"ip": 7, "port": 1}]}
    )
    assert json.loads(config.generate_options()["llm.ClusterInfo"]) == {
        "cluster_id": 1,
        "listen_ip_info": [{"ip": 0x0100000A, "port": 26000}, {"ip": 7, "port": 1}],
    }


def test_cluster_info_with_a_bad_ip() -> None:
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        LLMConfig().cluster_info = '{"listen_ip_info": [{"ip": "ten", "port": 1}]}'


def test_ge_options_go_first() -> None:
    config = LLMConfig()
    config.ge_options = {"ge.exec.deviceId": "9", "other": "1"}
    config.device_id = 1
    assert config.generate_options() == ALWAYS | {
        "other": "1",
        "ge.exec.deviceId": "1",
        "ge.session_device_id": "1",
    }


def test_options_are_always_the_same_dict() -> None:
    config = LLMConfig()
    options = config.generate_options()
    options["datadist.Transport"] = "tcp"
    config.listen_ip_info = "127.0.0.1:1"
    assert config.gen_options() is options
    assert options == ALWAYS | {"datadist.Transport": "tcp", "llm.listenIpInfo": "127.0.0.1:1"}
    config.listen_ip_info = ""
    assert config.generate_options() == ALWAYS | {"datadist.Transport": "tcp"}


def test_configs_do_not_share() -> None:
    LLMConfig().ge_options["x"] = "1"
    assert LLMConfig().generate_options() == ALWAYS


def test_names() -> None:
    assert LlmConfig is LLMConfig
    assert {role.name: role.value for role in LLMRole} == {"PROMPT": 1, "DECODER": 2, "MIX": 3}
    assert str(LLMRole.PROMPT) == "LLMRole.PROMPT"
