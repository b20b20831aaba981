"""PullDriver and the lives of instances: idle ones, successors on an old address, and the own one."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.consumer import D_CLUSTER, Consumer
from support.kv_ranks import make_kv
from support.pd import BLOCK_SIZE, wait_until
from support.producer_process import ProducerProcess

from vllm_datadist_connector.worker.transfers import Failure

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
        wait_until(lambda: consumer.driver.linked_peers() == 0, "the eviction")
        wait_until(lambda: no_link(consumer, 100) and no_link(consumer, 1100), "the end of the links")
    assert consumer.failed == set()
    assert consumer.observer.failures == []


def test_an_instance_that_somebody_waits_for_is_not_idle(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    producer = start_producer(transport="cma")
    consumer = start_consumer(transport="cma", peer_ttl_s=0.3, handshake_timeout_s=60.0)
    pull(consumer, producer, "warm", [1], [1])
    remote = producer.prefill("r", [2])
    consumer.expect(producer, remote, [2])
    # The bytes come without P's help; the confirmation takes several times the instance's time to live.
    producer.stop()
    consumer.pull("r", remote, [2])
    resume_at = time.monotonic() + 1.2
    wait_until(lambda: time.monotonic() >= resume_at, "several times the time to live")
    assert consumer.driver.linked_peers() == 1
    producer.resume()
    consumer.wait(2)
    assert consumer.failed == set()
    assert consumer.observer.handshakes == 1
    consumer.check_bytes()


def test_idle_instances_leave_one_by_one(start_producer: StartProducer, start_consumer: StartConsumer) -> None:
    idle, busy = start_producer(100), start_producer(101)
    consumer = start_consumer(peer_ttl_s=1.0)
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
    wait_until(lambda: consumer.driver.linked_peers() == 1, "the end of the old links")
    wait_until(lambda: no_link(consumer, 100), "the end of the link")
    consumer.pull("stale", stale, [9], deadline_s=5.0)
    consumer.wait(3)
    assert (consumer.failed, consumer.invalid) == ({"stale"}, {9})
    assert consumer.observer.failures == [Failure.HANDSHAKE]
    pull(consumer, second, "after", [5], [5])


OWN_CLUSTER = pytest.mark.xfail(
    reason="PullKvBlocks refuses the own cluster id, as documented: the driver must copy such blocks by itself, or the "
    "scheduler not ask for them",
    strict=True,
)


@OWN_CLUSTER
@pytest.mark.parametrize("transport", ["local", "auto"])
def test_pulls_from_itself(start_consumer: StartConsumer, transport: str) -> None:
    """The D of an earlier turn prefills the next one: its blocks come over a link of the engine with itself."""
    consumer = start_consumer(transport=transport, serves=True)
    own = make_kv(D_CLUSTER, BLOCK_SIZE)
    for round_ in range(2):
        remote = consumer.prefill(str(round_), [5, 6, 7])
        dst = [20 + 3 * round_ + i for i in range(3)]
        consumer.expect(own, remote, dst)
        consumer.pull(str(round_), remote, dst)
        consumer.wait(round_ + 1)
        assert consumer.failed == set()
        consumer.check_bytes()
    report = consumer.datadist.query_link(D_CLUSTER)[1]
    assert report is not None
    assert report.transport == "local"
    assert consumer.observer.handshakes == 1


@OWN_CLUSTER
def test_a_link_with_itself_that_was_lost_is_made_anew(start_consumer: StartConsumer) -> None:
    consumer = start_consumer(transport="local", serves=True, peer_ttl_s=0.2)
    own = make_kv(D_CLUSTER, BLOCK_SIZE)
    for round_ in range(2):
        remote = consumer.prefill(str(round_), [5])
        consumer.expect(own, remote, [20 + round_])
        consumer.pull(str(round_), remote, [20 + round_])
        consumer.wait(round_ + 1)
        wait_until(lambda: consumer.driver.linked_peers() == 0, "the eviction")
        wait_until(lambda: no_link(consumer, D_CLUSTER), "the end of the link")
    assert consumer.failed == set()
    assert consumer.observer.handshakes == 2
    consumer.check_bytes()
