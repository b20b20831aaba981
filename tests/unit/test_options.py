"""What a rank asks of its provider, and what it refuses to ask."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
from support.providers import ENGINE, HARDWARE

from vllm_datadist_connector import _native, compat
from vllm_datadist_connector.config import ConfigError, ConnectorConfig, parse_config
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.worker import build
from vllm_datadist_connector.worker.options import adapt_config, choose_provider, hardware_timeout_s, make_options

P, D = Duties(gives=True, takes=False), Duties(gives=False, takes=True)
HOST = {"host": "10.0.0.5", "insecure": True}


def adapt(extra: dict[str, Any], capabilities: _native.Capabilities = HARDWARE, **environ: str) -> ConnectorConfig:
    return adapt_config(parse_config(extra), extra, capabilities, environ)


def test_auto_is_what_the_platform_takes() -> None:
    assert [choose_provider("auto", is_npu) for is_npu in (False, True)] == ["engine", "cann"]
    assert choose_provider("engine", is_npu=True) == "engine"
    assert choose_provider("cann", is_npu=False) == "cann"


def test_our_engine_changes_nothing() -> None:
    for extra in ({}, {"host": "::1"}, {"link_timeout_s": 0.5, "verify": "fail", "transport": "tcp"}):
        assert adapt(extra, ENGINE, ASCEND_TRANSFER_TIMEOUT="5") == parse_config(extra)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"role_switch": True}, "role_switch: a role changes when there are no links, and this provider does not tell"),
        ({"transport": "cma"}, "transport: 'cma' is an option of our engine, and not this provider's; allowed: 'auto'"),
        ({"transfer_threads": 3}, "transfer_threads: 3 is"),
        ({"tcp_streams": 3}, "tcp_streams: 3 is"),
        ({"verify": "log"}, "verify: 'log' is"),
        ({"host": "fe80::5", "insecure": True}, "host: 'fe80::5' is an IPv6 address; this provider links over IPv4"),
        ({"link_timeout_s": 1.5}, "link_timeout_s: 1.5, no other limit outlasts recv_deadline_s (60.0); allowed with"),
        ({"recv_deadline_s": 1}, "link_timeout_s: 1.0, no other limit outlasts recv_deadline_s (1.0); allowed with"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(extra: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}"):
        adapt(extra)


def test_a_key_guards_what_is_ours(caplog: pytest.LogCaptureFixture) -> None:
    assert adapt({"auth": "/run/key"}).auth == "/run/key"
    assert "this provider's own links ask nobody for one" in caplog.text


@pytest.mark.parametrize("name", ["local_comm_res", "ascend_local_comm_res_path"])
def test_addresses_of_npus_are_of_no_use_to_our_engine(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: our engine has no use for it"):
        adapt({name: "/etc/npu"}, ENGINE)


def test_a_provider_that_does_not_tell_its_port_needs_one() -> None:
    silent = HARDWARE._replace(reports_port=False)
    with pytest.raises(ConfigError, match=r"^engine_port: "):
        adapt(HOST, silent)
    assert adapt(HOST | {"engine_port": 20000}, silent).engine_port == 20000


def test_loopback_as_the_name_of_a_server_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adapt(HOST)
        adapt({}, ENGINE)
    assert not caplog.messages
    adapt({})
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("host 127.0.0.1: ")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 33.064),
        ({"HCCL_RDMA_TIMEOUT": "15", "HCCL_RDMA_RETRY_CNT": "3"}, 3.402),
        ({"ASCEND_TRANSFER_TIMEOUT": "45000", "HCCL_RDMA_TIMEOUT": "15"}, 45),
        ({"ASCEND_TRANSFER_TIMEOUT": "1"}, 0.1),
    ],
)
def test_a_pull_lasts_as_long_as_the_hardware_tries(environ: dict[str, str], seconds: float) -> None:
    """By vllm-ascend's formula."""
    assert hardware_timeout_s(environ) == pytest.approx(seconds)
    assert adapt(HOST, **environ).pull_timeout_s == pytest.approx(seconds)
    assert adapt(HOST | {"pull_timeout_s": 20}, **environ).pull_timeout_s == 20


@pytest.mark.parametrize("name", ["HCCL_RDMA_TIMEOUT", "HCCL_RDMA_RETRY_CNT", "ASCEND_TRANSFER_TIMEOUT"])
@pytest.mark.parametrize("value", ["0", "-1", "20s", "99999999"])
def test_a_variable_that_hccl_would_not_take_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^environment variable {name}: '{value}', allowed: whole numbers from "):
        hardware_timeout_s({name: value})


