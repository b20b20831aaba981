"""What options of init imply for each other, and what the native engine is given."""

from __future__ import annotations

import json

import pytest

from vllm_datadist_connector.llm_datadist import LLMConfig, LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2 import engine_options

MANAGED = {"llm.EnableCacheManager": "1"}
REMOTE = {"llm.EnableRemoteCacheAccessible": "1"}
LISTEN = {"llm.listenIpInfo": "10.0.0.1:26000"}
LISTEN_PARTS = {"llm.ListenIp": "10.0.0.1", "llm.ListenPort": "26000"}


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, {}),
        ({"llm.EnableCacheManager": "0"}, {}),
        (MANAGED, {}),
        (MANAGED | REMOTE, {}),
        (MANAGED | LISTEN, LISTEN_PARTS),
        (LISTEN, {}),
        ({"llm.LocalCommRes": ""}, MANAGED | REMOTE),
        ({"llm.LocalCommRes": "{}", "llm.EnableRemoteCacheAccessible": "0"}, MANAGED),
        (MANAGED | LISTEN | {"llm.TransferBackend": "hixl"}, REMOTE | LISTEN_PARTS),
        (LISTEN | {"llm.TransferBackend": "", "llm.LocalCommRes": ""}, MANAGED | REMOTE | LISTEN_PARTS),
    ],
)
def test_completed(options: dict[str, str], added: dict[str, str]) -> None:
    before = dict(options)
    assert engine_options.complete(options, "Mix") == options | added | {"llm.Role": "Mix"}
    assert options == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"llm.LocalCommRes": "", "llm.EnableCacheManager": "0"}, "llm.EnableCacheManager: '0'"),
        ({"llm.EnableCacheManager": "yes"}, "llm.EnableCacheManager: 'yes'"),
        (LISTEN | {"llm.TransferBackend": "hixl"}, "llm.EnableCacheManager: None"),
        (
            MANAGED | LISTEN | {"llm.TransferBackend": "hixl", "llm.EnableRemoteCacheAccessible": "0"},
            "llm.EnableRemoteCacheAccessible: '0'",
        ),
        (MANAGED | {"llm.TransferBackend": "hixl"}, "llm.listenIpInfo: None"),
        (MANAGED | {"llm.listenIpInfo": "10.0.0.1"}, "llm.listenIpInfo: '10.0.0.1'"),
        (MANAGED | {"llm.listenIpInfo": "::1:26000"}, "llm.listenIpInfo: '::1:26000'"),
        (MANAGED | {"llm.listenIpInfo": ""}, "llm.listenIpInfo: ''"),
    ],
)
def test_contradictions(options: dict[str, str], name: str) -> None:
    with pytest.raises(LLMException, match=f"^{name}, allowed: ") as caught:
        engine_options.complete(options, "Mix")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_port_that_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"llm\.listenIpInfo: port 'x' of '10\.0\.0\.1:x' is not a number"):
        engine_options.complete(MANAGED | {"llm.listenIpInfo": "10.0.0.1:x"}, "Mix")


def test_native_options_of_every_property() -> None:
    config = LLMConfig()
    config.ge_options = {"datadist.Transport": "tcp", "ge.other": "1"}
    config.device_id = [3, 4]
    config.sync_kv_timeout = 5000
    config.listen_ip_info = "10.0.0.1:26000"
    config.mem_pool_cfg = '{"memory_size": 1}'
    config.host_mem_pool_cfg = '{"memory_size": 2}'
    config.enable_cache_manager = True
    config.link_total_time = 5
    config.link_retry_count = 6
    config.rdma_traffic_class = 132
    config.rdma_service_level = 4
    config.local_comm_res = ""
    config.transfer_backend = "hixl"
    config.global_resource_config = "{}"
    config.output_max_size = 9
    config.buf_pool_cfg = "{}"
    config.deploy_res_path = "/x"
    config.enable_switch_role = True
    completed = engine_options.complete(config.generate_options(), "Prompt")
    assert engine_options.native_options(completed) == {
        "datadist.Transport": "tcp",
        "llm.DeviceId": "3",
        "llm.SyncKvCacheWaitTime": "5000",
        "llm.ListenIpInfo": "10.0.0.1:26000",
        "llm.MemPoolConfig": '{"memory_size": 1}',
        "llm.HostMemPoolConfig": '{"memory_size": 2}',
        "llm.EnableRemoteCacheAccessible": "1",
        "llm.LinkTotalTime": "5",
        "llm.LinkRetryCount": "6",
        "llm.RdmaTrafficClass": "132",
        "llm.RdmaServiceLevel": "4",
        "llm.LocalCommRes": "",
        "llm.TransferBackend": "hixl",
        "llm.GlobalResourceConfig": "{}",
    }


