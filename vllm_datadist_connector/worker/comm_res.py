"""local_comm_res: an NPU's place in the network, for CANN.

Best left to CANN, which makes it from `host` and the machine's files. What a user gives in its place is checked here:
whatever is wrong with it, the library says no more than PARAM_INVALID.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from vllm_datadist_connector.config import ConfigError, ConnectorConfig

MAX_BYTES: Final = 64 << 10
"""The library takes no longer text."""

_VARIABLE, _VISIBLE = "ASCEND_LOCAL_COMM_RES", "ASCEND_RT_VISIBLE_DEVICES"
_HIXL: Final = "hixl"
_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Number = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}$")]


class CommRes(NamedTuple):
    text: str
    """For option llm.LocalCommRes; empty: the library finds it out."""
    backend: str
    """For option llm.TransferBackend; empty: the library's default. Over hixl each link reads in one direction only, so
    that both sides listen."""


class _Device(msgspec.Struct):
    device_id: _Number
    device_ip: _Text
    device_port: _Number = "0"


class _SuperDevice(_Device, kw_only=True):
    super_device_id: _Number


class _Server(msgspec.Struct):
    server_id: _Text
    device: Annotated[list[_Device], msgspec.Meta(min_length=1, max_length=1)]


class _SuperServer(msgspec.Struct):
    server_id: _Text
    device: Annotated[list[_SuperDevice], msgspec.Meta(min_length=1, max_length=1)]


class _Member(msgspec.Struct):
    server_id: _Text


class _SuperPod(msgspec.Struct):
    super_pod_id: _Text
    server_list: Annotated[list[_Member], msgspec.Meta(min_length=1, max_length=1)]


class _Table10(msgspec.Struct, tag_field="version", tag="1.0"):
    """A2."""

    status: Literal["completed"]
    server_list: Annotated[list[_Server], msgspec.Meta(min_length=1, max_length=1)]


class _Table12(msgspec.Struct, tag_field="version", tag="1.2"):
    """A3. The parser needs super_device_id, although an example of the documentation leaves it out."""

    status: Literal["completed"]
    server_list: Annotated[list[_SuperServer], msgspec.Meta(min_length=1, max_length=1)]
    super_pod_list: Annotated[list[_SuperPod], msgspec.Meta(min_length=1, max_length=1)]


class _Endpoint(msgspec.Struct):
    protocol: Literal["roce", "ub_ctp"]
    comm_id: _Text
    placement: Literal["host", "device"]
    plane: str = ""
    dst_eid: str = ""


class _Table13(msgspec.Struct, tag_field="version", tag="1.3"):
    """A5."""

    net_instance_id: str = ""
    endpoint_list: list[_Endpoint] = []


_DECODER = msgspec.json.Decoder(_Table10 | _Table12 | _Table13)


def physical_id(device: int, environ: Mapping[str, str] = os.environ) -> int:
    """Of the NPU that this process calls `device`: tables and files name NPUs as the machine does.

    Raises:
        ConfigError: the environment's list does not say.
    """
    visible = environ.get(_VISIBLE, "")
    if not visible.strip():
        return device
    ids = [each.strip() for each in visible.split(",")]
    if device >= len(ids) or not ids[device].isdecimal():
        raise ConfigError(f"environment variable {_VISIBLE}: {visible!r} does not say which NPU {device} is")
    return int(ids[device])


def find_comm_res(config: ConnectorConfig, device: int, environ: Mapping[str, str] = os.environ) -> CommRes:
    """What a user has said of the NPU that this process calls `device`.

    Raises:
        ConfigError: names the source and the field.
    """
    physical = physical_id(device, environ)
    if config.ascend_local_comm_res_path:
        path = Path(config.ascend_local_comm_res_path) / f"ub_endpoint_npu_{physical}.json"
        source, text = f"ascend_local_comm_res_path: {path}", _read("ascend_local_comm_res_path", path)
    elif config.local_comm_res.lstrip().startswith("{"):
        source, text = "local_comm_res", config.local_comm_res
    elif config.local_comm_res:
        path = Path(config.local_comm_res.replace("{device}", str(physical)))
        source, text = f"local_comm_res: {path}", _read("local_comm_res", path)
    else:
        source, text = f"environment variable {_VARIABLE}", environ.get(_VARIABLE, "")
    return CommRes(text, _check(source, text, physical)) if text else CommRes("", "")


def _read(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _check(source: str, text: str, physical: int) -> str:
    """The backend that the text needs."""
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{source}: {len(text.encode())} bytes, allowed: {MAX_BYTES}")
    try:
        table = _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source}: {error}") from None
    if isinstance(table, _Table13):
        return _HIXL
    (server,) = table.server_list
    (device,) = server.device
    _check_ip(source, "server_list[0].server_id", server.server_id)
    _check_ip(source, "server_list[0].device[0].device_ip", device.device_ip)
    if int(device.device_id) != physical:
        raise ConfigError(
            f"{source}: server_list[0].device[0].device_id is {device.device_id!r}, this rank's NPU is {physical} (the"
            f" physical id: that at its place in {_VISIBLE})"
        )
    if isinstance(table, _Table12):
        (pod,) = table.super_pod_list
        (member,) = pod.server_list
        if member.server_id != server.server_id:
            raise ConfigError(
                f"{source}: super_pod_list[0].server_list[0].server_id is {member.server_id!r}, that of server_list"
                f" {server.server_id!r}"
            )
    return ""


def _check_ip(source: str, field: str, value: str) -> None:
    try:
        ipaddress.IPv4Address(value)
    except ValueError:
        raise ConfigError(f"{source}: {field} is {value!r}, not an IPv4 address") from None
