"""RankDriver across parallelism: P's with several ranks, D ranks with part of the heads, and P's that are not whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from support.consumer import Consumer
from support.kv_ranks import LAYERS, TOKEN_BYTES, Place
from support.pd import BLOCK_SIZE, wait_until
from support.producer_process import ProducerProcess

from vllm_datadist_connector import _native
from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.worker.caches import RegisteredCaches
from vllm_datadist_connector.worker.kv_layout import CacheSpec

P_BLOCKS, D_BLOCKS = [5, 511, 1, 17], [9, 2, 300, 3]
StartProducer = Callable[..., ProducerProcess]
StartConsumer = Callable[..., Consumer]


def pull_and_check(
    producer: ProducerProcess, consumers: Sequence[Consumer], src: list[int], dst: list[int], first_token: int = 0
) -> None:
    remote = producer.prefill("r", src)
    for consumer in consumers:
        consumer.expect(producer, remote, dst, first_token)
        consumer.pull("r", remote, dst, first_token=first_token)
    for consumer in consumers:
        consumer.wait(1)
        assert consumer.failed == set()
        consumer.check_bytes()


@pytest.mark.parametrize("transport", ["cma", "tcp"])
@pytest.mark.parametrize(
    ("ranks", "linked"), [({"tp_size": 2}, 2), ({"pp_size": 2}, 2), ({"tp_size": 2, "pp_size": 2}, 4)]
)
def test_from_several_ranks(
    start_producer: StartProducer,
    start_consumer: StartConsumer,
    transport: str,
    ranks: dict[str, int],
    linked: int,
) -> None:
    producer, consumer = start_producer(transport=transport, **ranks), start_consumer(transport=transport)
    pull_and_check(producer, [consumer], P_BLOCKS, D_BLOCKS)
    wait_until(lambda: consumer.linked() == linked, "the count of linked ranks")
    assert consumer.observer.handshakes == 1
    (transfer,) = consumer.observer.pulls
    assert transfer.num_bytes == len(P_BLOCKS) * consumer.memory[:, 0].nbytes


def test_each_of_several_ranks_pulls_its_own_heads(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    producer = start_producer()
    consumers = [start_consumer(place=Place(tp_rank=rank, tp_size=2)) for rank in range(2)]
    pull_and_check(producer, consumers, P_BLOCKS, D_BLOCKS)
    assert [consumer.linked() for consumer in consumers] == [1, 1]


def test_a_rank_that_has_nothing_for_us_is_not_linked(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    """Both sides of TP 2: rank 0 is greeted by everyone, for it says how many there are."""
    producer, consumer = start_producer(tp_size=2), start_consumer(place=Place(tp_rank=1, tp_size=2))
    pull_and_check(producer, [consumer], P_BLOCKS, D_BLOCKS)
    wait_until(lambda: consumer.linked() == 1, "the count of linked ranks")


@pytest.mark.parametrize(("p_size", "d_size"), [(32, 16), (16, 32)])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_other_block_sizes(
    start_producer: StartProducer, start_consumer: StartConsumer, p_size: int, d_size: int, tp_size: int
) -> None:
    producer = start_producer(block_size=p_size, tp_size=tp_size)
    consumer = start_consumer(place=Place(block_size=d_size))
    src = P_BLOCKS[: 128 // p_size // 2]
    pull_and_check(producer, [consumer], src, [20 + i for i in range(len(src) * p_size // d_size)])


@pytest.mark.parametrize("tp_size", [1, 2])
def test_only_the_tokens_that_are_missing(
    start_producer: StartProducer, start_consumer: StartConsumer, tp_size: int
) -> None:
    producer, consumer = start_producer(tp_size=tp_size), start_consumer()
    pull_and_check(producer, [consumer], P_BLOCKS, D_BLOCKS[:2], first_token=2 * BLOCK_SIZE)
    (transfer,) = consumer.observer.pulls
    assert transfer.num_bytes == 2 * LAYERS * 2 * BLOCK_SIZE * TOKEN_BYTES


class Registrations:
    """An engine that notes on which thread memory is registered."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def caches(self, datadist: _native.LlmDataDist, specs: Sequence[CacheSpec]) -> RegisteredCaches:
        return RegisteredCaches(cast("_native.LlmDataDist", _Noting(datadist, self.threads)), specs)


class _Noting:
    def __init__(self, datadist: _native.LlmDataDist, threads: list[str]) -> None:
        self._datadist, self._threads = datadist, threads
        self.capabilities = datadist.capabilities

    def register_kv_cache(self, *arguments: Any) -> tuple[int, int]:
        self._threads.append(threading.current_thread().name)
        return self._datadist.register_kv_cache(*arguments)


