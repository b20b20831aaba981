"""Ways to move blocks from an owner process to an initiator process: ours and NIXL's, behind one interface.

Each mechanism runs in a process pair of its own: NIXL's progress threads poll all the time and would take cores away
from whatever else is measured beside them.
"""

from __future__ import annotations

import abc
import base64
import os
import secrets
from collections.abc import Callable
from typing import Any

from transfer_bench.pools import Case, Pool

Facts = dict[str, Any]
"""What the owner tells the initiator: JSON."""


class Mechanism(abc.ABC):
    """One end. The owner calls serve(), the initiator connect() and then bind() for every case."""

    @abc.abstractmethod
    def serve(self, pool: Pool, block_bytes: int) -> Facts:
        """Makes the pool readable as blocks of `block_bytes`; called again for every block size."""

    @abc.abstractmethod
    def connect(self, pool: Pool, block_bytes: int, facts: Facts) -> None:
        """Prepares reading the owner's pool into `pool`; called again for every block size."""

    @abc.abstractmethod
    def bind(self, case: Case) -> Callable[[], None]:
        """A call that moves the case's blocks and returns when all are there."""

    def describe(self) -> str:
        return ""


class DataDist(Mechanism):
    def __init__(self, transport: str, threads: int) -> None:
        from vllm_datadist_connector import _native

        self._native = _native
        self._cluster_id = secrets.randbits(60) + 1
        self._end = _native.LlmDataDist(self._cluster_id, 3)
        self._options = {
            "llm.DeviceId": "0",
            "llm.SyncKvCacheWaitTime": "60000",
            "datadist.Transport": transport,
            "datadist.TransferThreads": str(threads),
            "datadist.TcpStreams": str(max(2, threads)),
        }
        self._cache_id = 0
        self._remote: Facts = {}

    def serve(self, pool: Pool, block_bytes: int) -> Facts:
        self._options["llm.ListenIpInfo"] = "127.0.0.1:0"
        self._check(self._end.initialize(self._options))
        self._register(pool, block_bytes)
        status, port = self._end.listen_port()
        self._check(status)
        return {"cluster": self._cluster_id, "port": port, "cache": self._cache_id}

    def connect(self, pool: Pool, block_bytes: int, facts: Facts) -> None:
        self._check(self._end.initialize(self._options))
        self._register(pool, block_bytes)
        if not self._remote:
            cluster = self._native.ClusterInfo(facts["cluster"], [("127.0.0.1", facts["port"])], [("127.0.0.1", 0)])
            status, _ = self._end.link_clusters([cluster], 5000)
            self._check(status)
        self._remote = facts

    def bind(self, case: Case) -> Callable[[], None]:
        src, dst = case.block_lists()
        cluster, cache, local, pull = (
            self._remote["cluster"],
            self._remote["cache"],
            self._cache_id,
            self._end.pull_kv_blocks,
        )
        layers = (0, case.tensors - 1)

        def run() -> None:
            if pull(cluster, cache, local, src, dst, layers, layers, 1):
                raise RuntimeError(self._native.last_error())

        return run

    def describe(self) -> str:
        _, report = self._end.query_link(self._remote["cluster"])
        return report.transport if report is not None else ""

    def _register(self, pool: Pool, block_bytes: int) -> None:
        if self._cache_id:
            self._check(self._end.unregister_kv_cache(self._cache_id))
        shape = [pool.tensor_bytes // block_bytes, block_bytes]
        status, self._cache_id = self._end.register_kv_cache(shape, 4, pool.addrs)
        self._check(status)

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"{self._native.status_name(status)}: {self._native.last_error()}")


class Nixl(Mechanism):
    """NIXL as vLLM's connector uses it: descriptor lists prepared once, a prepped transfer per request, polled."""

    def __init__(self, threads: int, tcp_only: bool) -> None:
        # UCX reads its environment when the agent is made; a later mechanism must not inherit it.
        settings = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
        for variable, value in settings.items():
            os.environ.pop(variable, None)
            if tcp_only:
                os.environ[variable] = value
        from nixl._api import nixl_agent, nixl_agent_config

        self._name = f"agent-{secrets.token_hex(4)}"
        self._agent = nixl_agent(self._name, nixl_agent_config(num_threads=threads, backends=["UCX"]))
        self._registered = False
        self._peer = ""
        self._sides: tuple[Any, Any] | None = None
        self._blocks = 0

    def serve(self, pool: Pool, block_bytes: int) -> Facts:
        del block_bytes  # descriptors are the initiator's
        self._register(pool)
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "addrs": pool.addrs}

    def connect(self, pool: Pool, block_bytes: int, facts: Facts) -> None:
        self._register(pool)
        if not self._peer:
            peer = self._agent.add_remote_agent(base64.b64decode(facts["metadata"]))
            self._peer = peer.decode() if isinstance(peer, bytes) else peer
        if self._sides is not None:
            for side in self._sides:
                self._agent.release_dlist_handle(side)
        self._blocks = pool.tensor_bytes // block_bytes
        local = self._descriptors(pool.addrs, block_bytes)
        remote = self._descriptors(facts["addrs"], block_bytes)
        self._sides = (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local),
            self._agent.prep_xfer_dlist(self._peer, remote),
        )

    def bind(self, case: Case) -> Callable[[], None]:
        import numpy as np

        if self._sides is None:
            raise RuntimeError("connect() first")
        src, dst = case.block_lists()
        starts = np.arange(case.tensors, dtype=np.int64)[:, None] * self._blocks
        local, remote = (starts + dst).ravel().astype(np.int32), (starts + src).ravel().astype(np.int32)
        agent, (local_side, remote_side) = self._agent, self._sides

        def run() -> None:
            handle = agent.make_prepped_xfer("READ", local_side, local, remote_side, remote)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
            if state != "DONE":
                raise RuntimeError(f"NIXL transfer ended as {state}")

        return run

    def _register(self, pool: Pool) -> None:
        if not self._registered:
            self._agent.register_memory([(addr, pool.tensor_bytes, 0, "") for addr in pool.addrs], "DRAM")
            self._registered = True

    def _descriptors(self, addrs: list[int], block_bytes: int) -> Any:
        rows = [(addr + block * block_bytes, block_bytes, 0) for addr in addrs for block in range(self._blocks)]
        return self._agent.get_xfer_descs(rows, "DRAM")


MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "cma, 1 thread": lambda: DataDist("cma", 1),
    "cma, 2 threads": lambda: DataDist("cma", 2),
    "tcp": lambda: DataDist("tcp", 2),
    "nixl": lambda: Nixl(0, tcp_only=False),
    "nixl, 4 threads": lambda: Nixl(4, tcp_only=False),
    "nixl tcp": lambda: Nixl(0, tcp_only=True),
}
"""In the order of the table; nixl rows need NIXL installed."""


def nixl_is_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("nixl") is not None