def test_options_of_our_engine() -> None:
    options = make_options(parse_config({}), ENGINE, P, index=3, device=0)
    assert options["llm.ListenIpInfo"] == "127.0.0.1:0"
    assert options["datadist.PeerAccess"] == "read"
    options = make_options(parse_config({"engine_port": 9000}), ENGINE, D, index=3, device=0)
    assert "llm.ListenIpInfo" not in options
    assert options["datadist.PeerAccess"] == "granted"
    both = make_options(parse_config({}), ENGINE, Duties(gives=True, takes=True), index=3, device=0)
    assert both["datadist.PeerAccess"] == "read_granted"


def test_options_of_another_library_are_llm_datadists_only() -> None:
    config = adapt(HOST | {"engine_port": 9000, "pull_timeout_s": 12})
    assert make_options(config, HARDWARE, P, index=3, device=5, environ={}) == {
        "llm.DeviceId": "5",
        "llm.SyncKvCacheWaitTime": "12000",
        "llm.ListenIpInfo": "10.0.0.5:9003",
    }
    assert "llm.ListenIpInfo" not in make_options(config, HARDWARE, D, index=3, device=5, environ={})


def test_a_side_that_only_pulls_listens_where_links_read_one_way() -> None:
    both = HARDWARE._replace(both_listen=True)
    config = adapt(HOST)
    assert make_options(config, both, D, index=0, device=0, environ={})["llm.ListenIpInfo"]
    hixl = adapt(HOST | {"local_comm_res": '{"version":"1.3"}'})
    options = make_options(hixl, HARDWARE, D, index=0, device=0, environ={})
    assert options == {
        "llm.DeviceId": "0",
        "llm.SyncKvCacheWaitTime": "33064",
        "llm.LocalCommRes": '{"version":"1.3"}',
        "llm.TransferBackend": "hixl",
        "llm.ListenIpInfo": "10.0.0.5:0",
    }


# ---- build_worker ----


def vllm_config(extra: dict[str, Any], role: str = "kv_both", **model: Any) -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_role=role,
            is_kv_producer=role != "kv_consumer",
            is_kv_consumer=role != "kv_producer",
            kv_connector_extra_config=extra,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_size=4, data_parallel_rank=0
        ),
        model_config=SimpleNamespace(**model),
    )


def refusal(extra: dict[str, Any], role: str = "kv_both", **model: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build.build_worker(parse_config(extra), vllm_config(extra, role, **model), ())
    return str(caught.value)


def test_a_recipe_that_says_otherwise_than_vllm_is_refused() -> None:
    extra = {"prefill": {"tp_size": 2, "dp_size": 4}, "decode": {"tp_size": 2, "dp_size": 8}}
    assert refusal(extra) == "decode: dp_size is 8, this instance has 4; leave it out"
    assert refusal({"prefill": {"tp_size": 8}}) == "prefill: tp_size is 8, this instance has 2; leave it out"


def test_a_provider_that_is_not_here_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "is_npu", lambda: True)
    monkeypatch.setattr(_native, "LlmDataDist", lambda *_: (_ for _ in ()).throw(ValueError("no libllm_datadist.so")))
    assert refusal({"decode": {"tp_size": 8}}, "kv_producer") == "provider: 'auto': no libllm_datadist.so"


def test_sleep_mode_where_a_device_holds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "LlmDataDist", lambda *_: SimpleNamespace(capabilities=HARDWARE))
    assert refusal({}, enable_sleep_mode=True).startswith("--enable-sleep-mode: ")
    assert refusal({"verify": "fail"}, "kv_producer", enable_sleep_mode=False).startswith("verify: ")


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused(name: str) -> None:
    """Each rank would hold other tokens than its blocks say."""
    config = vllm_config({})
    setattr(config.parallel_config, name, 2)
    with pytest.raises(ConfigError, match=f"^{name}: 2; DataDistConnector supports 1$"):
        build.build_worker(parse_config({}), config, ())


@pytest.mark.parametrize("role", ["kv_both", "kv_producer"])
def test_links_that_cross_where_they_would_hang(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setattr(_native, "LlmDataDist", lambda *_: SimpleNamespace(capabilities=HARDWARE))
    extra = {} if role == "kv_both" else {"bidirectional": True}
    assert HARDWARE.crossing_links is False
    assert refusal(extra, role, enable_sleep_mode=False).startswith("kv_role: kv_both, and bidirectional, ")
