"""RankDriver and the lives of instances: idle ones, successors on an old address, and the own one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from support.consumer import D_CLUSTER, Consumer, release
from support.endpoints import LOOPBACK, check
from support.kv_ranks import BLOCKS, DECODER_ROLE, KV, Place, make_kv
from support.pd import BLOCK_SIZE, WAIT_S, wait_until
from support.producer_process import ProducerProcess
from support.slow_relay import SlowRelay

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.worker import peers as peers_module

StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]


def no_link(consumer: Consumer, cluster_id: int) -> bool:
    return consumer.datadist.query_link(cluster_id)[1] is None


def pull(consumer: Consumer, producer: ProducerProcess, request_id: str, src: list[int], dst: list[int]) -> None:
    remote = producer.prefill(request_id, src)
    consumer.expect(producer, remote, dst)
    consumer.pull(request_id, remote, dst)
    consumer.wait(len(consumer.received) + 1)
    assert request_id not in consumer.failed
    consumer.check_bytes()


def test_an_idle_instance_is_unlinked_and_met_anew(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    producer, consumer = start_producer(tp_size=2), start_consumer(peer_ttl_s=0.2)
    for round_ in range(2):
        pull(consumer, producer, str(round_), [5, 6], [10 + 2 * round_, 11 + 2 * round_])
        assert consumer.observer.handshakes == round_ + 1
        wait_until(lambda: consumer.linked() == 0, "the eviction")
        wait_until(lambda: no_link(consumer, 100) and no_link(consumer, 1100), "the end of the links")
    assert consumer.failed == set()
    assert consumer.observer.failures == []


def test_an_instance_that_somebody_waits_for_is_not_idle(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    producer = start_producer(transport="cma")
    ttl_s = 1.0
    consumer = start_consumer(transport="cma", peer_ttl_s=ttl_s, handshake_timeout_s=60.0)
    remote = producer.prefill("r", [2])
    pull(consumer, producer, "warm", [1], [1])
    consumer.expect(producer, remote, [2])
    # The bytes come without P's help; the confirmation takes several times the instance's time to live.
    producer.stop()
    consumer.pull("r", remote, [2])
    resume_at = time.monotonic() + 3 * ttl_s
    wait_until(lambda: time.monotonic() >= resume_at, "several times the time to live")
    assert consumer.linked() == 1
    producer.resume()
    consumer.wait(2)
    assert consumer.failed == set()
    assert consumer.observer.handshakes == 1
    consumer.check_bytes()


def test_idle_instances_leave_one_by_one(start_producer: StartProducer, start_consumer: StartConsumer) -> None:
    idle, busy = start_producer(100), start_producer(101)
    consumer = start_consumer(peer_ttl_s=2.0)
    pull(consumer, idle, "idle", [1], [1])
    pull(consumer, busy, "busy", [1], [2])
    count = 0

    def one_has_gone() -> bool:
        nonlocal count
        count += 1
        pull(consumer, busy, f"busy {count}", [1], [2])
        return no_link(consumer, 100)

    wait_until(one_has_gone, "the eviction of the idle one")
    report = consumer.datadist.query_link(101)[1]
    assert report is not None
    assert report.alive
    assert consumer.observer.handshakes == 2


def test_a_new_incarnation_retires_the_old_one_at_once(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """P's host died, and its link hangs: only the proven new tenant of its address tells that it is gone."""
    first, consumer = start_producer(transport="cma"), start_consumer(transport="cma", handshake_timeout_s=60.0)
    pull(consumer, first, "warm", [1], [1])
    stale = first.prefill("stale", [2])
    first.stop_serving()
    second = start_producer(101, transport="cma", port=first.port)
    assert not no_link(consumer, 100)
    pull(consumer, second, "fresh", [4], [4])
    assert "another instance lives there now" in caplog.text
    wait_until(lambda: consumer.linked() == 1, "the end of the old links")
    wait_until(lambda: no_link(consumer, 100), "the end of the link")
    consumer.pull("stale", stale, [9], deadline_s=5.0)
    consumer.wait(3)
    assert (consumer.failed, consumer.invalid) == ({"stale"}, {9})
    assert consumer.observer.failures == [Failure.HANDSHAKE]
    pull(consumer, second, "after", [5], [5])


