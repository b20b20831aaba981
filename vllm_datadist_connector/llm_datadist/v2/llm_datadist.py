"""LLMDataDist: one endpoint of the process, its links, its role, and the manager of its caches."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import ClassVar

from vllm_datadist_connector._native import COMM_FAILED, COMM_OK, COMM_PREPARING, ManagedDataDist
from vllm_datadist_connector.llm_datadist.configs import LLMClusterInfo, LLMRole
from vllm_datadist_connector.llm_datadist.status import LLMStatusCode, failure, param_invalid, raise_on_failure
from vllm_datadist_connector.llm_datadist.utils import log
from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_dict,
    check_int64,
    check_isinstance,
    check_uint64,
)
from vllm_datadist_connector.llm_datadist.v1.kv_cache_manager import KvCacheManager
from vllm_datadist_connector.llm_datadist.v2 import engine_options
from vllm_datadist_connector.llm_datadist.v2 import rank_table as rank_tables
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager
from vllm_datadist_connector.llm_datadist.v2.interruptible import interruptible
from vllm_datadist_connector.llm_datadist.v2.links import check_comm, link_result, native_clusters
from vllm_datadist_connector.llm_datadist.v2.llm_types import Placement, RegisterMemStatus

_ROLE_NAMES = {LLMRole.PROMPT: "Prompt", LLMRole.DECODER: "Decoder", LLMRole.MIX: "Mix"}
_MEM_STATUS = {
    COMM_OK: RegisterMemStatus.OK,
    COMM_PREPARING: RegisterMemStatus.PREPARING,
    COMM_FAILED: RegisterMemStatus.FAILED,
}


class LLMDataDist:
    """One endpoint, of which a process has at most one initialised (LLM-DataDist Python: LLMDataDist).

    Every method but init and finalize raises RuntimeError before init; errors of the engine are LLMException with its
    code and its reason. init and finalize must not run concurrently with other calls.
    """

    llm_engine_instance: ClassVar[LLMDataDist | None] = None

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        """`cluster_id`: uint64, unique among the endpoints that link with each other."""
        check_isinstance("role", role, LLMRole, allow_none=False)
        check_uint64("cluster_id", cluster_id)
        self._role = role
        self._cluster_id = cluster_id
        self._is_initialized = False
        self._enable_cache_mgr = False
        self._enable_local_comm_res = False
        self._engine_options: dict[str, str] = {}
        self._cluster_config = ""
        self._llm_datadist: ManagedDataDist | None = None
        self._cache_manager: CacheManager | None = None
        self._kv_cache_manager: KvCacheManager | None = None

    @staticmethod
    def _role_to_str(role: LLMRole) -> str:
        return _ROLE_NAMES[role]

    def init(self, options: dict[str, str]) -> None:
        """Starts the engine with LLMConfig's options; nothing happens if it runs already (LLMDataDist.init).

        LLMException: another LLMDataDist of the process is initialised (LLM_FAILED); options that contradict each other
        or an engine that refuses them (LLM_PARAM_INVALID); a port that is taken (LLM_FAILED).
        """
        if self._is_initialized:
            return
        other = LLMDataDist.llm_engine_instance
        if other is not None:
            raise failure(
                LLMStatusCode.LLM_FAILED,
                f"Cannot init multiple LLMDataDists: cluster {other.cluster_id} is initialised in this process, "
                "finalize it first",
            )
        check_isinstance("options", options, dict, allow_none=False)
        engine_options.check_memory_max(options)
        check_dict("options", options, str, str)
        self._engine_options = engine_options.complete(options, self._role_to_str(self._role))
        self._enable_cache_mgr = engine_options.uses_cache_manager(self._engine_options)
        self._enable_local_comm_res = engine_options.LOCAL_COMM_RES in self._engine_options
        self._cluster_config = self._engine_options.get(engine_options.CLUSTER_INFO, "")
        self._start_engine()
        self._is_initialized = True
        LLMDataDist.llm_engine_instance = self
        log.info("initialised cluster %d as %s", self._cluster_id, self._role)

    def _start_engine(self) -> None:
        options = self._engine_options
        if self._enable_cache_mgr:
            native_options = engine_options.native_options(options)
        else:
            native_options = engine_options.native_legacy_options(options, listens=self._role == LLMRole.PROMPT)
        native = ManagedDataDist(self._cluster_id, int(self._role))
        raise_on_failure(native.initialize(native_options), "init")
        self._llm_datadist = native
        if self._enable_cache_mgr:
            pools = {
                placement
                for placement, key in (
                    (Placement.DEVICE, engine_options.DEVICE_POOL),
                    (Placement.HOST, engine_options.HOST_POOL),
                )
                if native_options.get(key)
            }
            self._cache_manager = CacheManager(
                native,
                self._cluster_id,
                remote_accessible=native_options.get(engine_options.REMOTE_ACCESSIBLE) == "1",
                pools=frozenset(pools),
            )
        else:
            devices = engine_options.device_count(options)
            self._kv_cache_manager = KvCacheManager(native, self._cluster_id, self._role, devices)

    def finalize(self) -> None:
        """Drops every link and cache and stops the engine; a no-op if it does not run (LLMDataDist.finalize)."""
        if not self._is_initialized:
            return
        if self._cache_manager is not None:
            self._cache_manager._finalize()
        if self._kv_cache_manager is not None:
            self._kv_cache_manager._finalize()
        self._native().finalize()
        self._cache_manager = None
        self._kv_cache_manager = None
        self._llm_datadist = None
        self._is_initialized = False
        LLMDataDist.llm_engine_instance = None
        log.info("finalized cluster %d", self._cluster_id)

    def _native(self) -> ManagedDataDist:
        if self._llm_datadist is None:
            raise RuntimeError("llm datadist is not initialized")
        return self._llm_datadist

    # ---- links of a client to servers ----

    @interruptible
    def link_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Links with each of `clusters`, in parallel (LLMDataDist.link_clusters).

        `timeout`: milliseconds, above 0, for each. Returns the overall status and one per cluster, in order; the links
        that came up stay. An empty list is (LLM_PARAM_INVALID, []). Why a link failed is in the log at ERROR; a peer
        that refuses, or does not answer in time: LLM_LINK_FAILED.
        LLMException (LLM_PARAM_INVALID): the timeout; a cluster without local ip where none is known otherwise.
        """
        native = self._native()
        infos = native_clusters(clusters, timeout)
        if self._enable_cache_mgr and not self._engine_options.get(engine_options.LOCAL_COMM_RES):
            for index, info in enumerate(infos):
                if not info.local_ip_infos:
                    raise param_invalid(f"clusters[{index}].local_ip_info_list", [], "at least one local ip")
        status, each = native.link_clusters(infos, timeout)
        return link_result("link_clusters", status, each, LLMStatusCode.LLM_LINK_FAILED)

    @interruptible
    def unlink_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000, force: bool = False
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Drops the links with `clusters`; with `force` without telling the peers (LLMDataDist.unlink_clusters).

        Waits for running transfers. Parameters and result as link_clusters; a cluster without a link is a success. A
        peer that does not answer in time: LLM_UNLINK_FAILED, and the link stays.
        """
        native = self._native()
        check_isinstance("force", force, bool)
        status, each = native.unlink_clusters(native_clusters(clusters, timeout), timeout, bool(force))
        return link_result("unlink_clusters", status, each, LLMStatusCode.LLM_UNLINK_FAILED)

    def check_link_status(self, remote_cluster_id: int) -> None:
        """Legacy mode: returns if the link works (LLMDataDist.check_link_status).

        LLMException: there is none (LLM_NOT_YET_LINK), it is lost (LLM_LINK_FAILED), the mode is another one.
        """
        native = self._native()
        if self._enable_cache_mgr:
            raise param_invalid(
                engine_options.CACHE_MANAGER, "1", "'0' or not set: check_link_status is of legacy mode"
            )
        check_uint64("remote_cluster_id", remote_cluster_id)
        status, report = native.query_link(remote_cluster_id)
        raise_on_failure(status, "check_link_status")
        if report is not None and not report.alive:
            raise failure(
                LLMStatusCode.LLM_LINK_FAILED,
                f"[check_link_status] the link to cluster {remote_cluster_id} at {report.peer} is lost: link again",
            )

    # ---- bilateral links ----

    def link(self, comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> int:
        """Links all members with each other; each of them makes this same call (LLMDataDist.link).

        `comm_name`: 1 to 127 characters. `cluster_rank_info`: cluster id to rank of 2 to 4 members, ours among them, in
        ascending order of rank. `rank_table`: JSON, see v2/rank_table.py. Returns the comm id, from 1, at once:
        query_register_mem_status tells when transfers may start. Caches are registered before it.
        LLMException: LLM_PARAM_INVALID for the above, LLM_FEATURE_NOT_ENABLED with backend hixl.
        """
        native = self._native()
        check_comm(comm_name, cluster_rank_info)
        check_isinstance("rank_table", rank_table, str, allow_none=False)
        configured_s = int(self._engine_options.get(engine_options.LINK_TOTAL_TIME, "0"))
        members = rank_tables.members_of(rank_table, cluster_rank_info)
        status, comm_id = native.link_comm(comm_name, members, rank_tables.link_total_time_s(configured_s))
        raise_on_failure(status, "link")
        if self._cache_manager is not None:
            self._cache_manager.set_is_call_linked()
        return comm_id

    @interruptible
    def unlink(self, comm_id: int) -> None:
        """Ends what link() began, waiting for running transfers (LLMDataDist.unlink).

        LLMException: unknown comm id (LLM_NOT_YET_LINK).
        """
        native = self._native()
        check_int64("comm_id", comm_id)
        raise_on_failure(native.unlink_comm(comm_id), "unlink")

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """PREPARING until link()'s background work ends, then OK or FAILED (LLMDataDist.query_register_mem_status).

        Why it failed is in the log at ERROR. LLMException: unknown comm id (LLM_NOT_YET_LINK).
        """
        native = self._native()
        check_int64("comm_id", comm_id)
        status, state, reason = native.query_comm(comm_id)
        raise_on_failure(status, "query_register_mem_status")
        if state == COMM_FAILED:
            log.error("link of comm %d failed: %s", comm_id, reason)
        return _MEM_STATUS[state]

    # ---- role and managers ----

    @interruptible
    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Changes the role, and whether and where this endpoint listens (LLMDataDist.switch_role).

        `switch_options`: {"llm.listenIpInfo": "ip:port"} to listen there, without it to stop listening.
        LLMException: live links (LLM_EXIST_LINK); the port is taken (LLM_FAILED). In legacy mode also: the same role, a
        prompt without llm.listenIpInfo (LLM_PARAM_INVALID); LLMConfig.enable_switch_role off (LLM_FEATURE_NOT_ENABLED).
        """
        native = self._native()
        check_isinstance("role", role, LLMRole, allow_none=False)
        check_dict("switch_options", switch_options, str, str)
        options = switch_options or {}
        if not self._enable_cache_mgr:
            self._check_legacy_switch(role, options)
        native_options = {}
        if engine_options.LISTEN in options:
            engine_options.split_listen_info(options[engine_options.LISTEN])
            native_options = engine_options.native_options({engine_options.LISTEN: options[engine_options.LISTEN]})
        raise_on_failure(native.set_role(int(role), native_options), "switch_role")
        log.info("switched cluster %d from %s to %s", self._cluster_id, self._role, role)
        self._role = role
        if self._kv_cache_manager is not None:
            self._kv_cache_manager._set_role(role)

    def _check_legacy_switch(self, role: LLMRole, options: dict[str, str]) -> None:
        if role == self._role:
            raise param_invalid("role", str(role), "another role than the current one")
        if role == LLMRole.PROMPT and engine_options.LISTEN not in options:
            raise param_invalid(f"switch_options[{engine_options.LISTEN!r}]", None, f"'ip:port' for {role}")
        if self._engine_options.get(engine_options.SWITCH_ROLE) != "1":
            raise failure(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                f"[switch_role] {engine_options.SWITCH_ROLE}: not set, allowed: '1' (LLMConfig.enable_switch_role)",
            )

    @property
    def cache_manager(self) -> CacheManager:
        """The caches in cache-manager mode; LLMException (LLM_PARAM_INVALID) in legacy mode."""
        self._native()
        if self._cache_manager is None:
            raise param_invalid(
                engine_options.CACHE_MANAGER, "0", "'1' for cache_manager; now there is kv_cache_manager"
            )
        return self._cache_manager

    @property
    def kv_cache_manager(self) -> KvCacheManager:
        """The caches in legacy mode; LLMException (LLM_PARAM_INVALID) in cache-manager mode."""
        self._native()
        if self._kv_cache_manager is None:
            raise param_invalid(
                engine_options.CACHE_MANAGER, "1", "'0' for kv_cache_manager; now there is cache_manager"
            )
        return self._kv_cache_manager

    @property
    def cluster_id(self) -> int:
        return self._cluster_id


def _shutdown_handler() -> None:
    """Finalizes at exit what the program has left initialised: peers see the links end, threads do not outlive us."""
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


def _forget_parents_instance() -> None:
    """In a child of fork(), where the parent's engine has no threads, an engine of the child's own may be initialised.
    What the parent has made stays the parent's: its calls say so."""
    LLMDataDist.llm_engine_instance = None


atexit.register(_shutdown_handler)
os.register_at_fork(after_in_child=_forget_parents_instance)
