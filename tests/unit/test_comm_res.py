"""local_comm_res: what CANN would refuse without saying why."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_datadist_connector.config import ConfigError, parse_config
from vllm_datadist_connector.worker.comm_res import CommRes, find_comm_res, physical_id

A2: dict[str, Any] = {
    "version": "1.0",
    "status": "completed",
    "server_list": [{"server_id": "10.0.0.5", "device": [{"device_id": "5", "device_ip": "192.168.1.10"}]}],
}
A3: dict[str, Any] = {
    "version": "1.2",
    "status": "completed",
    "server_list": [
        {"server_id": "10.0.0.5", "device": [{"device_id": "5", "super_device_id": "9", "device_ip": "192.168.1.10"}]}
    ],
    "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.5"}]}],
}
A5: dict[str, Any] = {
    "version": "1.3",
    "net_instance_id": "az0",
    "endpoint_list": [{"protocol": "ub_ctp", "comm_id": "000:1", "placement": "device", "plane": "p0"}],
}
VISIBLE = {"ASCEND_RT_VISIBLE_DEVICES": "4, 5"}
"""Device 1 of this process is 5 of the machine."""


def find(given: str, **environ: str) -> CommRes:
    return find_comm_res(parse_config({"local_comm_res": given}), 1, VISIBLE | environ)


@pytest.mark.parametrize(("table", "backend"), [(A2, ""), (A3, ""), (A5, "hixl"), ({"version": "1.3"}, "hixl")])
def test_taken_as_it_is(table: dict[str, Any], backend: str, tmp_path: Path) -> None:
    text = json.dumps(table)
    assert find(text) == CommRes(text, backend)
    (tmp_path / "npu_5.json").write_text(text)
    assert find(f"{tmp_path}/npu_{{device}}.json") == CommRes(text, backend)
    (tmp_path / "ub_endpoint_npu_5.json").write_text(text)
    folder = parse_config({"ascend_local_comm_res_path": str(tmp_path)})
    assert find_comm_res(folder, 1, VISIBLE) == CommRes(text, backend)
    assert find("", ASCEND_LOCAL_COMM_RES=text) == CommRes(text, backend)


def test_nothing_by_default() -> None:
    assert find("") == CommRes("", "")


def changed(table: dict[str, Any], path: str, value: Any) -> str:
    """`value` in place of what is at a.0.b; None takes it away."""
    copied = copy.deepcopy(table)
    *steps, last = (int(each) if each.isdecimal() else each for each in path.split("."))
    place: Any = copied
    for step in steps:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(copied)


DEVICE = "server_list.0.device.0"
WRONG: list[tuple[dict[str, Any], str, Any, str]] = [
    (A2, "version", "2.0", "Invalid value '2.0' - at `$.version`"),
    (A2, "version", None, "missing required field `version`"),
    (A2, "status", "initializing", "$.status"),
    (A2, "server_list", [], "$.server_list"),
    (A2, "server_list", A2["server_list"] * 2, "$.server_list"),
    (A2, "server_list.0.server_id", "node-1", "server_list[0].server_id is 'node-1', not an IPv4 address"),
    (A2, "server_list.0.device", A2["server_list"][0]["device"] * 2, "$.server_list[0].device"),
    (A2, f"{DEVICE}.device_id", 5, "Expected `str`, got `int` - at `$.server_list[0].device[0].device_id`"),
    (A2, f"{DEVICE}.device_id", "x", "$.server_list[0].device[0].device_id"),
    (A2, f"{DEVICE}.device_id", "1", "server_list[0].device[0].device_id is '1', this rank's NPU is 5"),
    (A2, f"{DEVICE}.device_ip", None, "missing required field `device_ip`"),
    (A2, f"{DEVICE}.device_ip", "fe80::1", "server_list[0].device[0].device_ip is 'fe80::1', not an IPv4 address"),
    (A2, f"{DEVICE}.device_port", 5, "device_port"),
    (A3, f"{DEVICE}.super_device_id", None, "missing required field `super_device_id`"),
    (A3, "super_pod_list", None, "missing required field `super_pod_list`"),
    (A3, "super_pod_list.0.super_pod_id", "", "super_pod_id"),
    (A3, "super_pod_list.0.server_list.0.server_id", "10.0.0.6", "server_id is '10.0.0.6', that of server_list"),
    (A5, "endpoint_list.0.protocol", "tcp", "$.endpoint_list[0].protocol"),
    (A5, "endpoint_list.0.placement", None, "missing required field `placement`"),
    (A5, "endpoint_list.0.comm_id", "", "$.endpoint_list[0].comm_id"),
]


@pytest.mark.parametrize(("table", "path", "value", "told"), WRONG, ids=[f"{w[0]['version']} {w[1]}" for w in WRONG])
def test_what_is_wrong_is_named(table: dict[str, Any], path: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^local_comm_res: .*{re.escape(told)}"):
        find(changed(table, path, value))


def test_what_is_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^local_comm_res: JSON is malformed"):
        find("{version: 1.0")
    with pytest.raises(ConfigError, match=r"^local_comm_res: .*npu_5.json"):
        find(f"{tmp_path}/npu_{{device}}.json")
    with pytest.raises(ConfigError, match=r"^environment variable ASCEND_LOCAL_COMM_RES: "):
        find("", ASCEND_LOCAL_COMM_RES="[]")
    (tmp_path / "large").write_text(json.dumps(A2) + " " * 65536)
    with pytest.raises(ConfigError, match=r"large: \d+ bytes, allowed: 65536"):
        find(f"{tmp_path}/large")


def test_ids_of_this_process_and_of_the_machine() -> None:
    assert physical_id(3, {}) == 3
    assert physical_id(3, {"ASCEND_RT_VISIBLE_DEVICES": " "}) == 3
    assert physical_id(1, {"ASCEND_RT_VISIBLE_DEVICES": "7,2"}) == 2
    for visible in ("7", "7,x", "7,"):
        with pytest.raises(ConfigError, match=r"^environment variable ASCEND_RT_VISIBLE_DEVICES: "):
            physical_id(1, {"ASCEND_RT_VISIBLE_DEVICES": visible})
