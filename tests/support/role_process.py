"""An instance in a process of its own whose role may change: both halves of the scheduler, and a rank.

Driven by the test through a pipe. What vLLM would do is a loop that asks the scheduler's hooks as vLLM's steps do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec
import numpy as np
from vllm.v1.request import Request

from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.metrics import WorkerMeter
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.driver import RankDriver

from . import pd
from .engine_config import FULL, group_of, vllm_config
from .kv_ranks import MIX_ROLE, Place, RankEngine, make_kv
from .producer_process import PROCESSES
from .steps import NO_STEP

PULLED, LOCAL, FAILED = "pulled", "local", "failed"
"""What becomes of a D request; one that failed is computed again by vLLM."""


class RoleProcess:
    """The test's handle on it."""

    def __init__(self, cluster_id: int, **config: Any) -> None:
        self.cluster_id = cluster_id
        self._pipe, theirs = PROCESSES.Pipe()
        arguments = (theirs, cluster_id, json.dumps(config))
        self._process = PROCESSES.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.endpoint = Endpoint(pd.LOOPBACK, json.loads(self._pipe.recv_bytes()))

    def prefill(self, requests: dict[str, Sequence[int]]) -> dict[str, Any]:
        """Blocks by request -> the params that the router gets."""
        given: dict[str, Any] = self._ask("prefill", requests)
        return given

    def take(self, giver: RoleProcess, params: dict[str, Any], blocks: dict[str, Sequence[int]]) -> dict[str, str]:
        """All at once; returns what has become of each. KV that is not the giver's fails the process."""
        taken: dict[str, str] = self._ask("take", giver.cluster_id, params, blocks)
        return taken

    def held(self) -> tuple[int, int, int]:
        """(leases, requests that it takes, links), after a step."""
        leases, taken, links = self._ask("held")
        return leases, taken, links

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, do: str, *arguments: Any) -> Any:
        self._pipe.send_bytes(json.dumps([do, *arguments]).encode())
        return json.loads(self._pipe.recv_bytes())


class _Taken(NamedTuple):
    request: Request
    blocks: Sequence[int]
    theirs: Sequence[int]


class _Instance:
    def __init__(self, cluster_id: int, config: dict[str, Any]) -> None:
        settings = ConnectorConfig(role_switch=True, **config)
        self._scheduler = ConnectorScheduler(settings, vllm_config("kv_both"), (group_of(FULL, "layers.0"),))
        place = Place()
        self._memory = place.part_of(make_kv(cluster_id, place.block_size))
        access = {"datadist.PeerAccess": "read_granted"}
        self._engine = RankEngine(cluster_id, MIX_ROLE, place, self._memory, "auto", **access)
        geometry = self._engine.geometry()
        datadist = self._engine.datadist
        self._driver = RankDriver(
            datadist, geometry, self._engine.caches, settings, WorkerMeter("0"), datadist.capabilities
        )
        self._scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(geometry)})
        self._step()
        producer = self._scheduler._producer
        assert producer is not None
        self._producer = producer

    @property
    def port(self) -> int:
        return self._producer.endpoint.port

    def prefill(self, requests: dict[str, list[int]]) -> dict[str, Any]:
        params = {}
        for request_id, blocks in requests.items():
            request = pd.make_request(range(len(blocks) * pd.BLOCK_SIZE), dict(pd.TO_P), request_id)
            self._scheduler.on_new_request(request)
            self._step()
            params[request_id] = self._scheduler.request_finished(pd.finish(request), (blocks,))[1]
        self._step()
        return params

    def take(self, giver: int, params: dict[str, Any], blocks: dict[str, list[int]]) -> dict[str, str]:
        theirs = Place().part_of(make_kv(giver, pd.BLOCK_SIZE))
        waiting: dict[str, _Taken] = {}
        pulling: dict[str, _Taken] = {}
        outcome: dict[str, str] = {}
        for request_id, given in params.items():
            prompt = [*range(len(blocks[request_id]) * pd.BLOCK_SIZE), 7]
            request = pd.make_request(prompt, given, request_id)
            held = given["remote_block_ids"][0]
            waiting[request_id] = _Taken(request, blocks[request_id], held)
            self._scheduler.on_new_request(request)
        until = time.monotonic() + pd.WAIT_S
        while waiting or pulling:
            assert time.monotonic() < until, (waiting, pulling)
            for request_id, taken in list(waiting.items()):
                count = self._scheduler.matched_tokens(taken.request, 0)
                if count is None:
                    continue
                self._scheduler.after_alloc(taken.request, (taken.blocks,), count)
                del waiting[request_id]
                if count:
                    pulling[request_id] = taken
                else:
                    outcome[request_id] = LOCAL
            self._step()
            finished = self._driver.take_finished()
            self._scheduler.finished(finished.received, ())
            for request_id in finished.received:
                taken = pulling.pop(request_id)
                outcome[request_id] = FAILED if request_id in finished.failed else PULLED
                if outcome[request_id] == PULLED:
                    np.testing.assert_array_equal(self._memory[:, taken.blocks], theirs[:, taken.theirs])
                self._memory[:, taken.blocks] = 0
            time.sleep(0.001)  # as long as a step of a model would take
        return outcome

    def held(self) -> tuple[int, int, int]:
        self._step()
        consumer = self._scheduler._consumer
        assert consumer is not None
        return self._producer.held()[0], consumer.taken(), len(self._engine.datadist.linked_clusters()[1])

    def _step(self) -> None:
        step = self._scheduler.build_step(NO_STEP)
        if step.home is not None:
            self._driver.watch(step.home)
        for job in step.pulls:
            self._driver.submit(job)


def _run(pipe: Connection, cluster_id: int, config: str) -> None:
    instance = _Instance(cluster_id, json.loads(config))
    pipe.send_bytes(json.dumps(instance.port).encode())
    while True:
        try:
            do, *arguments = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(json.dumps(getattr(instance, do)(*arguments)).encode())
