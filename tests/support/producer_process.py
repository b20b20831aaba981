"""A P in a process of its own: engine endpoint, lease table and side channel, driven by the test through a pipe.

The processes are forked from a server that has imported vLLM once: importing it takes longer than most tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint

from . import pd
from .endpoints import UINT8, Memory, check

TENSORS, BLOCKS, BLOCK_BYTES = 3, 512, 4096
_PROMPT_ROLE = 1

_processes = multiprocessing.get_context("forkserver")
# Only vLLM: the fork server looks into the current directory first and would find our package there, not built.
_processes.set_forkserver_preload(["vllm.sampling_params", "vllm.v1.request"])


def make_memory(seed: int) -> Memory:
    return np.random.default_rng(seed).integers(0, 256, (TENSORS, BLOCKS, BLOCK_BYTES), dtype=np.uint8)


def start_engine(cluster_id: int, role: int, memory: Memory, transport: str, **options: str) -> Any:
    """(LlmDataDist, cache id)"""
    datadist = _native.LlmDataDist(cluster_id, role)
    check(datadist.initialize({"llm.DeviceId": "0", "datadist.Transport": transport, **options}))
    status, cache_id = datadist.register_kv_cache(
        [BLOCKS, BLOCK_BYTES], UINT8, [tensor.ctypes.data for tensor in memory]
    )
    check(status)
    return datadist, cache_id


def geometry_of(cluster_id: int, cache_id: int, port: int, block_size: int = pd.BLOCK_SIZE) -> RankGeometry:
    cache = pd.make_cache(
        cache_id=cache_id,
        num_blocks=BLOCKS,
        block_bytes=BLOCK_BYTES,
        layers=tuple(f"layers.{index}" for index in range(TENSORS)),
    )
    contract = pd.make_contract(block_sizes=(block_size,))
    return pd.make_geometry(cluster_id=cluster_id, port=port, caches=(cache,), contract=contract)


class ProducerProcess:
    """The test's handle on one P."""

    def __init__(self, cluster_id: int, transport: str = "auto", port: int = 0, **settings: Any) -> None:
        self.memory = make_memory(cluster_id)
        self._pipe, theirs = _processes.Pipe()
        values = {"cluster_id": cluster_id, "transport": transport, "port": port, **settings}
        self._process = _processes.Process(target=_run, args=(theirs, json.dumps(values)), daemon=True)
        self._process.start()
        theirs.close()
        self.port: int = self._answer()

    def prefill(self, request_id: str, blocks: list[int]) -> RemotePrefill:
        """Grants a lease on `blocks` as for a finished prefill of the same number of blocks."""
        return parse_remote_prefill(self._ask({"do": "prefill", "request_id": request_id, "blocks": blocks}))

    def take_ended(self) -> list[str]:
        ended: list[str] = self._ask({"do": "take_ended"})
        return ended

    def stop(self) -> None:
        """Returns once the process has stopped."""
        os.kill(self._pid, signal.SIGSTOP)
        pd.wait_until(lambda: self._state() == "T", "the stop")

    def resume(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    @property
    def _pid(self) -> int:
        if self._process.pid is None:
            raise RuntimeError("the process has not started")
        return self._process.pid

    def _state(self) -> str:
        with open(f"/proc/{self._pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]

    def _ask(self, command: dict[str, Any]) -> Any:
        self._pipe.send_bytes(json.dumps(command).encode())
        return self._answer()

    def _answer(self) -> Any:
        return json.loads(self._pipe.recv_bytes())


def _run(pipe: Connection, settings: str) -> None:
    values = json.loads(settings)
    memory = make_memory(values["cluster_id"])
    datadist, cache_id = start_engine(
        values["cluster_id"], _PROMPT_ROLE, memory, values["transport"], **{"llm.ListenIpInfo": f"{pd.LOOPBACK}:0"}
    )
    status, engine_port = datadist.listen_port()
    check(status)
    block_size = values.get("block_size", pd.BLOCK_SIZE)
    identity = InstanceIdentity("engine-p", tp_size=1, pp_size=1, dcp_size=1, block_sizes=(pd.BLOCK_SIZE,))
    producer = ProducerScheduler(identity, Endpoint(pd.LOOPBACK, values["port"]), lease_s=30.0, limit_s=600.0)
    geometry = geometry_of(values["cluster_id"], cache_id, engine_port, block_size)
    producer.set_geometries({(0, 0): msgspec.msgpack.encode(geometry)})
    pipe.send_bytes(json.dumps(producer.endpoint.port).encode())
    while True:
        try:
            command = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        if command["do"] == "prefill":
            prompt = range(len(command["blocks"]) * pd.BLOCK_SIZE)
            request = pd.finish(pd.make_request(prompt, pd.TO_P, command["request_id"]))
            answer: Any = producer.request_finished(request, (command["blocks"],))[1]
        else:
            answer = producer.take_ended()
        pipe.send_bytes(json.dumps(answer).encode())
