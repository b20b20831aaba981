"""RankDriver and a P that does not answer for a while: asked again until the pull's deadline, unless it is gone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.consumer import Consumer
from support.pd import WAIT_S, wait_until
from support.producer_process import ProducerProcess

from vllm_datadist_connector.labels import Failure


def on_second_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> threading.Event:
    """Set when the method is called for the second time from now on."""
    method, calls, second = getattr(owner, name), itertools.count(1), threading.Event()

    def count(*arguments: Any) -> Any:
        if next(calls) == 2:
            second.set()
        return method(*arguments)

    monkeypatch.setattr(owner, name, count)
    return second


def test_a_p_that_is_too_busy_to_be_met_is_greeted_again(
    producer: ProducerProcess, start_consumer: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = start_consumer(handshake_timeout_s=0.3)
    greeted_again = on_second_call(monkeypatch, consumer.driver._instances, "_greet")
    remote = producer.prefill("r", [1])
    consumer.expect(producer, remote, [2])
    producer.stop()
    consumer.pull("r", remote, [2])
    assert greeted_again.wait(WAIT_S)
    producer.resume()
    consumer.wait(1)
    assert consumer.failed == set()
    assert consumer.observer.handshakes == 1
    consumer.check_bytes()


def test_a_p_that_is_too_busy_to_link_is_dialled_again(
    producer: ProducerProcess, start_consumer: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = start_consumer(link_timeout_s=1.0)
    link, calls, dialled_again = consumer.driver._instances._link, itertools.count(1), threading.Event()

    def stop_p_first(linking: Any) -> None:
        if next(calls) == 1:
            producer.stop()
        else:
            dialled_again.set()
        link(linking)

    monkeypatch.setattr(consumer.driver._instances, "_link", stop_p_first)
    remote = producer.prefill("r", [1])
    consumer.expect(producer, remote, [2])
    consumer.pull("r", remote, [2])
    assert dialled_again.wait(WAIT_S)
    producer.resume()
    consumer.wait(1)
    assert consumer.failed == set()
    consumer.check_bytes()


@pytest.mark.parametrize("step", ["handshake", "link"])
def test_a_p_that_is_gone_is_not_waited_for(
    producer: ProducerProcess, start_consumer: Callable[..., Consumer], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    consumer = start_consumer(handshake_timeout_s=0.3, link_timeout_s=0.3)
    remote = producer.prefill("r", [1])
    if step == "handshake":
        producer.kill()
    else:
        link = consumer.driver._instances._link
        monkeypatch.setattr(consumer.driver._instances, "_link", lambda linking: (producer.kill(), link(linking)))
    started = time.monotonic()
    consumer.pull("r", remote, [2], deadline_s=600.0)
    consumer.wait(1)
    assert time.monotonic() - started < WAIT_S
    assert consumer.failed == {"r"}
    # What a link that fails does not tell, the next greeting does.
    assert consumer.observer.failures == [Failure.HANDSHAKE]


def test_the_deadline_ends_the_greeting_of_a_stopped_p(
    producer: ProducerProcess,
    start_consumer: Callable[..., Consumer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody is left who waits: neither the request nor, after the answer that does not come, the instance."""
    consumer = start_consumer(handshake_timeout_s=0.2)
    greeted_again = on_second_call(monkeypatch, consumer.driver._instances, "_greet")
    remote = producer.prefill("r", [1])
    producer.stop()
    consumer.pull("r", remote, [1], deadline_s=2.0)
    consumer.wait(1)
    assert greeted_again.is_set()
    assert consumer.observer.failures == [Failure.DEADLINE]
    assert f"not done within 2 s: {producer.endpoint} was not met" in caplog.text
    wait_until(lambda: "did not answer in time" in caplog.text, "the end of the greetings")


def test_a_busy_p_is_asked_again_to_confirm(
    start_producer: Callable[..., ProducerProcess],
    start_consumer: Callable[..., Consumer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    producer = start_producer(transport="cma")
    consumer = start_consumer(transport="cma", handshake_timeout_s=0.3)
    warm, remote = producer.prefill("warm", [1]), producer.prefill("r", [2])
    consumer.expect(producer, warm, [1])
    consumer.pull("warm", warm, [1])
    consumer.wait(1)
    asked_again = on_second_call(monkeypatch, consumer.driver._pulls, "_confirm")
    producer.stop()
    consumer.expect(producer, remote, [2])
    consumer.pull("r", remote, [2])
    assert asked_again.wait(WAIT_S)
    producer.resume()
    consumer.wait(2)
    assert consumer.failed == set()
    consumer.check_bytes()
