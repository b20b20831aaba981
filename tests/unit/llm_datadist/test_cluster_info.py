"""LLMClusterInfo."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_datadist_connector.llm_datadist import LLMClusterInfo, LLMRole


def test_nothing_is_set() -> None:
    cluster = LLMClusterInfo()
    assert cluster.remote_cluster_id is None
    assert cluster.remote_role_type is None
    assert cluster.local_ip_info_list == cluster.remote_ip_info_list == []


def test_what_is_set_is_read() -> None:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = 2**64 - 1
    cluster.remote_role_type = LLMRole.DECODER
    cluster.append_local_ip_info("10.0.0.1", 26000)
    cluster.append_local_ip_info(7, 0)
    cluster.append_remote_ip_info("10.0.0.2", 65535)
    assert cluster.remote_cluster_id == 2**64 - 1
    assert cluster.remote_role_type is LLMRole.DECODER
    assert cluster.local_ip_info_list == [(0x0100000A, 26000), (7, 0)]
    assert cluster.remote_ip_info_list == [(0x0200000A, 65535)]


def test_clusters_do_not_share_addresses() -> None:
    LLMClusterInfo().append_remote_ip_info("10.0.0.2", 1)
    assert LLMClusterInfo().remote_ip_info_list == []


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**64, ValueError), ("1", TypeError), (None, TypeError)]
)
def test_remote_cluster_id_is_uint64(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="remote_cluster_id: "):
        LLMClusterInfo().remote_cluster_id = value


def test_remote_role_type_is_a_role_or_a_number() -> None:
    cluster = LLMClusterInfo()
    cluster.remote_role_type = 1
    with pytest.raises(TypeError, match=r"remote_role_type: .*only support LLMRole or int"):
        cluster.remote_role_type = "prompt"  # type: ignore[assignment]


@pytest.mark.parametrize("append", [LLMClusterInfo.append_local_ip_info, LLMClusterInfo.append_remote_ip_info])
@pytest.mark.parametrize(
    ("ip", "port", "error", "text"),
    [
        ("10.0.0.1", 65536, ValueError, "port: 65536, value is out of range"),
        ("10.0.0.1", -1, ValueError, "port: -1, value is out of range"),
        ("10.0.0.1", "1", TypeError, "port: .*only support int"),
        (b"10.0.0.1", 1, TypeError, "ip: .*only support str or int"),
        (None, 1, TypeError, "ip: .*only support str or int"),
        (2**32, 1, ValueError, "ip: .*value is out of range"),
        ("host", 1, RuntimeError, "Can not parse ip str: 'host'"),
        ("::1", 1, RuntimeError, "Can not parse ip str: '::1'"),
    ],
)
def test_bad_addresses(append: Any, ip: Any, port: Any, error: type[Exception], text: str) -> None:
    cluster = LLMClusterInfo()
    with pytest.raises(error, match=text):
        append(cluster, ip, port)
    assert cluster.local_ip_info_list == cluster.remote_ip_info_list == []
