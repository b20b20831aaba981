"""What a caller configures: the role, the options, the peers of a link; and the descriptions of caches."""

from __future__ import annotations

from vllm_datadist_connector.llm_datadist.utils.utils import (
    NamedIntEnum,
    check_isinstance,
    check_uint16,
    check_uint32,
    check_uint64,
    ip_to_int,
)
from vllm_datadist_connector.llm_datadist.v2.config import LLMConfig, LlmConfig
from vllm_datadist_connector.llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    Placement,
)

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "LLMClusterInfo",
    "LLMConfig",
    "LLMRole",
    "LlmConfig",
    "Placement",
]


class LLMRole(NamedIntEnum):
    """A label in cache-manager mode; in legacy mode it says which calls are allowed (LLM-DataDist Python: LLMRole)."""

    PROMPT = 1
    DECODER = 2
    MIX = 3


class LLMClusterInfo:
    """A peer of link_clusters or unlink_clusters (LLM-DataDist Python: LLMClusterInfo).

    Addresses are IPv4. A link needs remote_cluster_id and exactly one remote address.
    """

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[int, int]] = []
        self._remote_ip_info_list: list[tuple[int, int]] = []

    @property
    def remote_cluster_id(self) -> int | None:
        """Cluster id of the peer, uint64; None until it is set."""
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, remote_cluster_id: int) -> None:
        check_uint64("remote_cluster_id", remote_cluster_id)
        self._remote_cluster_id = remote_cluster_id

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        """Role of the peer; links do not depend on it."""
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, remote_role_type: LLMRole | int) -> None:
        check_isinstance("remote_role_type", remote_role_type, (LLMRole, int))
        self._remote_role_type = remote_role_type

    @property
    def local_ip_info_list(self) -> list[tuple[int, int]]:
        """(ip, port) of our own addresses; an ip is the address's bytes read little-endian."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[int, int]]:
        """(ip, port) of the peer's addresses; an ip is the address's bytes read little-endian."""
        return self._remote_ip_info_list

    def append_local_ip_info(self, ip: str | int, port: int) -> None:
        """Adds an address of ours: dotted text or little-endian int. RuntimeError: no IPv4 address."""
        self._local_ip_info_list.append(_ip_info(ip, port))

    def append_remote_ip_info(self, ip: str | int, port: int) -> None:
        """Adds an address of the peer: dotted text or little-endian int. RuntimeError: no IPv4 address."""
        self._remote_ip_info_list.append(_ip_info(ip, port))


def _ip_info(ip: str | int, port: int) -> tuple[int, int]:
    check_isinstance("ip", ip, (str, int), allow_none=False)
    check_uint16("port", port)
    if isinstance(ip, str):
        return ip_to_int(ip), port
    check_uint32("ip", ip)
    return ip, port
