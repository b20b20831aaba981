"""The side channel is cut again and again under a greeting or a confirmation: it is dialled anew up to the deadline."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
from support.consumer import Consumer
from support.pd import LOOPBACK, WAIT_S, wait_until
from support.producer_process import ProducerProcess
from support.wire import Place, Wire

from vllm_datadist_connector.protocol.params import RemotePrefill
from vllm_datadist_connector.worker.transfers import Failure

StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]

TURNS = {"dial": Place("dial"), "greeting": Place("control", turn=2), "confirmation": Place("control", turn=3)}
"""The first turn opens the channel."""
CUTS = 4
IN_TIME_S = WAIT_S / 3
"""How much later than its deadline a pull may end: on a busy machine, and before any other limit."""


@contextmanager
def side_channel_wire(producer: ProducerProcess) -> Iterator[Wire]:
    with Wire(socket.create_server((LOOPBACK, 0)), lambda: socket.create_connection(producer.endpoint)) as wire:
        yield wire


def through(wire: Wire, remote: RemotePrefill) -> RemotePrefill:
    host, port = wire.address
    return msgspec.structs.replace(remote, remote_host=host, remote_port=port)


@pytest.mark.parametrize("turn", TURNS)
def test_that_is_cut_costs_time_only(start_producer: StartProducer, start_consumer: StartConsumer, turn: str) -> None:
    producer = start_producer(transport="tcp", insecure=True)
    consumer = start_consumer(transport="tcp", insecure=True)
    with side_channel_wire(producer) as wire:
        remote = through(wire, producer.prefill("r", [2]))
        consumer.expect(producer, remote, [3])
        wire.hold(TURNS[turn])
        consumer.pull("r", remote, [3])
        wire.wait_held()
        wire.release("reset")
        accepted = wire.accepted
        wait_until(lambda: wire.accepted >= accepted + CUTS, f"{CUTS} connections that are cut")
        wire.heal()
        consumer.wait(1)
    assert consumer.failed == set()
    assert consumer.observer.failures == []
    consumer.check_bytes()


def test_that_stays_cut_ends_at_the_deadline(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    producer, consumer = start_producer(insecure=True), start_consumer(insecure=True)
    with side_channel_wire(producer) as wire:
        wire.release("reset")
        started = time.monotonic()
        consumer.pull("r", through(wire, producer.prefill("r", [2])), [3], deadline_s=0.7)
        consumer.wait(1)
        assert 0.7 <= time.monotonic() - started < 0.7 + IN_TIME_S
        assert wire.accepted < 10
    assert consumer.observer.failures == [Failure.DEADLINE]
    assert "was not met" in caplog.text
