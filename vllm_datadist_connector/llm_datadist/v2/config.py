"""LLMConfig: the options of LLMDataDist.init as properties."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast, overload

from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_dict,
    check_int32,
    check_isinstance,
    check_list_element,
    check_uint32,
    ip_to_int,
)

T = TypeVar("T")
Check = Callable[[str, Any], None]
Emitted = Iterable[tuple[str, str]]


class _Option(Generic[T]):
    """A read/write property of LLMConfig: its default, its check and the option keys that it becomes once it is set.

    None is accepted where the check accepts it, and emits nothing.
    """

    def __init__(self, default: T, check: Check, emit: Callable[[Any], Emitted], doc: str) -> None:
        self.default = default
        self.emit = emit
        self._check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, config: None, owner: type) -> _Option[T]: ...
    @overload
    def __get__(self, config: LLMConfig, owner: type) -> T: ...
    def __get__(self, config: LLMConfig | None, owner: type) -> T | _Option[T]:
        if config is None:
            return self
        return cast("T", config._values.get(self.name, self.default))

    def __set__(self, config: LLMConfig, value: T) -> None:
        self._check(self.name, value)
        config._values[self.name] = value


def _is(types: type | tuple[type, ...]) -> Check:
    return lambda name, value: check_isinstance(name, value, types)


def _check_ge_options(name: str, value: Any) -> None:
    check_dict(name, value, str, str)


def _check_device_id(name: str, value: Any) -> None:
    check_isinstance(name, value, (int, list, tuple))
    if isinstance(value, (list, tuple)):
        check_list_element(name, value, int)
        if not value:
            raise param_invalid(name, value, "at least one device id")
    for device_id in _device_ids(value):
        if device_id < 0:
            raise param_invalid(name, value, "device ids of 0 or above")
        check_int32(name, device_id)


def _check_sync_kv_timeout(name: str, value: Any) -> None:
    check_isinstance(name, value, (int, str))
    if value is None:
        return
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise param_invalid(name, value, "decimal digits (milliseconds)")
    if int(value) <= 0:
        raise param_invalid(name, value, "milliseconds above 0")
    check_int32(name, int(value))


def _check_retry_count(name: str, value: Any) -> None:
    check_isinstance(name, value, int, allow_none=False)
    if not 1 <= value <= 100:
        raise param_invalid(name, value, "[1, 100]")


def _check_utilization(name: str, value: Any) -> None:
    check_isinstance(name, value, float, allow_none=False)
    if not 0.0 <= value <= 1.0:
        raise param_invalid(name, value, "[0.0, 1.0]")


def _check_cluster_info(name: str, value: Any) -> None:
    check_isinstance(name, value, str)
    if value:
        _cluster_info_with_int_ips(name, value)


def _check_backend(name: str, value: Any) -> None:
    """An empty text counts as one that init refuses: that it was given says something by itself."""
    check_isinstance(name, value, str)
    if value not in (None, "", "hixl"):
        raise param_invalid(name, value, "'hixl', or do not set it")


def _device_ids(value: int | Sequence[int] | None) -> Sequence[int]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value


def _cluster_info_with_int_ips(name: str, text: str) -> str:
    try:
        info = json.loads(text)
    except ValueError as error:
        raise param_invalid(name, text, f"a JSON object ({error})") from None
    listen_infos = info.get("listen_ip_info", []) if isinstance(info, dict) else None
    if not isinstance(listen_infos, list) or not all(isinstance(listen, dict) for listen in listen_infos):
        raise param_invalid(name, text, "a JSON object whose listen_ip_info, if any, is a list of objects")
    for listen in listen_infos:
        if isinstance(listen.get("ip"), str):
            listen["ip"] = ip_to_int(listen["ip"])
    return json.dumps(info)


def _emit_devices(value: int | Sequence[int]) -> Emitted:
    ids = _device_ids(value)
    return [
        ("ge.exec.deviceId", ";".join(str(int(device_id)) for device_id in ids)),
        ("ge.session_device_id", str(int(ids[0]))),
    ]


def _emit_given(key: str) -> Callable[[object], Emitted]:
    """Even an empty text: that it was given says something by itself. True is the number 1, not a text."""
    return lambda value: [(key, str(int(value) if isinstance(value, int) else value))]


def _emit_text(key: str) -> Callable[[str], Emitted]:
    return lambda value: [(key, value)] if value else []


def _emit_flag(key: str) -> Callable[[bool], Emitted]:
    return lambda value: [(key, "1" if value else "0")]


class LLMConfig:
    """Options of LLMDataDist.init, checked when they are set (LLM-DataDist Python: LLMConfig, LlmConfig).

    Wrong types raise TypeError, integers beyond their width ValueError, other values LLMException (LLM_PARAM_INVALID).
    `ge_options` go in verbatim and first: that is the place of options without a property, ours (`datadist.*`) too.
    """

    ge_options = _Option[dict[str, str]]({}, _check_ge_options, lambda value: value.items(), "Options taken verbatim.")
    device_id = _Option[int | list[int] | tuple[int, ...] | None](
        None, _check_device_id, _emit_devices, "Device id or ids, each 0 or above. One is mandatory for init."
    )
    sync_kv_timeout = _Option[int | str | None](
        None,
        _check_sync_kv_timeout,
        _emit_given("llm.SyncKvCacheWaitTime"),
        "Timeout of a pull or push in ms, above 0.",
    )
    deploy_res_path = _Option("", _is(str), _emit_text("llm.deployResPath"), "Without effect here.")
    listen_ip_info = _Option("", _is(str), _emit_text("llm.listenIpInfo"), "'ip:port' to listen on; makes a server.")
    buf_pool_cfg = _Option("", _is(str), _emit_text("llm.BufPoolCfg"), "Without effect here.")
    mem_pool_cfg = _Option(
        "",
        _is(str),
        _emit_text("llm.MemPoolConfig"),
        "Device pool, JSON: memory_size in bytes, page_shift 10..30 (16).",
    )
    host_mem_pool_cfg = _Option("", _is(str), _emit_text("llm.HostMemPoolConfig"), "Host pool, JSON as mem_pool_cfg.")
    enable_cache_manager = _Option(False, _is(bool), _emit_flag("llm.EnableCacheManager"), "Use CacheManager.")
    enable_remote_cache_accessible = _Option(
        False, _is(bool), _emit_flag("llm.EnableRemoteCacheAccessible"), "One-sided transfers; both ends must agree."
    )
    link_total_time = _Option(
        0, check_uint32, _emit_given("llm.LinkTotalTime"), "Seconds link() may take; 0: HCCL_CONNECT_TIMEOUT, else 120."
    )
    link_retry_count = _Option(
        1, _check_retry_count, _emit_given("llm.LinkRetryCount"), "[1, 100]; link() tries for link_total_time."
    )
    rdma_traffic_class = _Option[int | None](
        None, check_uint32, _emit_given("llm.RdmaTrafficClass"), "Accepted; nothing here uses RDMA."
    )
    rdma_service_level = _Option[int | None](
        None, check_uint32, _emit_given("llm.RdmaServiceLevel"), "Accepted; nothing here uses RDMA."
    )
    local_comm_res = _Option(
        "", _is(str), _emit_given("llm.LocalCommRes"), "JSON of the local device, may be empty: turns CacheManager on."
    )
    transfer_backend = _Option("", _check_backend, _emit_given("llm.TransferBackend"), "'hixl', or do not set it.")
    global_resource_config = _Option("", _is(str), _emit_given("llm.GlobalResourceConfig"), "JSON, backend hixl only.")
    cluster_info = _Option(
        "",
        _check_cluster_info,
        lambda value: [("llm.ClusterInfo", _cluster_info_with_int_ips("cluster_info", value))] if value else [],
        "JSON of a legacy cluster; its listen_ip_info[*].ip may be texts.",
    )
    output_max_size = _Option[int | None](None, _is(int), _emit_given("llm.OutputMaxSize"), "Without effect here.")
    enable_switch_role = _Option(
        False,
        _is(bool),
        lambda value: [("llm.EnableSwitchRole", "1")] if value else [],
        "Needed by a legacy switch_role.",
    )
    mem_utilization = _Option(
        0.95, _check_utilization, _emit_given("llm.MemoryUtilization"), "[0.0, 1.0]; without effect here."
    )

    def __init__(self) -> None:
        self._values: dict[str, object] = {}
        self._options: dict[str, str] = {}
        self._emitted: set[str] = set()
        self.ge_options = {}
        self.mem_utilization = 0.95

    def __setattr__(self, name: str, value: object) -> None:
        """Where an unknown name were taken, a slip of the pen would leave the option at its default."""
        if not name.startswith("_") and not isinstance(getattr(type(self), name, None), _Option):
            options = [known for known, option in vars(type(self)).items() if isinstance(option, _Option)]
            close = ", ".join(difflib.get_close_matches(name, options))
            hint = f"; did you mean {close}?" if close else f", allowed: {', '.join(options)}"
            raise AttributeError(f"{type(self).__name__} has no option {name!r}{hint}")
        super().__setattr__(name, value)

    def generate_options(self) -> dict[str, str]:
        """The options for LLMDataDist.init. Always the same dict: what was added to it by hand stays in it."""
        emitted: dict[str, str] = {}
        for name, option in vars(type(self)).items():
            if isinstance(option, _Option) and self._values.get(name) is not None:
                emitted.update(option.emit(self._values[name]))
        for key in self._emitted - emitted.keys():
            self._options.pop(key, None)
        self._options.update(emitted)
        self._emitted = set(emitted)
        return self._options

    def gen_options(self) -> dict[str, str]:
        """generate_options() under its older name."""
        return self.generate_options()


LlmConfig = LLMConfig
