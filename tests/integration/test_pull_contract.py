"""What a D does about a P whose model or weights are others, or not known, over real links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.consumer import Consumer
from support.producer_process import ProducerProcess

from vllm_datadist_connector.labels import Failure

StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]

THETA = "rope_parameters.rope_theta"
OTHER_WEIGHTS = {"weights": "tensors:22"}
OTHER_ROPE = {"settings": {"hidden_size": "64", THETA: "500000"}}


def pull_twice(consumer: Consumer, producer: ProducerProcess) -> None:
    for index in range(2):
        remote = producer.prefill(str(index), [1 + index])
        consumer.expect(producer, remote, [4 + index])
        consumer.pull(str(index), remote, [4 + index])
        consumer.wait(index + 1)


@pytest.mark.parametrize(
    ("contract", "told"),
    [
        (OTHER_WEIGHTS, "weights: ours tensors:11, theirs tensors:22"),
        (OTHER_ROPE, f"{THETA}: ours 10000, theirs 500000"),
    ],
    ids=["weights", "rope"],
)
def test_another_model_is_refused_with_what_differs(
    start_producer: StartProducer,
    start_consumer: StartConsumer,
    caplog: pytest.LogCaptureFixture,
    contract: dict[str, Any],
    told: str,
) -> None:
    producer, consumer = start_producer(lies={"0": {"contract": contract}}), start_consumer(peer_backoff_s=60.0)
    remote = producer.prefill("r", [1])
    consumer.pull("r", remote, [4])
    consumer.wait(1)
    assert consumer.failed == {"r"}
    assert consumer.observer.failures == [Failure.HANDSHAKE]
    assert f"{producer.endpoint} is not compatible: {told}" in caplog.text
    assert f"request r ({remote}): pull failed (handshake)" in caplog.text
    consumer.check_bytes()


def test_may_differ(start_producer: StartProducer, start_consumer: StartConsumer) -> None:
    producer = start_producer(lies={"0": {"contract": OTHER_WEIGHTS | OTHER_ROPE}})
    consumer = start_consumer(may_differ=["weights", "rope_parameters"])
    pull_twice(consumer, producer)
    assert consumer.failed == set()
    consumer.check_bytes()


@pytest.mark.parametrize("theirs", ["", "files:11"])
def test_weights_that_cannot_be_compared_are_said_once(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture, theirs: str
) -> None:
    producer, consumer = start_producer(lies={"0": {"contract": {"weights": theirs}}}), start_consumer()
    pull_twice(consumer, producer)
    assert consumer.failed == set()
    assert caplog.text.count("has our weights is not checked: ours tensors:11, theirs") == 1
    consumer.check_bytes()
