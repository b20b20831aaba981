"""RankDriver and links that fail under its pulls: they cost time, up to each pull's deadline, and nobody else's."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.consumer import Consumer, release
from support.kv_ranks import BLOCKS
from support.pd import WAIT_S, wait_until
from support.producer_process import ProducerProcess
from support.wire import OWN

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.worker.calls import Calls
from vllm_datadist_connector.worker.instances import MAX_FAULTS
from vllm_datadist_connector.worker.transfers import Transfer

StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]

P_CLUSTER = 100
IN_TIME_S = WAIT_S / 3
"""How much later than its deadline a pull may end: on a busy machine, and before any other limit."""


def warmed(producer: ProducerProcess, consumer: Consumer) -> None:
    """Met and linked, so that what follows is about pulls."""
    remote = producer.prefill("warm", [1])
    consumer.expect(producer, remote, [1])
    consumer.pull("warm", remote, [1])
    consumer.wait(1)


def cut(consumer: Consumer) -> None:
    """The link, at our end and by force; whatever runs over it fails."""
    consumer.datadist.unlink_clusters([_native.ClusterInfo(P_CLUSTER)], 1000, True)


def test_pulls_from_a_p_that_was_stopped_are_made_again(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one's time-out interrupts those behind it, too: each would wait for its own."""
    producer = start_producer(transport="tcp")
    timeout_s = 2.0
    consumer = start_consumer(transport="tcp", pull_timeout_s=timeout_s, handshake_timeout_s=0.3)
    warmed(producer, consumer)
    remotes = [producer.prefill(f"r{i}", [1 + i]) for i in range(8)]
    producer.stop()
    for i, remote in enumerate(remotes):
        consumer.expect(producer, remote, [10 + i])
        consumer.pull(f"r{i}", remote, [10 + i])
    wait_until(lambda: "linking again" in caplog.text, "the end of the link")
    producer.resume()
    started = time.monotonic()
    consumer.wait(9)
    assert time.monotonic() - started < 5 * timeout_s
    assert consumer.failed == set()
    assert consumer.observer.failures == []
    assert consumer.observer.handshakes == 2
    consumer.check_bytes()


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_links_that_are_cut_again_and_again(
    start_producer: StartProducer, start_consumer: StartConsumer, transport: str
) -> None:
    producer = start_producer(transport=transport)
    consumer = start_consumer(transport=transport, peer_backoff_s=0.05)
    warmed(producer, consumer)
    sources = 1 + np.random.default_rng(7).permutation(BLOCKS - 1)
    cuts = 0
    for i in range(200):
        remote = producer.prefill(f"r{i}", [int(sources[i])])
        consumer.expect(producer, remote, [2 + i])
        consumer.pull(f"r{i}", remote, [2 + i], deadline_s=60.0)
        if i % 40 == 20:
            wait_until(lambda: consumer.linked() == 1, "the link")
            cut(consumer)
            cuts += 1
    consumer.wait(201)
    assert consumer.failed == set()
    assert consumer.observer.handshakes > 1
    consumer.check_bytes()


