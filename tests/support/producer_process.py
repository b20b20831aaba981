"""A P in a process of its own: engine endpoint, lease table and side channel, driven by the test through a pipe.

The processes are forked from a server that has imported vLLM once: importing it takes longer than most tests.
"""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from support import stopping
from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

from . import pd
from .kv_ranks import PROMPT_ROLE, Place, RankEngine, make_kv
from .wire import OWN

LEASE_S, LIMIT_S = 30.0, 600.0
_RANKS_APART = 1000
"""Cluster ids of an instance's ranks: the first one's, plus multiples of it."""

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vllm.sampling_params", "vllm.v1.request"])


def start_scheduler(
    port: int = 0,
    tp_size: int = 1,
    pp_size: int = 1,
    block_size: int = pd.BLOCK_SIZE,
    insecure: bool = False,
    host: str = pd.LOOPBACK,
) -> ProducerScheduler:
    """P's scheduler side."""
    identity = InstanceIdentity("engine-p", tp_size, pp_size, dcp_size=1, groups=(KVGroup(block_size),))
    return ProducerScheduler(identity, Endpoint(host, port), LIMIT_S, Trust(insecure=insecure))


def prefill(
    producer: ProducerScheduler,
    request_id: str,
    blocks: list[int],
    block_size: int = pd.BLOCK_SIZE,
    lease_s: float = LEASE_S,
) -> Any:
    """The params of a finished prefill that filled `blocks`."""
    request = pd.finish(pd.make_request(range(len(blocks) * block_size), pd.TO_P, request_id))
    return producer.request_finished(request, (blocks,), lease_s)[1]


class ProducerProcess:
    """The test's handle on one P, with as many ranks as it is told."""

    def __init__(
        self,
        cluster_id: int,
        transport: str = "auto",
        port: int = 0,
        tp_size: int = 1,
        pp_size: int = 1,
        block_size: int = pd.BLOCK_SIZE,
        lies: dict[str, dict[str, Any]] | None = None,
        silent_layers: int = 0,
        insecure: bool = False,
    ) -> None:
        """
        Args:
            lies: what the geometry of a rank, by its number over both kinds of parallelism, says instead of the truth.
            silent_layers: so many of its last layers no rank tells of.
            insecure: its side channel lets in whoever comes over TCP, as from a wire of the tests.
        """
        self.kv = make_kv(cluster_id, block_size)
        self._pipe, theirs = PROCESSES.Pipe()
        values = {
            "cluster_id": cluster_id,
            "transport": transport,
            "port": port,
            "tp_size": tp_size,
            "pp_size": pp_size,
            "block_size": block_size,
            "lies": lies or {},
            "silent_layers": silent_layers,
            "insecure": insecure,
            "host": OWN,
        }
        self._process = PROCESSES.Process(target=_run, args=(theirs, json.dumps(values)), daemon=True)
        self._process.start()
        theirs.close()
        self.port: int = self._answer()
        self.endpoint = Endpoint(OWN, self.port)
        """Of its side channel."""

    def prefill(self, request_id: str, blocks: list[int]) -> RemotePrefill:
        """Grants a lease on `blocks` as for a finished prefill of the same number of blocks."""
        return parse_remote_prefill(self._ask({"do": "prefill", "request_id": request_id, "blocks": blocks}))

    def take_ended(self) -> list[str]:
        ended: list[str] = self._ask({"do": "take_ended"})
        return ended

    def stop_serving(self) -> None:
        """Its side channel's address is free for others; its engines live on."""
        self._ask({"do": "stop_serving"})

    def stop(self) -> None:
        stopping.stop(self._pid)

    def resume(self) -> None:
        stopping.resume(self._pid)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    @property
    def _pid(self) -> int:
        if self._process.pid is None:
            raise RuntimeError("the process has not started")
        return self._process.pid

    def _ask(self, command: dict[str, Any]) -> Any:
        self._pipe.send_bytes(json.dumps(command).encode())
        return self._answer()

    def _answer(self) -> Any:
        return json.loads(self._pipe.recv_bytes())


def _run(pipe: Connection, settings: str) -> None:
    values = json.loads(settings)
    tp_size, pp_size, block_size = values["tp_size"], values["pp_size"], values["block_size"]
    producer = start_scheduler(values["port"], tp_size, pp_size, block_size, values["insecure"], values["host"])
    kv = make_kv(values["cluster_id"], block_size)
    places = [Place(tp, pp, tp_size, pp_size, block_size) for pp in range(pp_size) for tp in range(tp_size)]
    memories = [place.part_of(kv) for place in places]
    geometries, engines = {}, []
    for index, (place, memory) in enumerate(zip(places, memories, strict=True)):
        cluster_id = values["cluster_id"] + _RANKS_APART * index
        engine = RankEngine(cluster_id, PROMPT_ROLE, place, memory, values["transport"])
        engines.append(engine)
        geometry = _told(engine.geometry(), values["lies"].get(str(index), {}), values["silent_layers"])
        geometries[place.pp_rank, place.tp_rank] = msgspec.msgpack.encode(geometry)
    producer.set_geometries(geometries)
    pipe.send_bytes(json.dumps(producer.endpoint.port).encode())
    while True:
        try:
            command = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        if command["do"] == "prefill":
            answer: Any = prefill(producer, command["request_id"], command["blocks"], block_size)
        elif command["do"] == "stop_serving":
            producer.close()
            answer = None
        else:
            answer = producer.take_ended()
        pipe.send_bytes(json.dumps(answer).encode())


def _told(geometry: RankGeometry, lies: dict[str, Any], silent_layers: int) -> RankGeometry:
    caches = tuple(
        msgspec.structs.replace(cache, layers=cache.layers[: len(cache.layers) - silent_layers])
        for cache in geometry.caches
    )
    contract = pd.make_contract(**lies.pop("contract", {}))
    return msgspec.structs.replace(geometry, caches=caches, contract=contract, **lies)
