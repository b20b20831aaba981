"""RankDriver with a real engine against real P processes: every way a pull can end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from support.consumer import Consumer, release
from support.kv_ranks import BLOCKS
from support.pd import WAIT_S, wait_until
from support.producer_process import ProducerProcess

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.params import RemotePrefill

P_CLUSTER = 100


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_bytes_are_the_owners(
    start_producer: Callable[..., ProducerProcess], start_consumer: Callable[..., Consumer], transport: str
) -> None:
    producer, consumer = start_producer(transport=transport), start_consumer(transport=transport)
    remote = producer.prefill("r", [5, 63, 511, 17, 18])
    consumer.expect(producer, remote, [9, 2, 60, 3, 4])
    consumer.pull("r", remote, [9, 2, 60, 3, 4])
    consumer.wait(1)
    assert (consumer.received, consumer.failed, consumer.invalid) == (["r"], set(), set())
    consumer.check_bytes()
    (transfer,) = consumer.observer.pulls
    assert (transfer.num_bytes, transfer.transport) == (5 * consumer.memory[:, 0].nbytes, Transport(transport))
    assert consumer.driver.linked_peers() == {Transport(transport): 1}
    assert consumer.observer.handshakes == 1


def test_nothing_to_read_is_confirmed_too(producer: ProducerProcess, consumer: Consumer) -> None:
    remote = producer.prefill("r", [1])
    consumer.driver.submit(PullJob("r", remote, ((),), 16, 16, remote.ticket.prompt_digest, False, WAIT_S))
    consumer.wait(1)
    assert consumer.failed == set()
    consumer.check_bytes()


def test_a_lease_that_ended_before_the_confirmation_fails_the_pull(
    producer: ProducerProcess, consumer: Consumer
) -> None:
    remote = producer.prefill("r", [1, 2])
    release(remote)
    assert producer.take_ended() == ["r"]
    consumer.pull("r", remote, [7, 8])
    consumer.wait(1)
    assert (consumer.failed, consumer.invalid) == ({"r"}, {7, 8})
    assert consumer.observer.failures == [Failure.LEASE]


def test_blocks_in_another_order_are_not_confirmed(producer: ProducerProcess, consumer: Consumer) -> None:
    granted = producer.prefill("r", [1, 2])
    forged = RemotePrefill(
        **{name: getattr(granted, name) for name in granted.__struct_fields__} | {"remote_block_ids": ((2, 1),)}
    )
    consumer.pull("r", forged, [7, 8])
    consumer.wait(1)
    assert consumer.failed == {"r"}
    assert consumer.observer.failures == [Failure.LEASE]


def test_hundreds_of_pulls_at_once(start_producer: Callable[..., ProducerProcess], consumer: Consumer) -> None:
    producers = [start_producer(P_CLUSTER + i) for i in range(2)]
    sources = 1 + np.random.default_rng(5).permutation(BLOCKS - 1)
    for i in range(300):
        producer = producers[i % 2]
        remote = producer.prefill(f"r{i}", [int(sources[i])])
        consumer.expect(producer, remote, [1 + i])
        consumer.pull(f"r{i}", remote, [1 + i])
    consumer.wait(300)
    assert consumer.failed == set()
    consumer.check_bytes()
    assert consumer.observer.handshakes == 2


def test_p_is_killed(start_producer: Callable[..., ProducerProcess], consumer: Consumer) -> None:
    killed, healthy = start_producer(P_CLUSTER), start_producer(P_CLUSTER + 1)
    first, second = killed.prefill("first", [1]), killed.prefill("second", [2])
    consumer.expect(killed, first, [1])
    consumer.pull("first", first, [1])
    consumer.wait(1)
    killed.kill()
    consumer.pull("second", second, [2], deadline_s=3.0)
    remote = healthy.prefill("healthy", [3])
    consumer.expect(healthy, remote, [3])
    consumer.pull("healthy", remote, [3])
    consumer.wait(3)
    assert (consumer.failed, consumer.invalid) == ({"second"}, {2})
    consumer.check_bytes()


def test_p_restarts_on_the_same_address(
    start_producer: Callable[..., ProducerProcess], start_consumer: Callable[..., Consumer]
) -> None:
    first, consumer = start_producer(P_CLUSTER), start_consumer()
    remote, stale = first.prefill("a", [1]), first.prefill("stale", [2])
    consumer.expect(first, remote, [1])
    consumer.pull("a", remote, [1])
    consumer.wait(1)
    first.kill()

    second = start_producer(P_CLUSTER + 1, port=first.port)
    fresh = second.prefill("b", [4])
    consumer.pull("stale", stale, [2], deadline_s=5.0)
    consumer.expect(second, fresh, [5])
    consumer.pull("b", fresh, [5])
    consumer.wait(3)
    assert (consumer.failed, consumer.invalid) == ({"stale"}, {2})
    consumer.check_bytes()
    wait_until(lambda: consumer.linked() == 1, "the end of the dead peer")


def test_incompatible_models_name_the_field_and_fail_fast(
    start_producer: Callable[..., ProducerProcess],
    start_consumer: Callable[..., Consumer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    producer = start_producer(lies={"0": {"contract": {"kv_cache_dtype": "fp8"}}})
    consumer = start_consumer(peer_backoff_s=60.0)
    for index in range(2):
        consumer.pull(str(index), producer.prefill(str(index), [1]), [1 + index])
        consumer.wait(index + 1)
    assert consumer.failed == {"0", "1"}
    assert consumer.observer.failures == [Failure.HANDSHAKE] * 2
    assert consumer.observer.handshakes == 0
    refusal = f"{producer.endpoint} is not compatible: kv_cache_dtype: ours 'torch.bfloat16', theirs 'fp8'"
    assert refusal in caplog.text
    consumer.check_bytes()


def test_cancelled_while_it_waits_for_its_peer(
    producer: ProducerProcess, start_consumer: Callable[..., Consumer]
) -> None:
    consumer = start_consumer(handshake_timeout_s=60.0)
    remote = producer.prefill("r", [1])
    producer.stop()
    consumer.pull("r", remote, [1])
    consumer.driver.cancel("r")
    consumer.wait(1)
    assert consumer.failed == set(), "a cancelled request only wants its blocks back"
    consumer.check_bytes()


def test_cancelled_while_it_is_confirmed(
    start_producer: Callable[..., ProducerProcess], start_consumer: Callable[..., Consumer]
) -> None:
    producer = start_producer(transport="cma")
    consumer = start_consumer(transport="cma", handshake_timeout_s=60.0)
    warm, remote = producer.prefill("warm", [1]), producer.prefill("r", [2])
    consumer.pull("warm", warm, [1])
    consumer.wait(1)
    # Reading another process's memory needs nothing of that process; only the confirmation does.
    producer.stop()
    consumer.expect(producer, warm, [1])
    consumer.expect(producer, remote, [2])
    consumer.pull("r", remote, [2])
    wait_until(lambda: np.array_equal(consumer.memory, consumer.expected), "the bytes")
    consumer.driver.cancel("r")
    consumer.wait(2)
    assert consumer.failed == set()
    assert len(consumer.observer.pulls) == 1


def test_cancelled_while_a_pull_runs(
    start_producer: Callable[..., ProducerProcess], start_consumer: Callable[..., Consumer]
) -> None:
    producer, consumer = start_producer(transport="tcp"), start_consumer(transport="tcp", pull_timeout_s=0.7)
    warm, remote = producer.prefill("warm", [1]), producer.prefill("r", [2])
    consumer.expect(producer, warm, [1])
    consumer.pull("warm", warm, [1])
    consumer.wait(1)
    producer.stop()
    started = time.monotonic()
    consumer.pull("r", remote, [2])
    consumer.driver.cancel("r")
    consumer.wait(2)
    assert time.monotonic() - started < WAIT_S / 2, "its deadline is later"
    assert consumer.failed == set()
    producer.resume()
    consumer.check_bytes()


def test_the_deadline_ends_a_pull_from_a_stopped_p(
    producer: ProducerProcess, start_consumer: Callable[..., Consumer]
) -> None:
    consumer = start_consumer(handshake_timeout_s=60.0)
    remote = producer.prefill("r", [1])
    producer.stop()
    started = time.monotonic()
    consumer.pull("r", remote, [1], deadline_s=0.3)
    consumer.wait(1)
    assert 0.3 <= time.monotonic() - started < WAIT_S
    assert consumer.failed == {"r"}
    assert consumer.observer.failures == [Failure.DEADLINE]


def test_an_idle_link_that_was_lost_is_made_anew(producer: ProducerProcess, consumer: Consumer) -> None:
    for index in range(2):
        remote = producer.prefill(str(index), [1 + index])
        consumer.expect(producer, remote, [20 + index])
        consumer.pull(str(index), remote, [20 + index])
        consumer.wait(index + 1)
        if index == 0:
            status, _ = consumer.datadist.unlink_clusters([_native.ClusterInfo(P_CLUSTER)], 1000, True)
            assert status == _native.LLM_SUCCESS, _native.last_error()
    assert consumer.failed == set()
    assert consumer.observer.handshakes == 2
    consumer.check_bytes()


def test_a_fault_of_ours_fails_the_request_and_not_the_next(
    producer: ProducerProcess, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        del arguments
        raise KeyError("bug")

    remote = producer.prefill("r", [1])
    with monkeypatch.context() as patch:
        patch.setattr(consumer.driver._instances, "meet", fail)
        consumer.pull("broken", remote, [1])
        consumer.wait(1)
    assert consumer.failed == {"broken"}
    assert consumer.observer.failures == [Failure.INTERNAL]
    consumer.expect(producer, remote, [1])
    consumer.pull("r", remote, [1])
    consumer.wait(2)
    assert consumer.failed == {"broken"}
    consumer.check_bytes()


def test_measurements_may_be_read_from_another_thread(
    start_producer: Callable[..., ProducerProcess], consumer: Consumer
) -> None:
    stop, faults = threading.Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                consumer.linked()
        except RuntimeError as error:
            faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    producers = [start_producer(P_CLUSTER + i) for i in range(3)]
    for i, producer in enumerate(producers):
        consumer.pull(str(i), producer.prefill(str(i), [1 + i]), [1 + i])
    consumer.wait(3)
    stop.set()
    reader.join()
    assert faults == []
    assert consumer.failed == set()
    wait_until(lambda: consumer.linked() == 3, "the count of peers")


def test_close_ends_with_pulls_under_way(producer: ProducerProcess, start_consumer: Callable[..., Consumer]) -> None:
    consumer = start_consumer(handshake_timeout_s=60.0)
    remote = producer.prefill("r", [1])
    producer.stop()
    consumer.pull("r", remote, [1], deadline_s=60.0)
    started = time.monotonic()
    consumer.driver.close()
    assert time.monotonic() - started < WAIT_S