def test_native_names_pass_as_they_are() -> None:
    options = {"llm.DeviceId": "1", "llm.ListenIpInfo": "10.0.0.1:1"}
    assert engine_options.native_options(options) == options


def test_python_names_win() -> None:
    options = {"llm.DeviceId": "1", "ge.exec.deviceId": "2", "llm.ListenIpInfo": "10.0.0.1:1"} | LISTEN
    assert engine_options.native_options(options) == {"llm.DeviceId": "2", "llm.ListenIpInfo": "10.0.0.1:26000"}


def test_a_missing_device_stays_missing() -> None:
    assert engine_options.native_options({}) == {}


def test_device_count() -> None:
    assert engine_options.device_count({}) == 1
    assert engine_options.device_count({"ge.exec.deviceId": "0;1;2"}) == 3


def test_memory_max() -> None:
    engine_options.check_memory_max({})
    engine_options.check_memory_max({"ge.flowGraphMemMaxSize": "1024"})
    with pytest.raises(TypeError, match=r"ge\.flowGraphMemMaxSize: .*only support str"):
        engine_options.check_memory_max({"ge.flowGraphMemMaxSize": 1024})
    for value in ("", "1;2", "-1", "1G"):
        with pytest.raises(LLMException, match=r"ge\.flowGraphMemMaxSize: ") as caught:
            engine_options.check_memory_max({"ge.flowGraphMemMaxSize": value})
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, {"memory_size": 1 << 30}),
        ({"ge.flowGraphMemMaxSize": "4096"}, {"memory_size": 4096}),
        ({"llm.MemPoolConfig": '{"memory_size": 7}', "ge.flowGraphMemMaxSize": "4096"}, {"memory_size": 7}),
    ],
)
def test_legacy_pool(options: dict[str, str], pool: dict[str, int]) -> None:
    native = engine_options.native_legacy_options(options | REMOTE, listens=False)
    assert native["llm.EnableRemoteCacheAccessible"] == "0"
    assert json.loads(native["llm.MemPoolConfig"]) == pool


CLUSTER = {"llm.ClusterInfo": '{"listen_ip_info": [{"ip": 16777226, "port": 26000}, {"ip": 1, "port": 2}]}'}


@pytest.mark.parametrize(
    ("options", "listens", "address"),
    [
        (CLUSTER, True, "10.0.0.1:26000"),
        (CLUSTER, False, None),
        (CLUSTER | {"llm.listenIpInfo": "10.0.0.9:1"}, True, "10.0.0.9:1"),
        ({"llm.ClusterInfo": "{}"}, True, None),
        ({}, True, None),
    ],
)
def test_legacy_prompt_listens_as_its_cluster_info_says(
    options: dict[str, str], listens: bool, address: str | None
) -> None:
    assert engine_options.native_legacy_options(options, listens).get("llm.ListenIpInfo") == address


@pytest.mark.parametrize("text", ["{", "[]", '{"listen_ip_info": 1}', '{"listen_ip_info": [{"ip": -1, "port": 1}]}'])
def test_legacy_cluster_info_that_is_none(text: str) -> None:
    with pytest.raises(LLMException, match=r"llm\.ClusterInfo: ") as caught:
        engine_options.native_legacy_options({"llm.ClusterInfo": text}, listens=True)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
