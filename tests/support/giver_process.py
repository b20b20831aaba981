"""A P in a process of its own that computes a prompt step by step: what it has not computed yet is rubbish.

Driven by the test through a pipe, command by command: `step` begins one, `write` is what the model does in it, layer by
layer, `end` ends it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec
from vllm.v1.request import Request, RequestStatus

from support import stopping
from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.metadata import Home
from vllm_datadist_connector.metrics import WorkerMeter
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.worker.device import HostDevice
from vllm_datadist_connector.worker.driver import RankDriver
from vllm_datadist_connector.worker.giving import Giving

from . import pd
from .kv_ranks import LAYERS, PROMPT_ROLE, Place, RankEngine, make_kv
from .producer_process import LEASE_S, PROCESSES, start_scheduler
from .steps import first_step, next_step

RUBBISH = 0xEE


class GiverProcess:
    """The test's handle on it. `kv`: what the whole model's KV cache holds where it was computed."""

    def __init__(
        self,
        cluster_id: int,
        transport: str = "auto",
        tp_size: int = 1,
        pp_size: int = 1,
        block_size: int = pd.BLOCK_SIZE,
        announces_layers: bool = True,
        pushes: bool = False,
        listens: bool = True,
    ) -> None:
        """
        Args:
            listens: a P that pushes hears of offers; one whose ranks are not there yet does not.
        """
        self.kv = make_kv(cluster_id, block_size)
        self._pipe, theirs = PROCESSES.Pipe()
        values = [cluster_id, transport, tp_size, pp_size, block_size, announces_layers, pushes, listens]
        self._process = PROCESSES.Process(target=_run, args=(theirs, json.dumps(values)), daemon=True)
        self._process.start()
        theirs.close()
        self.endpoint = Endpoint(pd.LOOPBACK, json.loads(self._pipe.recv_bytes()))

    def promise(self, request_id: str, token: str, num_tokens: int) -> None:
        self._ask("promise", request_id, token, num_tokens)

    def step(self, request_id: str, blocks: Sequence[int], computed: int, scheduled: int, how: str = "next") -> None:
        """Begins one; how: "first", "next" or "resumed"."""
        self._ask("step", request_id, list(blocks), computed, scheduled, how)

    def write(self, blocks: Sequence[int], layers: Sequence[int] = range(LAYERS), announced: bool = True) -> None:
        """What the model computes of these blocks, in layers one after another."""
        self._ask("write", list(blocks), list(layers), announced)

    def end(self) -> None:
        self._ask("end")

    def spoil(self, blocks: Sequence[int]) -> None:
        """Another request has these blocks now."""
        self._ask("spoil", list(blocks))

    def finish(self, request_id: str, blocks: Sequence[int]) -> Any:
        """The params of the finished request; its last token is computed."""
        return self._ask("finish", request_id, list(blocks))

    def abort(self, request_id: str) -> None:
        self._ask("abort", request_id)

    def cut(self, cluster_id: int) -> None:
        """P's half of its links with that cluster is gone; nobody is told."""
        self._ask("cut", cluster_id)

    def is_withdrawn(self, token: str) -> bool:
        return bool(self._ask("is_withdrawn", token))

    def held(self) -> int:
        """Leases."""
        return int(self._ask("held"))

    def stop(self) -> None:
        stopping.stop(self.pid)

    def resume(self) -> None:
        stopping.resume(self.pid)

    @property
    def pid(self) -> int:
        if self._process.pid is None:
            raise RuntimeError("the process has not started")
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, do: str, *arguments: Any) -> Any:
        self._pipe.send_bytes(json.dumps([do, *arguments]).encode())
        return json.loads(self._pipe.recv_bytes())