@pytest.mark.usefixtures("open_to_all")
def test_a_link_that_crosses_one_from_the_other_end(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """P has begun to link with us when we meet it: ours is refused while that goes on, and must not fail the pull."""
    caplog.set_level(logging.DEBUG, "vllm_datadist_connector.worker.peers")
    producer, consumer = start_producer(100), start_consumer(serves=True)
    remote = producer.prefill("r", [5])
    consumer.expect(producer, remote, [6])
    other_end = _native.LlmDataDist(100, DECODER_ROLE)
    check(other_end.initialize({"llm.DeviceId": "0"}))
    with SlowRelay(consumer.port, 50.0) as relay:
        us = _native.ClusterInfo(D_CLUSTER, [(LOOPBACK, relay.port)], [(LOOPBACK, 0)])
        dial = threading.Thread(target=other_end.link_clusters, args=([us], int(WAIT_S * 1000)))
        dial.start()
        # Greeted and answered; the next message takes seconds.
        assert relay.wait_until_moved(1, WAIT_S)
        assert relay.wait_until_moved(relay.moved + 1, WAIT_S)
        consumer.pull("r", remote, [6])
        wait_until(lambda: "LLM_PROCESSING_LINK: we try again" in caplog.text, "the refusal")
    dial.join()
    other_end.finalize()
    consumer.wait(1)
    assert consumer.failed == set()
    assert consumer.observer.failures == []
    consumer.check_bytes()


class TestOurselves:
    """The D of an earlier turn prefills the next one: its blocks are copied, for no engine links with itself."""

    @pytest.fixture
    def own(self) -> KV:
        return make_kv(D_CLUSTER, BLOCK_SIZE)

    @staticmethod
    def met_nobody(consumer: Consumer) -> bool:
        return consumer.observer.handshakes == consumer.linked() == 0 and no_link(consumer, D_CLUSTER)

    @pytest.mark.parametrize("transport", ["local", "auto"])
    @pytest.mark.parametrize(
        ("src", "dst"),
        [([5, 6, 7], [20, 21, 22]), ([5, 6, 7], [22, 21, 20]), ([5, 6, 9, 10, 7], [20, 21, 22, 23, 500]), ([511], [1])],
        ids=["one run", "backwards", "several runs", "the last block"],
    )
    def test_blocks_are_copied(
        self, start_consumer: StartConsumer, own: KV, transport: str, src: list[int], dst: list[int]
    ) -> None:
        consumer = start_consumer(transport=transport, serves=True)
        for round_ in range(2):
            remote = consumer.prefill(str(round_), src)
            consumer.expect(own, remote, dst)
            consumer.pull(str(round_), remote, dst)
            consumer.wait(round_ + 1)
            assert consumer.failed == set()
            consumer.check_bytes()
        moved = {transfer.num_bytes for transfer in consumer.observer.pulls}
        assert moved == {len(src) * consumer.memory[:, 0].nbytes}
        assert {transfer.transport for transfer in consumer.observer.pulls} == {Transport.OWN}
        assert self.met_nobody(consumer)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_rank_copies_its_own_heads(self, start_consumer: StartConsumer, rank: int) -> None:
        place = Place(tp_rank=rank, tp_size=2)
        consumer = start_consumer(place=place, serves=True)
        remote = consumer.prefill("r", [5, 9])
        consumer.expected[:, [20, 30]] = consumer.memory[:, [5, 9]]
        consumer.pull("r", remote, [20, 30])
        consumer.wait(1)
        assert consumer.failed == set()
        consumer.check_bytes()
        assert self.met_nobody(consumer)

    def test_only_the_tokens_that_are_missing(self, start_consumer: StartConsumer, own: KV) -> None:
        consumer = start_consumer(serves=True)
        remote = consumer.prefill("r", [0, 6, 7, 8])
        consumer.expect(own, remote, [0, 21, 22], first_token=BLOCK_SIZE)
        consumer.pull("r", remote, [0, 21, 22], first_token=BLOCK_SIZE)
        consumer.wait(1)
        assert consumer.failed == set()
        consumer.check_bytes()

    def test_a_lease_that_has_ended_fails_the_copy(self, start_consumer: StartConsumer) -> None:
        consumer = start_consumer(serves=True)
        remote = consumer.prefill("r", [5])
        release(remote)
        consumer.pull("r", remote, [20])
        consumer.wait(1)
        assert (consumer.failed, consumer.invalid) == ({"r"}, {20})
        assert consumer.observer.failures == [Failure.LEASE]

    def test_blocks_that_are_not_there_fail_the_copy(self, start_consumer: StartConsumer) -> None:
        consumer = start_consumer(serves=True)
        consumer.pull("r", consumer.prefill("r", [BLOCKS]), [20])
        consumer.wait(1)
        assert consumer.observer.failures == [Failure.PLAN]
        consumer.check_bytes()

    def test_unused_for_a_while(self, start_consumer: StartConsumer, own: KV) -> None:
        consumer = start_consumer(serves=True, peer_ttl_s=0.05)
        for round_ in range(2):
            remote = consumer.prefill(str(round_), [5])
            consumer.expect(own, remote, [20 + round_])
            consumer.pull(str(round_), remote, [20 + round_])
            consumer.wait(round_ + 1)
            wait_until(lambda: consumer.driver._instances.next_wake() is None, "the eviction")
        assert consumer.failed == set()
        assert self.met_nobody(consumer)
        consumer.check_bytes()

    def test_beside_another_instance(
        self, start_producer: StartProducer, start_consumer: StartConsumer, own: KV
    ) -> None:
        producer, consumer = start_producer(100), start_consumer(serves=True)
        pull(consumer, producer, "theirs", [1, 2], [30, 31])
        remote = consumer.prefill("ours", [5])
        consumer.expect(own, remote, [20])
        consumer.pull("ours", remote, [20])
        consumer.wait(2)
        pull(consumer, producer, "theirs again", [3], [32])
        assert consumer.observer.handshakes == consumer.linked() == 1
        assert no_link(consumer, D_CLUSTER)


class TestClusterIds:
    """An engine knows others by their cluster ids alone: a second owner of one would be taken for the first."""

    def refused(self, consumer: Consumer, producer: ProducerProcess, request_id: str) -> None:
        consumer.pull(request_id, producer.prefill(request_id, [1]), [1])
        consumer.wait(len(consumer.received) + 1)
        assert request_id in consumer.failed
        assert consumer.observer.failures[-1] is Failure.HANDSHAKE
        consumer.check_bytes()

    @pytest.mark.parametrize("serves", [False, True])
    def test_ours_is_refused(
        self,
        start_producer: StartProducer,
        start_consumer: StartConsumer,
        caplog: pytest.LogCaptureFixture,
        serves: bool,
    ) -> None:
        producer = start_producer(lies={"0": {"cluster_id": D_CLUSTER}})
        consumer = start_consumer(serves=serves)
        self.refused(consumer, producer, "r")
        assert f"cluster id {D_CLUSTER} is that of another instance's rank" in caplog.text
        assert no_link(consumer, D_CLUSTER)
        assert consumer.linked() == 0

    @pytest.mark.parametrize("rank", [0, 1])
    def test_that_of_a_linked_instance_is_refused(
        self,
        start_producer: StartProducer,
        start_consumer: StartConsumer,
        caplog: pytest.LogCaptureFixture,
        rank: int,
    ) -> None:
        first = start_producer(100, tp_size=2)
        second = start_producer(101, tp_size=2, lies={str(rank): {"cluster_id": 1100}})
        consumer = start_consumer()
        pull(consumer, first, "first", [1], [2])
        self.refused(consumer, second, "second")
        assert "cluster id 1100 is that of another instance's rank" in caplog.text
        pull(consumer, first, "first again", [3], [4])
        assert consumer.observer.handshakes == 1, "the first one's links are not touched"

    def test_is_free_once_its_owner_has_gone(
        self, start_producer: StartProducer, start_consumer: StartConsumer
    ) -> None:
        first, consumer = start_producer(100), start_consumer()
        pull(consumer, first, "first", [1], [2])
        first.kill()

        def lost() -> bool:
            report = consumer.datadist.query_link(100)[1]
            return report is None or not report.alive

        wait_until(lost, "the loss of the link")
        pull(consumer, start_producer(100), "second", [3], [4])
        assert consumer.observer.handshakes == 2


def test_made_up_instances_do_not_shut_out_a_real_one(
    start_producer: StartProducer, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client can invent tickets by the hundred; those that wait longest for an answer leave first."""
    monkeypatch.setattr(peers_module, "MAX_UNPROVEN", 8)
    monkeypatch.setattr(peers_module, "MAX_INSTANCES", 1)
    producer, frozen = start_producer(), start_producer(101)
    consumer = start_consumer(handshake_timeout_s=60.0)
    remote, silent = producer.prefill("real", [2]), frozen.prefill("silent", [2])
    frozen.stop()
    for index in range(30):
        ticket = msgspec.structs.replace(silent.ticket, incarnation=f"{index:032x}")
        forged = msgspec.structs.replace(silent, ticket=ticket)
        consumer.pull(f"forged {index}", forged, [20 + index], deadline_s=60.0)
    consumer.expect(producer, remote, [3])
    consumer.pull("real", remote, [3])
    # 7 of the forged ones still wait for their answer.
    consumer.wait(24)
    assert "real" in consumer.received
    assert consumer.failed == {f"forged {index}" for index in range(23)}
    consumer.check_bytes()
    frozen.resume()
