"""Stats: merged as vLLM merges them, one log line, one set of Prometheus metrics per engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.metrics import DataDistPromMetrics, DataDistStats, SchedulerMeter, WorkerMeter

CONFIG: Any = SimpleNamespace(kv_transfer_config=None)


def pulled(meter: WorkerMeter, seconds: float, num_bytes: int) -> None:
    transfer: Any = SimpleNamespace(queued_s=0.0, run_s=seconds / 2, num_bytes=num_bytes, num_blocks=2)
    meter.pulled(transfer, seconds)


def taken(meter: WorkerMeter | SchedulerMeter) -> DataDistStats:
    stats = meter.take()
    assert stats is not None
    return stats


def two_ranks() -> DataDistStats:
    first, second, scheduler = WorkerMeter("tp0"), WorkerMeter("tp1"), SchedulerMeter("scheduler")
    for meter, seconds in ((first, 0.5), (second, 1.5)):
        pulled(meter, seconds, 2**20)
        meter.linked_peers(1)
    first.failed(SimpleNamespace(value="link"))  # type: ignore[arg-type]
    scheduler.producer(3, 12, {"released": 2, "expired": 1}, 1)
    scheduler.consumer(5, 4)
    return taken(first).aggregate(taken(second)).aggregate(taken(scheduler))


def test_nothing_recorded_is_none_and_each_value_is_taken_once() -> None:
    meter = WorkerMeter("tp0")
    assert meter.take() is None
    pulled(meter, 0.5, 1)
    assert not taken(meter).is_empty()
    assert meter.take() is None
    meter.linked_peers(0)
    assert meter.take() is None, "a gauge that did not change is not sent in every step"


def test_reduces_to_one_line() -> None:
    assert two_ranks().reduce() == {
        "Transfers": 2,
        "Avg transfer (ms)": 1000.0,
        "P90 transfer (ms)": 1500.0,
        "MiB moved": 2.0,
        "Copy rate (MiB/s)": 2.0,
        "Failed": 1,
        "Leases expired": 1,
        "Linked peers": 2,
        "Held leases": 3,
        "Held blocks": 12,
        "Pulling requests": 5,
    }
    assert DataDistStats().reduce() == {"Transfers": 0, "Failed": 0, "Leases expired": 0}


def test_gauges_keep_the_newest_of_each_source() -> None:
    meter = WorkerMeter("tp0")
    meter.linked_peers(4)
    stats = taken(meter)
    meter.linked_peers(1)
    assert stats.aggregate(taken(meter)).reduce()["Linked peers"] == 1


def test_survives_the_trip_and_does_not_change_what_it_was_built_from() -> None:
    """vLLM hands one dict to several loggers, each of which aggregates into the object that it built."""
    data = json.loads(json.dumps(two_ranks().to_dict()))
    before = json.dumps(data)
    built = DataDistConnector.build_kv_connector_stats(data)
    assert built.data == data
    built.aggregate(two_ranks())
    assert json.dumps(data) == before
    assert built.reduce()["Transfers"] == 4
    assert DataDistConnector.build_kv_connector_stats(None).is_empty()


def prometheus(registry: CollectorRegistry) -> DataDistPromMetrics:
    def kind(base: Any) -> Any:
        return lambda **values: base(**values, registry=registry)

    types: Any = {base: kind(base) for base in (Histogram, Counter, Gauge)}
    metrics = DataDistConnector.build_prom_metrics(CONFIG, types, ["model", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    assert isinstance(metrics, DataDistPromMetrics)
    return metrics


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("transfer_seconds_sum", {}, 2.0),
        ("transfer_seconds_count", {}, 2.0),
        ("bytes_transferred_sum", {}, 2.0**21),
        ("blocks_transferred_sum", {}, 4.0),
        ("failed_transfers_total", {"reason": "link"}, 1.0),
        ("leases_ended_total", {"reason": "released"}, 2.0),
        ("leases_ended_total", {"reason": "expired"}, 1.0),
        ("refused_confirms_total", {}, 1.0),
        ("releases_total", {}, 4.0),
        ("linked_peers", {}, 2.0),
        ("held_blocks", {}, 12.0),
    ],
)
def test_prometheus(name: str, labels: dict[str, str], value: float) -> None:
    registry = CollectorRegistry()
    prometheus(registry).observe(two_ranks().to_dict(), engine_idx=1)
    labels = {"model": "m", "engine": "1", **labels}
    assert registry.get_sample_value(f"vllm:datadist_{name}", labels) == value


def test_prometheus_counters_add_up_and_gauges_follow() -> None:
    registry = CollectorRegistry()
    metrics = prometheus(registry)
    worker = WorkerMeter("tp0")
    for count in (3, 1):
        worker.linked_peers(count)
        worker.failed(SimpleNamespace(value="lease"))  # type: ignore[arg-type]
        metrics.observe(taken(worker).to_dict())
    labels = {"model": "m", "engine": "0"}
    assert registry.get_sample_value("vllm:datadist_linked_peers", labels) == 1
    assert registry.get_sample_value("vllm:datadist_failed_transfers_total", {**labels, "reason": "lease"}) == 2


def test_constructed_again_with_another_registry() -> None:
    for _ in range(2):
        prometheus(CollectorRegistry())
