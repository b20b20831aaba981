"""Rank tables: who the members are, where they listen, and what is wrong with a bad one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_datadist_connector.llm_datadist import LLMException, LLMStatusCode
from vllm_datadist_connector.llm_datadist.v2.rank_table import link_total_time_s, members_of


def table(*devices: dict[str, Any]) -> str:
    """One server per device."""
    servers = [{"server_id": f"10.0.0.{index}", "device": [device]} for index, device in enumerate(devices)]
    return json.dumps({"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers})


def device(rank: object, ip: str | None = "10.0.0.1", **more: object) -> dict[str, Any]:
    fields: dict[str, Any] = {"device_id": "0", "rank_id": rank, "device_ip": ip, **more}
    return {name: value for name, value in fields.items() if value is not None}


def test_members_in_the_caller_s_order() -> None:
    text = table(device("1", "10.0.0.2", device_id="3"), device("0", "::1", device_port="17000"), device("9"))
    assert members_of(text, {70: 0, 5: 1}) == [(70, 0, "::1", 17000), (5, 1, "10.0.0.2", 16669)]


def test_numbers_may_be_numbers() -> None:
    assert members_of(table(device(0, device_id=2), device(1, device_port=5)), {1: 0, 2: 1}) == [
        (1, 0, "10.0.0.1", 16668),
        (2, 1, "10.0.0.1", 5),
    ]


def test_several_devices_of_a_server() -> None:
    text = json.dumps({"server_list": [{"device": [device("0"), device("1", device_id="1")]}]})
    assert [member.port for member in members_of(text, {1: 0, 2: 1})] == [16666, 16667]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "mock",
        '{"server_list": []}',
        '{"server_list": [{}]}',
        table(device("0", None), device("1", None)),
        table(device("0", ""), device("1", "")),
    ],
)
def test_no_addresses_is_a_loopback(text: str) -> None:
    assert members_of(text, {1: 0, 2: 1}) == [(1, 0, "", 0), (2, 1, "", 0)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (table(device("0"), device("1", None)), "rank 1 has no device_ip"),
        (table(device("0"), device("2")), r"rank 1 of cluster 2 is not in it, it has ranks \[0, 2\]"),
        (table(device("0"), device("0")), r"server_list\[1\].device\[0\].rank_id: 0 is there already"),
        (table(device("0"), device("one")), r"server_list\[1\].device\[0\].rank_id: 'one', allowed: a number in \[0"),
        (table(device("0"), device(None)), r"rank_id: None, allowed"),
        (table(device("0"), device(True)), r"rank_id: True, allowed"),
        (table(device("0"), device("9" * 5000)), r"rank_id: .*allowed"),
        (table(device("0"), device("1", "host")), r"device_ip: 'host', allowed: an IP address"),
        (table(device("0"), device("1", 7)), r"device_ip: 7, allowed: an IP address"),  # type: ignore[arg-type]
        (table(device("0"), device("1", device_port="0")), r"device_port: '0', allowed: a number in \[1, 65535\]"),
        (table(device("0"), device("1", device_port="65536")), "device_port: '65536'"),
        (table(device("0"), device("1", device_id="x")), "device_id: 'x'"),
        (table(device("0"), device("1", device_id="48870")), "device_id: '48870'"),
        ('{"server_list": [', "not JSON: "),
        ('{"server_list": {}}', "server_list: {}, allowed: a list"),
        ('{"server_list": [1]}', r"server_list\[0\]: 1, allowed: an object with a list `device`"),
        ('{"server_list": [{"device": 1}]}', r"server_list\[0\]: .*a list `device`"),
        ('{"server_list": [{"device": [1]}]}', r"server_list\[0\].device\[0\]: 1, allowed: an object"),
        ('{"server_list": ' + "[" * 100000, "not JSON: "),
    ],
)
def test_bad_tables(text: str, problem: str) -> None:
    with pytest.raises(LLMException, match=f"^rank_table: .*{problem}") as caught:
        members_of(text, {1: 0, 2: 1})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    assert link_total_time_s(0) == 120
    assert link_total_time_s(7) == 7
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "300")
    assert link_total_time_s(0) == 300
    assert link_total_time_s(7) == 7


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "soon"])
def test_total_time_of_a_bad_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", text)
    with pytest.raises(LLMException, match=r"HCCL_CONNECT_TIMEOUT: .*allowed: seconds") as caught:
        link_total_time_s(0)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert link_total_time_s(9) == 9
