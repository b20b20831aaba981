"""Arguments and results of link calls, between what a caller passes and what the engine takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.configs import LLMClusterInfo
from vllm_datadist_connector.llm_datadist.status import LLMStatusCode, param_invalid, to_status_code
from vllm_datadist_connector.llm_datadist.utils import log
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_dict,
    check_int32,
    check_isinstance,
    check_list_element,
    check_uint32,
    check_uint64,
    int_to_ip,
)

_MAX_COMM_NAME: Final = 127
_COMM_MEMBERS: Final = range(2, 5)


def native_clusters(clusters: Sequence[LLMClusterInfo], timeout: int) -> list[_native.ClusterInfo]:
    """The engine's form of the clusters of a link or unlink call, checked together with its timeout."""
    check_list_element("clusters", clusters, LLMClusterInfo, allow_none=False)
    check_int32("timeout", timeout)
    if timeout <= 0:
        raise param_invalid("timeout", timeout, "milliseconds above 0")
    return [_native_cluster(f"clusters[{index}]", cluster) for index, cluster in enumerate(clusters)]


def _native_cluster(name: str, cluster: LLMClusterInfo) -> _native.ClusterInfo:
    remote_cluster_id = cluster.remote_cluster_id
    if remote_cluster_id is None:
        raise TypeError(f"{name}.remote_cluster_id: not set, only support int")
    return _native.ClusterInfo(
        remote_cluster_id,
        [(int_to_ip(ip), port) for ip, port in cluster.remote_ip_info_list],
        [(int_to_ip(ip), port) for ip, port in cluster.local_ip_info_list],
        int(cluster.remote_role_type or 0),
    )


def link_result(
    call: str, status: int, each: list[int], unanswered: LLMStatusCode
) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
    """(overall, per cluster) codes. A failure's reason goes to the log: codes are all that the caller gets.

    `unanswered`: what programs wait for where a peer, a stopped one say, does not answer in time; LLM_TIMEOUT they take
    for a transfer's.
    """

    def code(native: int) -> LLMStatusCode:
        status_code = to_status_code(native)
        return unanswered if status_code == LLMStatusCode.LLM_TIMEOUT else status_code

    if status != LLMStatusCode.LLM_SUCCESS:
        log.error("[%s] %s (0x%08X): %s", call, code(status), code(status), _native.last_error())
    return code(status), [code(one) for one in each]


def check_comm(comm_name: str, cluster_rank_info: dict[int, int]) -> None:
    """TypeError, ValueError or LLMException (LLM_PARAM_INVALID) unless they are a bilateral link's name and members."""
    check_isinstance("comm_name", comm_name, str, allow_none=False)
    if not 1 <= len(comm_name) <= _MAX_COMM_NAME:
        raise param_invalid("comm_name", comm_name, f"1 to {_MAX_COMM_NAME} characters")
    name = "cluster_rank_info"
    check_dict(name, cluster_rank_info, int, int, allow_none=False)
    if len(cluster_rank_info) not in _COMM_MEMBERS:
        raise param_invalid(name, cluster_rank_info, f"{_COMM_MEMBERS.start} to {_COMM_MEMBERS.stop - 1} members")
    for cluster_id, rank in cluster_rank_info.items():
        check_uint64(f"{name} key", cluster_id)
        check_uint32(f"{name}[{cluster_id}]", rank)
    ranks = list(cluster_rank_info.values())
    if any(earlier >= later for earlier, later in itertools.pairwise(ranks)):
        raise param_invalid(name, cluster_rank_info, "ranks in ascending order")