@pytest.mark.parametrize(
    ("p_settings", "d_place", "lazy"),
    [
        ({}, Place(), 0),
        ({"tp_size": 2}, Place(), 0),
        ({}, Place(tp_size=2), 0),
        ({"block_size": 32}, Place(block_size=16), 0),
        ({"block_size": 16}, Place(block_size=64), 0),
        ({"block_size": 64, "tp_size": 2}, Place(block_size=16), 0),
        # A run of 24 tokens is no usual one: D registers the view when it needs it.
        ({"block_size": 24}, Place(block_size=48), 1),
    ],
)
def test_what_a_first_pull_needs_is_registered_before(
    start_producer: StartProducer,
    start_consumer: StartConsumer,
    monkeypatch: pytest.MonkeyPatch,
    p_settings: dict[str, Any],
    d_place: Place,
    lazy: int,
) -> None:
    noted = Registrations()
    producer = start_producer(**p_settings)
    monkeypatch.setattr("support.kv_ranks.RegisteredCaches", noted.caches)
    consumer = start_consumer(place=d_place)
    assert noted.threads
    p_size = p_settings.get("block_size", BLOCK_SIZE)
    src = [5, 6, 1, 17]
    pull_and_check(producer, [consumer], src, [9 + i for i in range(-(-len(src) * p_size // d_place.block_size))])
    assert noted.threads.count("datadist-driver") == lazy


def test_null_blocks_of_a_sliding_window_stay_where_they_are(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    producer, consumer = start_producer(), start_consumer()
    pull_and_check(producer, [consumer], [0, 0, 7, 8], [0, 0, 3, 4])
    (transfer,) = consumer.observer.pulls
    assert transfer.num_blocks == 2


def test_tokens_that_p_no_longer_has_fail_the_pull(
    start_producer: StartProducer, start_consumer: StartConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    producer, consumer = start_producer(), start_consumer()
    consumer.pull("r", producer.prefill("r", [0, 0, 7, 8]), [0, 2, 3, 4])
    consumer.wait(1)
    assert consumer.observer.failures == [Failure.PLAN]
    assert consumer.invalid == {2, 3, 4}, "the null block is no request's own"
    assert f"P no longer has token {BLOCK_SIZE}" in caplog.text
    consumer.check_bytes()


NOT_WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "more ranks than there are": (
        {"lies": {"0": {"tp_size": 2}}},
        "no worker (pp, tp) = (0, 1); there are [(0, 0)]",
    ),
    "more stages than there are": (
        {"lies": {"0": {"pp_size": 2}}},
        "no worker (pp, tp) = (1, 0); there are [(0, 0)]",
    ),
    "fewer ranks than there are": (
        {"tp_size": 2, "lies": {"0": {"tp_size": 1}}},
        "layer 'layers.0' and 2 more: P's TP rank 0 has shards 0..0, not 0..1",
    ),
    "ranks that count differently": (
        {"tp_size": 2, "lies": {"1": {"tp_size": 4}}},
        "(pp, tp) size: rank (0, 0) says (1, 2), (0, 1) says (1, 4)",
    ),
    "another rank than was asked for": (
        {"tp_size": 2, "lies": {"1": {"tp_rank": 0}}},
        "(pp, tp) rank: asked for (0, 1), got (0, 0)",
    ),
    "too many ranks": ({"lies": {"0": {"pp_size": 4096}}}, "(pp, tp) size: (4096, 1), at most 512 ranks are met"),
    "fewer stages than there are": (
        {"pp_size": 2, "lies": {"0": {"pp_size": 1}}},
        "layer 'layers.2': P has no such layer",
    ),
    "a layer less": ({"silent_layers": 1}, "layer 'layers.2': P has no such layer"),
    "two layers less": ({"silent_layers": 2}, "layer 'layers.1': P has no such layer (is speculative decoding"),
    "an engine that does not listen": ({"lies": {"0": {"port": 0}}}, "P's engine does not listen"),
    "an engine at a host that is not allowed": (
        {"lies": {"0": {"host": "169.254.169.254"}}},
        "host of P's engine: '169.254.169.254' is not among allowed_peers",
    ),
    "blocks that do not fit its tables": (
        {"lies": {"0": {"block_sizes": [24]}}},
        "theirs has blocks of 16 tokens in a table of 24",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_a_p_that_is_not_whole_is_refused_by_name(
    start_producer: StartProducer,
    start_consumer: StartConsumer,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
) -> None:
    producer, consumer = start_producer(**settings), start_consumer(peer_backoff_s=60.0)
    for index in range(2):
        consumer.pull(str(index), producer.prefill(str(index), [1]), [1 + index])
        consumer.wait(index + 1)
    assert consumer.failed == {"0", "1"}
    assert consumer.observer.failures == [Failure.HANDSHAKE] * 2
    assert consumer.observer.handshakes == 0
    assert f"{producer.endpoint}" in caplog.text
    assert reason in caplog.text
    wait_until(lambda: consumer.linked() == 0, "the end of the links with the ranks that were there")
    consumer.check_bytes()


def test_one_refused_instance_leaves_another_linked(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    whole, broken, consumer = start_producer(), start_producer(101, silent_layers=1), start_consumer()
    pull_and_check(whole, [consumer], P_BLOCKS, D_BLOCKS)
    consumer.pull("broken", broken.prefill("broken", [1]), [1])
    consumer.wait(2)
    again = whole.prefill("again", [3])
    consumer.expect(whole, again, [4])
    consumer.pull("again", again, [4])
    consumer.wait(3)
    assert consumer.failed == {"broken"}
    assert consumer.observer.handshakes == 1
    consumer.check_bytes()


def test_a_rank_of_several_is_killed_with_its_instance_and_met_again(
    start_producer: StartProducer, start_consumer: StartConsumer
) -> None:
    first, consumer = start_producer(tp_size=2), start_consumer()
    pull_and_check(first, [consumer], P_BLOCKS, D_BLOCKS)
    first.kill()
    second = start_producer(110, tp_size=2, port=first.port)
    remote = second.prefill("again", [8, 9])
    consumer.expect(second, remote, [10, 11])
    consumer.pull("again", remote, [10, 11])
    consumer.wait(2)
    assert consumer.failed == set()
    consumer.check_bytes()
    wait_until(lambda: consumer.linked() == 2, "the end of the dead instance's links")
