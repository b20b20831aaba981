"""Rank tables: who takes part in a bilateral link, and where each listens.

The form is HCCL's rank table 1.0:

    {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [
      {"server_id": "node_0", "device": [
        {"device_id": "0", "device_ip": "10.0.0.1", "rank_id": "0", "device_port": "17000"}]}]}

`device_ip` is where that rank listens for its peers and `device_port` its port; without one it is 16666 plus the
device id, so that the ranks of one host differ. A `server_id` only names a host, even if it looks like an address. A
table in which no device has an address makes every other member a loopback peer: a peer in this very process, whose
caches are our own. The same goes for a text without a server_list, such as "" or "{}".
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from vllm_datadist_connector.llm_datadist.status import LLMException, LLMStatusCode, failure, param_invalid

DEFAULT_PORT_BASE: Final = 16666
DEFAULT_TOTAL_TIME_S: Final = 120
_CONNECT_TIMEOUT_ENV: Final = "HCCL_CONNECT_TIMEOUT"
_MAX_UINT32: Final = 2**32 - 1
_MAX_DIGITS: Final = 20  # int() refuses texts of thousands of digits in a way of its own


class Member(NamedTuple):
    """One member of a link; `ip` "" and `port` 0 without an address."""

    cluster_id: int
    rank: int
    ip: str
    port: int


class _Address(NamedTuple):
    ip: str
    port: int


def members_of(rank_table: str, cluster_ranks: Mapping[int, int]) -> list[Member]:
    """The members of a link in the order of `cluster_ranks`. LLMException (LLM_PARAM_INVALID) for a bad table."""
    addresses = _addresses(rank_table)
    if not any(address.ip for address in addresses.values()):
        return [Member(cluster_id, rank, "", 0) for cluster_id, rank in cluster_ranks.items()]
    for cluster_id, rank in cluster_ranks.items():
        if rank not in addresses:
            raise _bad_table(f"rank {rank} of cluster {cluster_id} is not in it, it has ranks {sorted(addresses)}")
        if not addresses[rank].ip:
            raise _bad_table(f"rank {rank} has no device_ip, others have: either all of them or none")
    return [Member(cluster_id, rank, *addresses[rank]) for cluster_id, rank in cluster_ranks.items()]


def link_total_time_s(configured: int) -> int:
    """How long a bilateral link may take to come up: `configured`, or for 0 what the environment or the API says."""
    if configured:
        return configured
    text = os.environ.get(_CONNECT_TIMEOUT_ENV)
    if text is None:
        return DEFAULT_TOTAL_TIME_S
    seconds = _to_int(text)
    if seconds is None or not 1 <= seconds <= _MAX_UINT32:
        raise param_invalid(f"environment variable {_CONNECT_TIMEOUT_ENV}", text, "seconds, 1 or more")
    return seconds


def _bad_table(problem: str) -> LLMException:
    return failure(LLMStatusCode.LLM_PARAM_INVALID, f"rank_table: {problem}")


def _to_int(value: object) -> int | None:
    """Tables write numbers as texts; plain numbers are taken as well."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    plausible = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS
    return int(str(value)) if plausible else None


def _number(device: Mapping[str, Any], field: str, where: str, lowest: int, highest: int) -> int:
    number = _to_int(device.get(field))
    if number is None or not lowest <= number <= highest:
        raise _bad_table(f"{where}.{field}: {device.get(field)!r}, allowed: a number in [{lowest}, {highest}]")
    return number


def _addresses(rank_table: str) -> dict[int, _Address]:
    addresses: dict[int, _Address] = {}
    for where, device in _devices(rank_table):
        rank = _number(device, "rank_id", where, 0, _MAX_UINT32)
        if rank in addresses:
            raise _bad_table(f"{where}.rank_id: {rank} is there already, ranks are unique")
        addresses[rank] = _address(device, where)
    return addresses


def _address(device: Mapping[str, Any], where: str) -> _Address:
    ip = device.get("device_ip", "")
    if ip == "":
        return _Address("", 0)
    if not isinstance(ip, str) or not _is_ip(ip):
        raise _bad_table(f"{where}.device_ip: {ip!r}, allowed: an IP address")
    if "device_port" in device:
        return _Address(ip, _number(device, "device_port", where, 1, 65535))
    return _Address(ip, DEFAULT_PORT_BASE + _number(device, "device_id", where, 0, 65535 - DEFAULT_PORT_BASE))


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _devices(rank_table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for server_index, server in enumerate(_servers(rank_table)):
        devices = server.get("device", []) if isinstance(server, dict) else None
        if not isinstance(devices, list):
            raise _bad_table(f"server_list[{server_index}]: {server!r}, allowed: an object with a list `device`")
        for device_index, device in enumerate(devices):
            where = f"server_list[{server_index}].device[{device_index}]"
            if not isinstance(device, dict):
                raise _bad_table(f"{where}: {device!r}, allowed: an object")
            yield where, device


def _servers(rank_table: str) -> list[Any]:
    try:
        table = json.loads(rank_table)
    except (ValueError, RecursionError) as error:
        if "server_list" in rank_table:  # meant to be a table: a slip in it must not end in a silent loopback
            raise _bad_table(f"not JSON: {error}") from None
        return []
    servers = table.get("server_list", []) if isinstance(table, dict) else []
    if not isinstance(servers, list):
        raise _bad_table(f"server_list: {servers!r}, allowed: a list")
    return servers
