"""The options of LLMDataDist.init: what they imply for each other, and what the native engine is given of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from vllm_datadist_connector.llm_datadist.status import param_invalid
from vllm_datadist_connector.llm_datadist.utils import log
from vllm_datadist_connector.llm_datadist.utils.utils import check_isinstance, int_to_ip

CACHE_MANAGER: Final = "llm.EnableCacheManager"
REMOTE_ACCESSIBLE: Final = "llm.EnableRemoteCacheAccessible"
LOCAL_COMM_RES: Final = "llm.LocalCommRes"
TRANSFER_BACKEND: Final = "llm.TransferBackend"
LISTEN: Final = "llm.listenIpInfo"
SWITCH_ROLE: Final = "llm.EnableSwitchRole"
DEVICE_POOL: Final = "llm.MemPoolConfig"
HOST_POOL: Final = "llm.HostMemPoolConfig"
LINK_TOTAL_TIME: Final = "llm.LinkTotalTime"
CLUSTER_INFO: Final = "llm.ClusterInfo"
MEMORY_MAX: Final = "ge.flowGraphMemMaxSize"
_DEVICES: Final = "ge.exec.deviceId"
_NATIVE_DEVICE: Final = "llm.DeviceId"
_NATIVE_LISTEN: Final = "llm.ListenIpInfo"
_OWN_PREFIX: Final = "datadist."

_NATIVE_VERBATIM: Final = frozenset(
    {
        _NATIVE_DEVICE,
        _NATIVE_LISTEN,
        "llm.SyncKvCacheWaitTime",
        REMOTE_ACCESSIBLE,
        DEVICE_POOL,
        HOST_POOL,
        LOCAL_COMM_RES,
        TRANSFER_BACKEND,
        "llm.GlobalResourceConfig",
        "llm.RdmaTrafficClass",
        "llm.RdmaServiceLevel",
        LINK_TOTAL_TIME,
        "llm.LinkRetryCount",
    }
)

LEGACY_POOL_BYTES: Final = 1 << 30
"""Device pool of legacy mode when ge.flowGraphMemMaxSize does not say: pages are committed when they are first used."""


def complete(options: Mapping[str, str], role: str) -> dict[str, str]:
    """`options` with the defaults that some imply for others. LLMException (LLM_PARAM_INVALID): a contradiction."""
    completed = {**options, "llm.Role": role}
    if LOCAL_COMM_RES in options:
        if completed.setdefault(CACHE_MANAGER, "1") == "0":
            raise param_invalid(CACHE_MANAGER, "0", f"'1', or not set, with {LOCAL_COMM_RES}")
        completed.setdefault(REMOTE_ACCESSIBLE, "1")
    if completed.get(CACHE_MANAGER, "0") not in ("0", "1"):
        raise param_invalid(CACHE_MANAGER, completed[CACHE_MANAGER], "'0', '1'")
    if TRANSFER_BACKEND in options:
        _complete_for_backend(completed)
    if uses_cache_manager(completed) and LISTEN in completed:
        ip, port = split_listen_info(completed[LISTEN])
        completed.update({"llm.ListenIp": ip, "llm.ListenPort": str(port)})
    return completed


def _complete_for_backend(options: dict[str, str]) -> None:
    backend = f"with {TRANSFER_BACKEND} {options[TRANSFER_BACKEND]!r}"
    if not uses_cache_manager(options):
        raise param_invalid(CACHE_MANAGER, options.get(CACHE_MANAGER), f"'1' {backend}")
    if options.setdefault(REMOTE_ACCESSIBLE, "1") == "0":
        raise param_invalid(REMOTE_ACCESSIBLE, "0", f"'1', or not set, {backend}")
    if LISTEN not in options:
        raise param_invalid(LISTEN, None, f"'ip:port' {backend}")


def uses_cache_manager(options: Mapping[str, str]) -> bool:
    return options.get(CACHE_MANAGER) == "1"


def check_memory_max(options: Mapping[str, Any]) -> None:
    """TypeError unless ge.flowGraphMemMaxSize is a text, LLMException (LLM_PARAM_INVALID) unless it is one number."""
    if MEMORY_MAX not in options:
        return
    value = options[MEMORY_MAX]
    check_isinstance(MEMORY_MAX, value, str, allow_none=False)
    if not (value.isascii() and value.isdigit()):
        raise param_invalid(MEMORY_MAX, value, "one number of bytes, decimal digits")


def split_listen_info(listen: str) -> tuple[str, int]:
    """The ip and the port of "ip:port".

    LLMException (LLM_PARAM_INVALID) unless it has two parts, ValueError unless the second is a number.
    """
    parts = listen.split(":")
    if len(parts) != 2:
        raise param_invalid(LISTEN, listen, "'ip:port', IPv4")
    try:
        return parts[0], int(parts[1])
    except ValueError:
        raise ValueError(f"{LISTEN}: port {parts[1]!r} of {listen!r} is not a number") from None


def device_count(options: Mapping[str, str]) -> int:
    """How many devices ge.exec.deviceId names, one at least."""
    return len(options.get(_DEVICES, "").split(";"))


def native_options(options: Mapping[str, str]) -> dict[str, str]:
    """The native engine's option map for completed options of cache-manager mode: its keys, and `datadist.*`.

    The engine works for one device: of several ids it gets the first.
    """
    native = {key: value for key, value in options.items() if key in _NATIVE_VERBATIM or key.startswith(_OWN_PREFIX)}
    if _DEVICES in options:
        native[_NATIVE_DEVICE] = options[_DEVICES].split(";")[0]
    if LISTEN in options:
        native[_NATIVE_LISTEN] = options[LISTEN]
    return native


def native_legacy_options(options: Mapping[str, str], listens: bool) -> dict[str, str]:
    """As native_options, for legacy mode: two-sided, with a device pool, where a prompt may listen as its cluster info
    says."""
    if options.get(REMOTE_ACCESSIBLE) == "1":
        log.warn("%s '1' has no effect without %s '1'", REMOTE_ACCESSIBLE, CACHE_MANAGER)
    native = native_options(options)
    native[REMOTE_ACCESSIBLE] = "0"
    if not native.get(DEVICE_POOL):
        native[DEVICE_POOL] = json.dumps({"memory_size": int(options.get(MEMORY_MAX, LEGACY_POOL_BYTES))})
    if listens and _NATIVE_LISTEN not in native:
        for address in _cluster_listen_addresses(options)[:1]:
            native[_NATIVE_LISTEN] = address
    return native


def _cluster_listen_addresses(options: Mapping[str, str]) -> list[str]:
    try:
        listens = json.loads(options.get(CLUSTER_INFO, "{}")).get("listen_ip_info", [])
        return [f"{int_to_ip(int(listen['ip']))}:{int(listen['port'])}" for listen in listens]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        allowed = f"JSON whose listen_ip_info is a list of {{ip: number, port: number}} ({error!r})"
        raise param_invalid(CLUSTER_INFO, options[CLUSTER_INFO], allowed) from None
