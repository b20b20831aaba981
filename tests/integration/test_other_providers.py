"""RankDriver over providers that can do less than our engine: it is told of them by their capabilities alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support.consumer import D_CLUSTER, Consumer
from support.engine_config import vllm_config
from support.kv_ranks import KV, PROMPT_ROLE, Place, RankEngine, make_kv
from support.pd import make_contract, wait_until
from support.producer_process import ProducerProcess, prefill, start_scheduler
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.metadata import StepMetadata
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.scheduler import producer as producer_module
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import ChannelServer, HandoffTable, LeaseTable, RoleSwitch
from vllm_datadist_connector.worker import build, quarantine
from vllm_datadist_connector.worker import worker as worker_module
from vllm_datadist_connector.worker.janitor import Janitor
from vllm_datadist_connector.worker.transfers import Failure
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]
P_CLUSTER = 100
WRITES_ON = {"writes_end_with_call": False, "reports_links": False}


def serve_impatiently(
    endpoint: Endpoint,
    engine_id: str,
    incarnation: str,
    leases: LeaseTable,
    trust: Trust,
    handoffs: HandoffTable,
    roles: RoleSwitch | None,
) -> ChannelServer:
    """Who has no connection has left at once."""
    trusted = (trust.auth, trust.insecure)
    return ChannelServer(
        *endpoint,
        engine_id,
        incarnation,
        PROTOCOL_VERSION,
        leases,
        *trusted,
        grace_s=0.0,
        handoffs=handoffs,
        roles=roles,
    )


class Gate:
    """A fence that passes when the test says so."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.asked = threading.Event()

    def has_passed(self) -> bool:
        self.asked.set()
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()


class TestFence:
    def test_nothing_is_written_before_it_has_passed(self, producer: ProducerProcess, consumer: Consumer) -> None:
        held, other = producer.prefill("held", [1, 2]), producer.prefill("other", [3])
        gate = Gate()
        consumer.pull("held", held, [5, 6], fence=gate)
        wait_until(gate.asked.is_set, "the link")
        consumer.expect(producer, other, [7])
        consumer.pull("other", other, [7])
        consumer.wait(1)
        consumer.check_bytes()
        # As a step in flight that still runs for the request which had these blocks before: on vLLM 0.23 they are
        # another's already.
        consumer.memory[:, [5, 6]] = ~consumer.memory[:, [5, 6]]
        gate.open()
        consumer.expect(producer, held, [5, 6])
        consumer.wait(2)
        assert consumer.failed == set()
        consumer.check_bytes()

    @pytest.mark.parametrize("cancelled", [True, False])
    def test_never_passed(self, producer: ProducerProcess, consumer: Consumer, cancelled: bool) -> None:
        remote, gate = producer.prefill("r", [1]), Gate()
        consumer.pull("r", remote, [5], fence=gate, deadline_s=30.0 if cancelled else 2.0)
        wait_until(gate.asked.is_set, "the link")
        if cancelled:
            consumer.driver.cancel("r")
        consumer.wait(1)
        assert consumer.failed == (set() if cancelled else {"r"})
        assert consumer.observer.failures == ([] if cancelled else [Failure.DEADLINE])
        consumer.check_bytes()


class Drafter:
    """P's device: what its drafter writes is there when it has been asked for a second time."""

    def __init__(self, kv: KV, block: int) -> None:
        self._kv, self._block = kv, block
        self.asked = 0

    def fence(self) -> Drafter:
        return self

    def has_passed(self) -> bool:
        self.asked += 1
        if self.asked == 2:
            self._kv[:, self._block] = ~self._kv[:, self._block]
        return self.asked > 1