def test_a_lease_that_ends_before_the_second_attempt_fails_the_pull(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    producer, consumer = start_producer(transport="tcp"), start_consumer(transport="tcp", pull_timeout_s=0.3)
    warmed(producer, consumer)
    remote = producer.prefill("r", [2])
    producer.stop()
    consumer.pull("r", remote, [3])
    wait_until(lambda: "linking again" in caplog.text, "the end of the link")
    producer.resume()
    release(remote)
    consumer.wait(2)
    assert (consumer.failed, consumer.invalid) == ({"r"}, {3})
    assert consumer.observer.failures == [Failure.LEASE]


@pytest.mark.parametrize("others_succeed", [False, True])
def test_what_fails_over_every_link_is_given_up(
    producer: ProducerProcess, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch, others_succeed: bool
) -> None:
    """Or it would break the links of others until its deadline."""
    consumer = start_consumer(peer_backoff_s=0.01)
    warmed(producer, consumer)
    good, bad = producer.prefill("good", [2]), producer.prefill("bad", [3])
    submit, attempts = consumer.driver._pulls._calls._submit, []

    def into_no_cache(transfer: Transfer, *arguments: Any) -> int:
        attempts.append(transfer)
        if others_succeed:
            transfer.instance.faults = 0
        with monkeypatch.context() as patch:
            patch.setattr(consumer.driver._pulls._calls._caches, "view", lambda *_: 1 << 40)
            return submit(transfer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(consumer.driver._pulls._calls, "_submit", into_no_cache)
        consumer.pull("bad", bad, [5], deadline_s=60.0)
        consumer.wait(2)
    assert consumer.observer.failures == [Failure.TRANSFER]
    assert len(attempts) == MAX_FAULTS
    consumer.expect(producer, good, [6])
    consumer.pull("good", good, [6])
    consumer.wait(3)
    assert consumer.failed == {"bad"}
    consumer.check_bytes()


def test_links_that_are_never_to_be_had_are_given_up(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """P lives, or its greeting would say so, but nobody listens where its engine is said to be."""
    with socket.create_server((OWN, 0)) as closed:
        host, port = closed.getsockname()
    producer, consumer = start_producer(lies={"0": {"host": host, "port": port}}), start_consumer(peer_backoff_s=0.02)
    consumer.pull("r", producer.prefill("r", [1]), [2], deadline_s=600.0)
    consumer.wait(1)
    assert consumer.observer.failures == [Failure.LINK]
    assert f"({MAX_FAULTS} times in a row)" in caplog.text


class TestFullQueue:
    @pytest.fixture(autouse=True)
    def one_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "TransferQueue", functools.partial(_native.TransferQueue, capacity=1))

    @pytest.fixture
    def submitted(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The requests of calls that found room."""
        requests, submit = [], Calls._submit

        def noted(calls: Calls, transfer: Transfer, *arguments: Any) -> int:
            call = submit(calls, transfer, *arguments)
            requests.append(transfer.job.request_id)
            return call

        monkeypatch.setattr(Calls, "_submit", noted)
        return requests

    def test_is_waited_for(
        self, start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """By links, and by calls of one pull that the others have come between."""
        producer, consumer = start_producer(tp_size=2), start_consumer()
        for i in range(20):
            remote = producer.prefill(f"r{i}", [1 + i])
            consumer.expect(producer, remote, [101 + i])
            consumer.pull(f"r{i}", remote, [101 + i])
        consumer.wait(20)
        assert consumer.failed == set()
        assert consumer.observer.failures == []
        assert "linking again" not in caplog.text
        consumer.check_bytes()

    @pytest.mark.parametrize("again", [False, True])
    def test_is_not_waited_for_by_what_is_over(
        self, start_producer: StartProducer, start_consumer: StartConsumer, submitted: list[str], again: bool
    ) -> None:
        """Cancelled, or to begin anew: its other call would be for nobody, or over links that are gone."""
        producer = start_producer(tp_size=2, transport="tcp")
        consumer = start_consumer(transport="tcp", pull_timeout_s=2.0 if again else WAIT_S)
        warmed(producer, consumer)
        remote = producer.prefill("r", [2])
        producer.stop()
        consumer.expect(producer, remote, [3])
        consumer.pull("r", remote, [3])
        if again:
            wait_until(lambda: not consumer.driver.linked_peers(), "the end of the links")
        else:
            wait_until(lambda: "r" in submitted, "its first call")
            consumer.driver.cancel("r")
            wait_until(lambda: consumer.driver._transfers.get("r").cancelled, "the end of the request")
        producer.resume()
        consumer.wait(2)
        assert consumer.failed == set()
        assert submitted.count("r") == (3 if again else 1)
        if again:
            consumer.check_bytes()

    def test_is_waited_for_until_the_deadline(
        self, start_producer: StartProducer, start_consumer: StartConsumer
    ) -> None:
        producer = start_producer(transport="tcp")
        consumer = start_consumer(transport="tcp", pull_timeout_s=WAIT_S)
        warmed(producer, consumer)
        patient, hasty, gone = (producer.prefill(name, [2]) for name in ("patient", "hasty", "gone"))
        consumer.expect(producer, patient, [4])
        producer.stop()
        consumer.pull("patient", patient, [4])
        consumer.pull("hasty", hasty, [5], deadline_s=0.3)
        consumer.pull("gone", gone, [6])
        consumer.driver.cancel("gone")
        consumer.wait(3)
        assert consumer.failed == {"hasty"}
        assert consumer.observer.failures == [Failure.DEADLINE]
        producer.resume()
        consumer.wait(4)
        assert consumer.failed == {"hasty"}
        consumer.check_bytes()


class TestDeadline:
    def test_passed_in_the_queue_costs_nobody_else(
        self, start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It never ran, which says nothing of the link that the one before it is still using."""
        producer = start_producer(transport="tcp")
        consumer = start_consumer(transport="tcp", pull_timeout_s=WAIT_S)
        warmed(producer, consumer)
        patient, hasty = producer.prefill("patient", [2]), producer.prefill("hasty", [3])
        consumer.expect(producer, patient, [4])
        producer.stop()
        consumer.pull("patient", patient, [4])
        consumer.pull("hasty", hasty, [5], deadline_s=0.3)
        consumer.wait(2)
        assert consumer.failed == {"hasty"}
        assert consumer.observer.failures == [Failure.DEADLINE]
        producer.resume()
        consumer.wait(3)
        assert consumer.failed == {"hasty"}
        assert consumer.observer.handshakes == 1
        assert "linking again" not in caplog.text
        consumer.check_bytes()

    def test_ends_a_pull_that_runs(self, start_producer: StartProducer, start_consumer: StartConsumer) -> None:
        producer, consumer = start_producer(transport="tcp"), start_consumer(transport="tcp")
        warmed(producer, consumer)
        remote = producer.prefill("r", [2])
        producer.stop()
        started = time.monotonic()
        consumer.pull("r", remote, [3], deadline_s=0.5)
        consumer.wait(2)
        took_s = time.monotonic() - started
        print(f"deadline 0.5 s, pull time-out {WAIT_S:g} s: ended after {took_s:.2f} s")
        assert 0.5 <= took_s < 0.5 + IN_TIME_S
        assert consumer.observer.failures == [Failure.DEADLINE]

    @pytest.mark.parametrize("stopped", [True, False])
    def test_ends_a_greeting_or_a_link(
        self,
        producer: ProducerProcess,
        start_consumer: StartConsumer,
        monkeypatch: pytest.MonkeyPatch,
        stopped: bool,
    ) -> None:
        """And the time that a native call may take is bounded by it: nobody is left to wait for the link."""
        consumer = start_consumer(link_timeout_s=WAIT_S)
        instances, links, limits = consumer.driver._instances, consumer.driver._links, []
        submit = links._queue.submit_link

        class Queue:
            def submit_link(self, cluster: _native.ClusterInfo, timeout_ms: int, deadline_ms: int) -> int:
                limits.append(timeout_ms)
                return submit(cluster, timeout_ms, deadline_ms)

            def __getattr__(self, name: str) -> object:
                return getattr(consumer.driver._queue, name)

        monkeypatch.setattr(links, "_queue", Queue())
        remote = producer.prefill("r", [1])
        if stopped:
            producer.stop()
        else:
            link = instances._link
            monkeypatch.setattr(instances, "_link", lambda linking: (producer.stop(), link(linking)))
        deadline_s = 2.0  # by then a P that goes on has been greeted
        started = time.monotonic()
        consumer.pull("r", remote, [1], deadline_s=deadline_s)
        consumer.wait(1)
        assert deadline_s <= time.monotonic() - started < deadline_s + IN_TIME_S
        assert consumer.observer.failures == [Failure.DEADLINE]
        assert all(limit <= 1000 * deadline_s + 100 for limit in limits)
        assert stopped or limits

    def test_ends_a_copy_of_our_own(self, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch) -> None:
        consumer = start_consumer(serves=True)
        held, runs = threading.Event(), threading.Event()
        copy = consumer.driver._copies._caches.copy

        def slow(*arguments: object) -> bool:
            runs.set()
            held.wait(WAIT_S)
            return copy(*arguments)

        monkeypatch.setattr(consumer.driver._copies._caches, "copy", slow)
        first, second = consumer.prefill("first", [5]), consumer.prefill("second", [6])
        deadline_s = 2.0  # by then the first one runs
        consumer.pull("first", first, [20], deadline_s=deadline_s)
        assert runs.wait(WAIT_S)
        consumer.pull("second", second, [21], deadline_s=deadline_s)
        consumer.wait(1)
        assert consumer.received == ["second"], "nothing of it ran, so nothing of it is waited for"
        held.set()
        consumer.wait(2)
        assert consumer.observer.failures == [Failure.DEADLINE] * 2
        consumer.check_bytes()


class TestDeadP:
    LEGS = 200

    @pytest.mark.parametrize("linked", [False, True])
    def test_hundreds_of_legs_cost_no_more_than_one(
        self,
        producer: ProducerProcess,
        start_consumer: StartConsumer,
        caplog: pytest.LogCaptureFixture,
        linked: bool,
    ) -> None:
        consumer = start_consumer(link_timeout_s=WAIT_S)
        remotes = [producer.prefill(f"r{i}", [1 + i]) for i in range(self.LEGS)]
        if linked:
            warmed(producer, consumer)
        producer.kill()
        before = len(consumer.received)
        started = time.monotonic()
        for i, remote in enumerate(remotes):
            consumer.pull(f"r{i}", remote, [2 + i], deadline_s=600.0)
        consumer.wait(before + self.LEGS)
        took_s = time.monotonic() - started
        print(f"{self.LEGS} legs to a dead P{' that was linked' if linked else ''}: {took_s:.3f} s")
        assert took_s < IN_TIME_S
        assert consumer.failed == {f"r{i}" for i in range(self.LEGS)}
        assert set(consumer.observer.failures) == {Failure.HANDSHAKE}
        assert f"{producer.endpoint} does not let us connect" in caplog.text
        assert "refused" in caplog.text
        assert "in time" not in caplog.text

    def test_is_not_remembered(self, start_producer: StartProducer, start_consumer: StartConsumer) -> None:
        """One that comes back on its address is met at once."""
        first = start_producer(P_CLUSTER)
        consumer = start_consumer(peer_backoff_s=60.0)
        lost = first.prefill("lost", [1])
        first.kill()
        consumer.pull("lost", lost, [1])
        consumer.wait(1)
        second = start_producer(P_CLUSTER, port=first.port)
        remote = second.prefill("r", [2])
        consumer.expect(second, remote, [3])
        consumer.pull("r", remote, [3])
        consumer.wait(2)
        assert consumer.failed == {"lost"}
        consumer.check_bytes()


def test_a_copy_of_our_own_stops_nobody_else(
    producer: ProducerProcess, start_consumer: StartConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = start_consumer(serves=True)
    held = threading.Event()
    copy = consumer.driver._copies._caches.copy

    def slow(*arguments: object) -> bool:
        held.wait(WAIT_S)
        return copy(*arguments)

    monkeypatch.setattr(consumer.driver._copies._caches, "copy", slow)
    ours, theirs = consumer.prefill("ours", [5]), producer.prefill("theirs", [6])
    consumer.pull("ours", ours, [20])
    consumer.expect(producer, theirs, [21])
    consumer.pull("theirs", theirs, [21])
    consumer.wait(1)
    assert consumer.received == ["theirs"]
    consumer.check_bytes()
    consumer.driver.cancel("ours")
    held.set()
    consumer.wait(2)
    assert consumer.failed == set()