class _Giver:
    def __init__(
        self,
        cluster_id: int,
        transport: str,
        tp_size: int,
        pp_size: int,
        block_size: int,
        announces_layers: bool,
        pushes: bool,
        listens: bool,
    ) -> None:
        self._listens = listens
        self._scheduler = start_scheduler(tp_size=tp_size, pp_size=pp_size, block_size=block_size)
        self.port = self._scheduler.endpoint.port
        kv = make_kv(cluster_id, block_size)
        places = [Place(tp, pp, tp_size, pp_size, block_size) for pp in range(pp_size) for tp in range(tp_size)]
        self._places = places
        self._truths = [place.part_of(kv) for place in places]
        self._memories = [truth.copy() for truth in self._truths]
        for memory in self._memories:
            memory[:] = RUBBISH
        self._engines, self._givings, geometries = [], [], {}
        self._drivers: list[RankDriver] = []
        for index, (place, memory) in enumerate(zip(places, self._memories, strict=True)):
            engine = RankEngine(cluster_id + 1000 * index, PROMPT_ROLE, place, memory, transport)
            geometry = engine.geometry(pushes=pushes)
            self._engines.append(engine)
            if pushes:
                can, meter = engine.datadist.capabilities, WorkerMeter(str(index))
                driver = RankDriver(engine.datadist, geometry, engine.caches, ConnectorConfig(), meter, can)
                self._drivers.append(driver)
            self._givings.append(Giving(geometry, Trust(), HostDevice(), announces_layers))
            geometries[place.pp_rank, place.tp_rank] = msgspec.msgpack.encode(geometry)
        self._scheduler.set_geometries(geometries)
        self._requests: dict[str, Request] = {}

    def promise(self, request_id: str, token: str, num_tokens: int) -> None:
        params = {**pd.TO_P, "datadist": {"handoff": token}}
        request = self._requests[request_id] = pd.make_request(range(num_tokens), params, request_id)
        self._scheduler.on_new_request(request)

    def step(self, request_id: str, blocks: list[int], computed: int, scheduled: int, how: str) -> None:
        if how == "first":
            output = first_step(request_id, (blocks,), computed, scheduled)
        else:
            output = next_step(request_id, (blocks,), computed, scheduled, how == "resumed")
        giving = self._scheduler.step(output)
        for each in self._givings:
            each.begin(giving)
        if giving is not None and self._listens:
            for driver in self._drivers:
                driver.watch(Home(Endpoint(*giving.endpoint), giving.key))

    def write(self, blocks: list[int], layers: list[int], announced: bool) -> None:
        for place, memory, truth, giving in zip(self._places, self._memories, self._truths, self._givings, strict=True):
            for layer in layers:
                if layer in place.layers:
                    memory[layer - place.layers.start, blocks] = truth[layer - place.layers.start, blocks]
                    if announced:
                        giving.layer(f"layers.{layer}")

    def end(self) -> None:
        for giving in self._givings:
            giving.end()

    def spoil(self, blocks: list[int]) -> None:
        for memory in self._memories:
            memory[:, blocks] = RUBBISH

    def finish(self, request_id: str, blocks: list[int]) -> Any:
        request = pd.finish(self._requests.pop(request_id))
        return self._scheduler.request_finished(request, (blocks,), LEASE_S)[1]

    def abort(self, request_id: str) -> None:
        request = pd.finish(self._requests.pop(request_id), RequestStatus.FINISHED_ABORTED)
        self._scheduler.request_finished(request, ([],), LEASE_S)

    def cut(self, cluster_id: int) -> None:
        for engine in self._engines:
            engine.datadist.unlink_clusters([_native.ClusterInfo(cluster_id)], 1000, True)

    def is_withdrawn(self, token: str) -> bool:
        return self._scheduler._handoffs.is_withdrawn(token)

    def held(self) -> int:
        self._scheduler.take_ended()
        return self._scheduler.held()[0]


def _run(pipe: Connection, settings: str) -> None:
    giver = _Giver(*json.loads(settings))
    pipe.send_bytes(json.dumps(giver.port).encode())
    while True:
        try:
            do, *arguments = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(json.dumps(getattr(giver, do)(*arguments)).encode())