class TestLateDrafts:
    """The first token of a prompt is known before its drafter has run, and sends D on its way."""

    def test_d_gets_what_the_drafter_wrote(
        self, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = make_kv(P_CLUSTER, Place().block_size)
        engine = RankEngine(P_CLUSTER, PROMPT_ROLE, Place(), memory, "local")
        written = memory.copy()
        written[:, 1] = ~written[:, 1]
        worker = make_worker(drafts_late=True)
        drafter = worker._device = Drafter(memory, 1)  # type: ignore[assignment]
        monkeypatch.setattr(build, "build_worker", lambda *_: worker)
        connector: Any = DataDistConnector(
            vllm_config("kv_producer"), KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=())
        )
        with closing(start_scheduler()) as scheduler:
            scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(engine.geometry())})
            consumer = start_consumer(transport="local")
            connector.bind_connector_metadata(StepMetadata())
            connector.wait_for_save()
            remote = parse_remote_prefill(prefill(scheduler, "r", [1]))
            consumer.expect(written, remote, [5])
            consumer.pull("r", remote, [5])
            consumer.wait(1)
            consumer.check_bytes()
        assert drafter.asked == 2
        engine.datadist.finalize()

    def test_nobody_waits_without_one(self) -> None:
        worker = make_worker(drafts_late=False)
        drafter = worker._device = Drafter(make_kv(1, 16), 1)  # type: ignore[assignment]
        worker.end_forward(StepMetadata())
        assert drafter.asked == 0

    def test_a_device_that_hangs_is_told_of(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And vLLM is not held any longer: it notices by itself."""
        monkeypatch.setattr(worker_module, "_DRAFTS_S", 0.05)
        worker = make_worker(drafts_late=True)
        worker._device = SimpleNamespace(fence=Gate)  # type: ignore[assignment]
        worker.end_forward(StepMetadata())
        assert "drafter's work has not ended within 0.05 s" in caplog.text


def make_worker(drafts_late: bool) -> ConnectorWorker:
    return ConnectorWorker(
        ConnectorConfig(),
        _native.LlmDataDist(1, PROMPT_ROLE),
        make_contract(),
        RankPlace(0, 0, 1, 1, 0),
        {},
        (16,),
        duties=Duties(gives=True, takes=False),
        drafts_late=drafts_late,
    )


@contextmanager
def links_that_stay(consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No unlink call finds room in the queue meanwhile, however often it is tried."""
    unlinkings, refused = consumer.driver._links._unlinkings, []

    class Full:
        def submit_unlink(self, *call: object) -> int:
            refused.append(call)
            raise _native.QueueFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(unlinkings, "_queue", Full())
        yield
        wait_until(lambda: len(refused) > 2, "more tries of the unlink call")


class TestLateWrites:
    """A call that has failed may go on writing until its link is gone."""

    def test_blocks_are_kept_until_the_link_is_gone(
        self,
        start_producer: StartProducer,
        start_consumer: StartConsumer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(quarantine, "LONG_S", 0.2)
        stopped, healthy = start_producer(P_CLUSTER), start_producer(P_CLUSTER + 1)
        consumer = start_consumer(capabilities=WRITES_ON)
        first = stopped.prefill("first", [1])
        consumer.expect(stopped, first, [1])
        consumer.pull("first", first, [1])
        consumer.wait(1)
        late = stopped.prefill("late", [2, 3])
        with caplog.at_level(logging.CRITICAL), links_that_stay(consumer, monkeypatch):
            stopped.kill()
            consumer.pull("late", late, [2, 3], deadline_s=3.0)
            wait_until(lambda: consumer.driver.quarantined_blocks() == 2, "the failure")
            wait_until(lambda: bool(caplog.records), "a line for the operator")
            remote = healthy.prefill("healthy", [4])
            consumer.expect(healthy, remote, [4])
            consumer.pull("healthy", remote, [4])
            consumer.wait(2)
            assert "healthy" in consumer.received
            assert consumer.driver.quarantined_blocks() == 2
        consumer.wait(3)
        assert (consumer.failed, consumer.invalid) == ({"late"}, {2, 3})
        wait_until(lambda: consumer.driver.quarantined_blocks() == 0, "an empty quarantine")
        assert [record.levelname for record in caplog.records] == ["CRITICAL"]
        assert "2 blocks are kept back" in caplog.text

    def test_a_cancelled_one_keeps_its_blocks_too(
        self, producer: ProducerProcess, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        consumer = start_consumer(capabilities=WRITES_ON)
        first = producer.prefill("first", [1])
        consumer.expect(producer, first, [1])
        consumer.pull("first", first, [1])
        consumer.wait(1)
        cancelled = producer.prefill("cancelled", [2])
        with links_that_stay(consumer, monkeypatch):
            producer.kill()
            consumer.pull("cancelled", cancelled, [2])
            wait_until(lambda: consumer.driver._transfers.written_over(P_CLUSTER) != [], "the fault")
            consumer.driver.cancel("cancelled")
            wait_until(lambda: consumer.driver.quarantined_blocks() == 1, "the cancellation")
            assert consumer.driver.take_finished().received == set()
        consumer.wait(2)
        assert consumer.failed == set()

    def test_a_second_attempt_waits_for_the_end_of_the_first(
        self, producer: ProducerProcess, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        consumer = start_consumer(transport="tcp", capabilities=WRITES_ON)
        remote, other = producer.prefill("r", [1, 2]), producer.prefill("other", [3])
        consumer.expect(producer, remote, [5, 6])
        consumer.expect(producer, other, [7])
        submit, calls = consumer.driver._queue.submit_pull_blocks, []

        class Queue:
            """The first pull fails as over a link that was lost."""

            def submit_pull_blocks(self, cluster_id: int, src: int, dst: int, *blocks: object, **more: object) -> int:
                assert not consumer.driver._links._unlinkings.is_pending(cluster_id)
                calls.append(cluster_id)
                return submit(cluster_id, src if len(calls) > 1 else 1 << 40, dst, *blocks, **more)  # type: ignore[arg-type]

            def __getattr__(self, name: str) -> object:
                return getattr(queue, name)

        queue = consumer.driver._queue
        monkeypatch.setattr(consumer.driver._pulls._calls, "_queue", Queue())
        with links_that_stay(consumer, monkeypatch):
            consumer.pull("r", remote, [5, 6])
            wait_until(lambda: consumer.driver._transfers.written_over(P_CLUSTER) != [], "the fault")
            consumer.pull("other", other, [7])
        consumer.wait(2)
        assert (consumer.failed, len(calls)) == (set(), 3)
        consumer.check_bytes()


class TestLinks:
    def test_what_cannot_be_told_is_alive(self, producer: ProducerProcess, start_consumer: StartConsumer) -> None:
        """A provider that reports no links would otherwise lose each at once."""
        consumer = start_consumer(capabilities={"reports_links": False})
        for index, request_id in enumerate(("a", "b"), start=1):
            remote = producer.prefill(request_id, [index])
            consumer.expect(producer, remote, [index])
            consumer.pull(request_id, remote, [index])
            consumer.wait(index)
        assert consumer.failed == set()
        assert consumer.observer.handshakes == 1
        consumer.check_bytes()

    def test_the_idlest_makes_room(self, start_producer: StartProducer, start_consumer: StartConsumer) -> None:
        producers = [start_producer(P_CLUSTER + i) for i in range(3)]
        consumer = start_consumer(capabilities={"max_links": 2})
        for index in (0, 1, 2, 1, 0):
            request_id = f"r{len(consumer.received)}"
            remote = producers[index].prefill(request_id, [1 + index])
            consumer.expect(producers[index], remote, [1 + index])
            consumer.pull(request_id, remote, [1 + index])
            consumer.wait(len(consumer.received) + 1)
        assert consumer.failed == set()
        assert (
            consumer.observer.handshakes == 4
        )  # the third P took the first one's place, and the first one its own back
        assert sum(consumer.driver.linked_peers().values()) == 2
        consumer.check_bytes()

    def test_nobody_in_use_makes_room(self, start_producer: StartProducer, start_consumer: StartConsumer) -> None:
        first, second = start_producer(P_CLUSTER), start_producer(P_CLUSTER + 1)
        consumer = start_consumer(capabilities={"max_links": 1})
        held, gate = first.prefill("held", [1]), Gate()
        consumer.pull("held", held, [1], fence=gate)
        wait_until(gate.asked.is_set, "the link")
        waiting = second.prefill("waiting", [2])
        consumer.pull("waiting", waiting, [2])
        wait_until(lambda: any(i.faults for i in consumer.driver._transfers.instances()), "a refusal")
        assert sum(consumer.driver.linked_peers().values()) == 1
        gate.open()
        consumer.expect(first, held, [1])
        consumer.expect(second, waiting, [2])
        consumer.wait(2)
        assert consumer.failed == set()
        consumer.check_bytes()

    def test_p_is_told_at_the_end(self, producer: ProducerProcess, start_consumer: StartConsumer) -> None:
        """Where its half of the link would stay otherwise."""
        consumer = start_consumer(capabilities={"peer_drops_half": False})
        remote = producer.prefill("r", [1])
        consumer.pull("r", remote, [1])
        consumer.wait(1)
        consumer.driver.close()
        assert consumer.datadist.query_link(P_CLUSTER)[0] == _native.LLM_NOT_YET_LINK

    def test_p_ends_its_half_when_d_is_gone(
        self, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It hears by the side channel, and by nothing else."""
        monkeypatch.setattr(producer_module, "serve", serve_impatiently)
        memory = make_kv(P_CLUSTER, Place().block_size)
        engine = RankEngine(P_CLUSTER, PROMPT_ROLE, Place(), memory, "tcp")
        with closing(start_scheduler()) as scheduler, closing(Janitor(engine.datadist)) as janitor:
            scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(engine.geometry())})
            consumer = start_consumer(transport="tcp")
            consumer.pull("r", parse_remote_prefill(prefill(scheduler, "r", [1])), [1])
            consumer.wait(1)
            assert consumer.failed == set()
            assert scheduler.take_left_askers() == ()
            assert engine.datadist.query_link(D_CLUSTER)[0] == _native.LLM_SUCCESS
            consumer.driver.close()
            left: list[int] = []
            wait_until(lambda: bool(left.extend(scheduler.take_left_askers()) or left), "the end of its connection")
            assert left == [D_CLUSTER]
            janitor.unlink([*left, 12345])
            wait_until(
                lambda: engine.datadist.query_link(D_CLUSTER)[0] == _native.LLM_NOT_YET_LINK, "the end of P's half"
            )
        engine.datadist.finalize()

    def test_a_call_gets_the_least_time_out(
        self, producer: ProducerProcess, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        consumer = start_consumer(capabilities={"min_link_timeout_ms": 60_000})
        queue, limits = consumer.driver._queue, []

        class Queue:
            def submit_link(self, cluster: _native.ClusterInfo, timeout_ms: int, deadline_ms: int) -> int:
                limits.append(timeout_ms)
                return queue.submit_link(cluster, timeout_ms, deadline_ms)

        monkeypatch.setattr(consumer.driver._links, "_queue", Queue())
        consumer.pull("r", producer.prefill("r", [1]), [1])
        consumer.wait(1)
        assert limits == [60_000]
