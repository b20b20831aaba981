"""A D rank for tests of the pull driver: memory, engine, driver, and what its scheduler would have been told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from support.endpoints import copy_blocks
from support.pd import WAIT_S, wait_until
from support.producer_process import ProducerProcess, geometry_of, make_memory, start_engine
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.worker.driver import PullDriver
from vllm_datadist_connector.worker.transfers import Failure, Transfer

D_CLUSTER = 900
_DECODER_ROLE = 2


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
    """As configured; `transport` is that of its engine."""

    def __init__(self, transport: str = "auto", **config: Any) -> None:
        self.memory = make_memory(D_CLUSTER)
        self.expected = self.memory.copy()
        settings = ConnectorConfig(
            **({"pull_timeout_s": 1.0, "handshake_timeout_s": 1.0, "peer_backoff_s": 0.3} | config)
        )
        timeout = {"llm.SyncKvCacheWaitTime": str(int(settings.pull_timeout_s * 1000))}
        self.datadist, cache_id = start_engine(D_CLUSTER, _DECODER_ROLE, self.memory, transport, **timeout)
        self.observer = Observer()
        self.driver = PullDriver(self.datadist, geometry_of(D_CLUSTER, cache_id, 0), settings, self.observer)
        self.received: list[str] = []
        self.failed: set[str] = set()
        self.invalid: set[int] = set()

    def pull(self, request_id: str, remote: RemotePrefill, local: Sequence[int], deadline_s: float = WAIT_S) -> None:
        self.driver.submit(
            PullJob(
                request_id=request_id,
                remote=remote,
                remote_blocks=remote.remote_block_ids,
                local_blocks=(tuple(local),),
                prompt_digest=remote.ticket.prompt_digest,
                deadline_s=deadline_s,
            )
        )

    def expect(self, producer: ProducerProcess, remote: RemotePrefill, local: Sequence[int]) -> None:
        copy_blocks(producer.memory, self.expected, remote.remote_block_ids[0], local)

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

    def check_bytes(self) -> None:
        np.testing.assert_array_equal(self.memory, self.expected)

    def close(self) -> None:
        self.driver.close()
        self.datadist.finalize()
