"""Arguments and results of LLM-DataDist's Python API as JSON, for a process that makes the calls for a test."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

from vllm_datadist_connector import llm_datadist as api

Decoders = Mapping[str, Callable[..., Any]]

_FIELDS: dict[type, tuple[str, ...]] = {
    range: ("start", "stop", "step"),
    api.CacheKey: ("cluster_id", "req_id", "model_id", "prefix_id"),
    api.BlocksCacheKey: ("cluster_id", "model_id"),
    api.CacheKeyByIdAndIndex: ("cluster_id", "cache_id", "batch_index"),
    api.TransferConfig: ("dst_cluster_id", "dst_addrs", "src_layer_range", "src_batch_index"),
    api.TransferWithCacheKeyConfig: ("cache_key", "src_layer_range", "dst_layer_range", "src_batch_index"),
    api.LLMClusterInfo: ("remote_cluster_id", "remote_ip_info_list", "local_ip_info_list"),
}
_ENUMS: tuple[type[enum.Enum], ...] = (api.LLMRole, api.LLMStatusCode, api.RegisterMemStatus, api.Placement)
_ERRORS: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, AttributeError)

Address = tuple[str, int]


def cluster_info(remote_cluster_id: int, remotes: list[Address], locals_: list[Address]) -> api.LLMClusterInfo:
    info = api.LLMClusterInfo()
    info.remote_cluster_id = remote_cluster_id
    for address in remotes:
        info.append_remote_ip_info(*address)
    for address in locals_:
        info.append_local_ip_info(*address)
    return info


_DECODERS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in _FIELDS},
    **{kind.__name__: kind.__getitem__ for kind in _ENUMS},
    "tuple": lambda *items: items,
    "dict": lambda *items: dict(items),
    "LLMClusterInfo": cluster_info,
}


def encode(value: Any) -> Any:
    """Objects become {type: [what makes them again]}."""
    for kind in _ENUMS:
        if isinstance(value, kind):
            return {kind.__name__: [value.name]}
    if type(value) in _FIELDS:
        fields = _FIELDS[type(value)]
        return {type(value).__name__: [encode(getattr(value, field)) for field in fields]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [encode(item) for item in value.items()]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if hasattr(value, "encoded"):
        return value.encoded()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{value!r} has no form that another process would understand")


def decode(encoded: Any, own: Decoders | None = None) -> Any:
    """`own`: what makes the objects that only the process at this end knows."""
    if isinstance(encoded, list):
        return [decode(item, own) for item in encoded]
    if isinstance(encoded, dict):
        ((kind, items),) = encoded.items()
        return {**_DECODERS, **(own or {})}[kind](*(decode(item, own) for item in items))
    return encoded


def encode_error(error: Exception) -> dict[str, Any]:
    status = int(error.status_code) if isinstance(error, api.LLMException) else None
    kinds = [kind.__name__ for kind in _ERRORS if isinstance(error, kind)]
    return {"kind": kinds[0] if kinds else "RuntimeError", "status": status, "text": str(error)}


def raise_error(encoded: Mapping[str, Any]) -> None:
    """The error of the other end, here."""
    if encoded["status"] is not None:
        raise api.LLMException(encoded["text"], status_code=api.LLMStatusCode(encoded["status"]))
    raise next(kind for kind in _ERRORS if kind.__name__ == encoded["kind"])(encoded["text"])
