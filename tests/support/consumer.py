"""A D rank for tests of the driver: memory, engine, driver, and what its scheduler would have been told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from support.channels import wait_for
from support.kv_ranks import DECODER_ROLE, KV, MIX_ROLE, Place, RankEngine, copy_tokens, make_kv
from support.pd import WAIT_S, wait_until
from support.producer_process import ProducerProcess, prefill, start_scheduler
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.params import RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.client import open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.worker.device import PASSED, Fence
from vllm_datadist_connector.worker.driver import RankDriver
from vllm_datadist_connector.worker.transfers import Transfer

D_CLUSTER = 900


def release(remote: RemotePrefill) -> None:
    """Returns once P has ended the lease."""
    with closing(open_client(Trust())) as client:
        endpoint = Endpoint(remote.remote_host, remote.remote_port)
        answer = wait_for(client, client.release(endpoint, (remote.ticket.token,), WAIT_S))
        assert answer.response is not None, answer.error


class Observer:
    def __init__(self) -> None:
        self.pulls: list[Transfer] = []
        self.failures: list[Failure] = []
        self.handshakes = 0

    def pulled(self, transfer: Transfer, seconds: float) -> None:
        assert seconds > 0
        self.pulls.append(transfer)

    def failed(self, reason: Failure) -> None:
        self.failures.append(reason)

    def handshake(self, seconds: float) -> None:
        assert seconds > 0
        self.handshakes += 1


class Consumer:
    """As configured; `transport` is that of its engine. `serves`: it is a P, too, and may pull from itself.

    Unless told otherwise it is patient: who counts its handshakes or its failures must not count a busy machine's.

    `access`: what peers may do with its memory.

    `capabilities`: those that the driver is to take its engine's for.
    """

    def __init__(
        self,
        transport: str = "auto",
        place: Place | None = None,
        serves: bool = False,
        capabilities: dict[str, Any] | None = None,
        provider: str = "engine",
        access: str = "read_write",
        **config: Any,
    ) -> None:
        self.place = place or Place()
        self.offers = access == "granted"
        """Whether it would have P push."""
        cluster_id = D_CLUSTER + self.place.tp_rank
        self.memory = self.place.part_of(make_kv(cluster_id, self.place.block_size))
        self.expected = self.memory.copy()
        settings = ConnectorConfig(
            **({"pull_timeout_s": WAIT_S, "handshake_timeout_s": WAIT_S, "peer_backoff_s": 0.3} | config)
        )
        options = {"llm.SyncKvCacheWaitTime": str(int(settings.pull_timeout_s * 1000))}
        if provider == "engine":
            options["datadist.PeerAccess"] = access
        role = MIX_ROLE if serves else DECODER_ROLE
        engine = RankEngine(cluster_id, role, self.place, self.memory, transport, provider, **options)
        self.datadist = engine.datadist
        geometry = engine.geometry()
        self.port = geometry.port
        self._scheduler: ProducerScheduler | None = None
        if serves:
            # It is told of no ranks, so whoever greets us is refused.
            self._scheduler = start_scheduler(block_size=self.place.block_size)
        self.observer = Observer()
        self.driver = RankDriver(
            self.datadist,
            geometry,
            engine.caches,
            settings,
            self.observer,
            self.datadist.capabilities._replace(**(capabilities or {})),
        )
        self.received: list[str] = []
        self.failed: set[str] = set()
        self.invalid: set[int] = set()

    def prefill(self, request_id: str, blocks: list[int]) -> RemotePrefill:
        """As P: a lease on our own blocks."""
        if self._scheduler is None:
            raise RuntimeError("this consumer does not serve")
        return parse_remote_prefill(prefill(self._scheduler, request_id, blocks, self.place.block_size))

    def pull(
        self,
        request_id: str,
        remote: RemotePrefill,
        local: Sequence[int],
        deadline_s: float = WAIT_S,
        first_token: int = 0,
        fence: Fence = PASSED,
    ) -> None:
        """All of P's tokens from `first_token` on, into local[0] and so on. From ourselves if we granted the lease."""
        self.driver.submit(
            PullJob(
                request_id=request_id,
                remote=remote,
                local_blocks=(tuple(local),),
                first_token=first_token,
                end_token=remote.remote_num_tokens,
                prompt_digest=remote.ticket.prompt_digest,
                from_ourselves=self._is_ours(remote),
                deadline_s=deadline_s,
            ),
            fence,
        )

    def expect(
        self, producer: ProducerProcess | KV, remote: RemotePrefill, local: Sequence[int], first_token: int = 0
    ) -> None:
        """`producer`: whose bytes, or an instance's bytes."""
        kv = producer.kv if isinstance(producer, ProducerProcess) else producer
        copy_tokens(kv, remote.remote_block_ids[0], self.expected, local, self.place, first_token)

    def wait(self, count: int) -> None:
        def arrived() -> bool:
            finished = self.driver.take_finished()
            assert finished.failed <= finished.received
            self.received += finished.received
            self.failed |= finished.failed
            self.invalid |= finished.invalid_blocks
            return len(self.received) >= count

        wait_until(arrived, f"the end of {count} pulls")
        assert len(set(self.received)) == len(self.received) == count

    def linked(self) -> int:
        """Worker ranks of P that we are linked with."""
        return sum(self.driver.linked_peers().values())

    def check_bytes(self) -> None:
        np.testing.assert_array_equal(self.memory, self.expected)

    def _is_ours(self, remote: RemotePrefill) -> bool:
        """By its address: each P of a test has one of its own."""
        ours = self._scheduler.endpoint if self._scheduler is not None else None
        return ours == (remote.remote_host, remote.remote_port)

    def close(self) -> None:
        self.driver.close()
        if self._scheduler is not None:
            self._scheduler.close()
        self.datadist.finalize()
