"""Stats: merged as vLLM merges them, one log line, one set of Prometheus metrics per engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from support.measured_engine import MeasuredEngine
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats

from vllm_datadist_connector import plugin
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.labels import Failure, Transport
from vllm_datadist_connector.metrics import FAMILIES, DataDistPromMetrics, DataDistStats

CONFIG: Any = SimpleNamespace(kv_transfer_config=KVTransferConfig(kv_connector="DataDistConnector", kv_role="kv_both"))
ENGINES = {0: ["m", "0"], 1: ["m", "1"]}


def busy() -> MeasuredEngine:
    engine = MeasuredEngine()
    for rank, seconds in enumerate((0.5, 1.5)):
        engine.pull(rank, seconds, 2**20)
        engine.link(rank, 1)
    engine.ranks[0].failed(Failure.LINK)
    engine.ranks[1].handshake(0.25)
    scheduler = engine.scheduler
    scheduler.held(3, 12, 7.9)
    scheduler.pulling(5)
    for name, amount, label in (
        ("leases_ended", 2, "released"),
        ("leases_ended", 1, "expired"),
        ("served_requests", 2, ""),
        ("served_blocks", 8, ""),
        ("refused_confirms", 1, ""),
        ("releases", 4, ""),
        ("local_prefills", 1, "role"),
    ):
        scheduler.count(name, amount, label)
    return engine


def told(engine: MeasuredEngine, **step: bool) -> dict[str, Any]:
    data = engine.step(**step)
    assert data is not None
    return data


def state_of(data: dict[str, Any]) -> dict[str, int]:
    """That is not 0."""
    (engine,) = data["gauges"].values()
    assert engine["values"].keys() == {
        key for name, family in FAMILIES.items() if family.kind == "gauge" for key in family.keys(name)
    }, "of the instance, whatever of it has changed"
    return {key: value for key, value in engine["values"].items() if value}


class TestWhatIsTold:
    def test_each_thing_once(self) -> None:
        engine = busy()
        told(engine)
        assert engine.step() is None
        engine.scheduler.held(3, 12, 7.95)
        engine.link(0, 1)
        assert engine.step() is None, "what did not change is not told in every step"

    def test_whatever_changes_the_state_of_the_whole_instance(self) -> None:
        engine = busy()
        all_of_it = {
            "held_leases": 3,
            "held_blocks": 12,
            "oldest_lease_seconds": 7,
            "pulling_requests": 5,
            "linked_peers:cma": 2,
        }
        assert state_of(told(engine)) == all_of_it
        engine.link(1, 4)
        assert state_of(told(engine)) == all_of_it | {"linked_peers:cma": 5}
        engine.link(1, 3, Transport.TCP)
        assert state_of(told(engine)) == all_of_it | {"linked_peers:cma": 1, "linked_peers:tcp": 3}
        engine.scheduler.held(0, 0, 0.0)
        assert state_of(told(engine)) == {"pulling_requests": 5, "linked_peers:cma": 1, "linked_peers:tcp": 3}

    def test_it_comes_to_rest_at_nothing(self) -> None:
        engine = busy()
        told(engine)
        engine.scheduler.held(0, 0, 0.0)
        engine.scheduler.pulling(0)
        for rank in range(2):
            engine.link(rank, 0)
        assert state_of(told(engine)) == {}
        assert engine.step() is None

    def test_the_state_goes_with_whatever_a_worker_has_measured(self) -> None:
        """An interval's log line has what is told in it, and nothing else."""
        engine = busy()
        told(engine)
        engine.pull(1, 0.5, 1)
        assert state_of(told(engine))["held_leases"] == 3

    def test_the_state_of_a_rank_goes_no_further_than_to_the_scheduler(self) -> None:
        assert told(busy())["ranks"] == {}

    def test_of_a_vllm_that_asks_before_it_hands_on(self) -> None:
        engine = MeasuredEngine()
        engine.link(0, 1)
        told(engine, asks_first=True)
        assert engine.scheduler.has_some(), "the next step tells it"
        assert state_of(told(engine, asks_first=True)) == {"linked_peers:cma": 1}
        engine.scheduler.held(1, 1, 0.0)
        engine.pull(0, 0.5, 1)
        assert state_of(told(engine, asks_first=True)) == {"linked_peers:cma": 1, "held_leases": 1, "held_blocks": 1}
        assert not engine.scheduler.has_some(), "or every step would ask for another"

    def test_beside_another_connector(self) -> None:
        """MultiConnector hands the stats of all its connectors to each of them."""
        engine = busy()
        workers = MultiKVConnectorStats(data={"Other": MultiKVConnectorStats()})
        for rank in engine.ranks:
            stats = rank.take()
            assert stats is not None
            workers.aggregate(MultiKVConnectorStats(data={"DataDistConnector": stats}))
        engine.scheduler.absorb(workers)
        ours = engine.scheduler.take()
        assert ours is not None
        assert state_of(ours.data)["linked_peers:cma"] == 2

    def test_a_clock_that_is_set_back_makes_nothing_old(self) -> None:
        now = iter([100.0, 50.0, 50.0, 200.0])
        engine = MeasuredEngine(clock=lambda: next(now))
        times = []
        for leases in (1, 2, 3, 4):
            engine.scheduler.held(leases, 0, 0.0)
            times.append(told(engine)["gauges"]["engine"]["at"])
        assert times == sorted(set(times))
        assert times[0] == 100.0
        assert times[-1] == 200.0


def test_survives_the_trip_and_does_not_change_what_it_was_built_from() -> None:
    """vLLM hands one dict to several loggers, each of which aggregates into the object that it built."""
    data = told(busy())
    before = json.dumps(data)
    built = DataDistConnector.build_kv_connector_stats(data)
    assert built.data == data
    built.aggregate(DataDistStats(told(busy())))
    assert json.dumps(data) == before
    assert built.reduce()["Transfers"] == 4
    assert DataDistConnector.build_kv_connector_stats(None).is_empty()


class TestLogLine:
    @pytest.fixture
    def vllm_logs(self) -> KVConnectorLogging:
        plugin.register()
        return KVConnectorLogging(CONFIG.kv_transfer_config)

    @staticmethod
    def line(vllm_logs: KVConnectorLogging) -> dict[str, float]:
        lines: list[str] = []
        vllm_logs.log(lambda _, text: lines.append(text))
        pairs = [pair.split("=") for line in lines for pair in line.split(", ")]
        return {name: float(value) for name, value in pairs}

    def test_of_an_interval(self, vllm_logs: KVConnectorLogging) -> None:
        engine = busy()
        engine.scheduler.serves("prefill")  # no number, so it has no place here
        vllm_logs.observe(told(engine))
        assert self.line(vllm_logs) == {
            "Transfers": 2,
            "Avg transfer (ms)": 1000.0,
            "P90 transfer (ms)": 1500.0,
            "MiB moved": 2.0,
            "Copy rate (MiB/s)": 2.0,
            "Failed": 1,
            "Served": 2,
            "Leases expired": 1,
            "Held leases": 3,
            "Held blocks": 12,
            "Oldest lease seconds": 7,
            "Pulling requests": 5,
            "Linked peers": 2,
            "Quarantined blocks": 0,
        }
        assert self.line(vllm_logs) == {}

    def test_ranks_that_did_not_change_count_as_well(self, vllm_logs: KVConnectorLogging) -> None:
        engine = busy()
        vllm_logs.observe(told(engine))
        self.line(vllm_logs)
        engine.link(0, 3)
        vllm_logs.observe(told(engine))
        assert self.line(vllm_logs)["Linked peers"] == 4

    def test_the_newest_state_of_an_interval(self, vllm_logs: KVConnectorLogging) -> None:
        engine = busy()
        vllm_logs.observe(told(engine))
        engine.scheduler.held(0, 0, 0.0)
        vllm_logs.observe(told(engine))
        line = self.line(vllm_logs)
        assert (line["Held leases"], line["Linked peers"], line["Transfers"]) == (0, 2, 2)

    def test_of_several_engines_in_one(self, vllm_logs: KVConnectorLogging) -> None:
        """With --aggregate-engine-logging."""
        for name, oldest_s in (("first", 9.0), ("second", 2.0)):
            engine = MeasuredEngine(name)
            engine.scheduler.held(2, 3, oldest_s)
            vllm_logs.observe(told(engine))
        line = self.line(vllm_logs)
        assert (line["Held leases"], line["Held blocks"], line["Oldest lease seconds"]) == (4, 6, 9)

    def test_of_nothing(self) -> None:
        assert DataDistStats().reduce() == {"Transfers": 0, "Failed": 0, "Served": 0, "Leases expired": 0}


def prometheus(registry: CollectorRegistry) -> DataDistPromMetrics:
    def kind(base: Any) -> Any:
        return lambda **values: base(**values, registry=registry)

    types: Any = {base: kind(base) for base in (Histogram, Counter, Gauge)}
    metrics = DataDistConnector.build_prom_metrics(CONFIG, types, ["model", "engine"], dict(ENGINES))
    assert isinstance(metrics, DataDistPromMetrics)
    return metrics


class TestPrometheus:
    @pytest.mark.parametrize(
        ("name", "labels", "value"),
        [
            ("transfer_seconds_sum", {"transport": "cma"}, 2.0),
            ("transfer_seconds_count", {"transport": "cma"}, 2.0),
            ("transfer_seconds_count", {"transport": "tcp"}, 0.0),
            ("handshake_seconds_sum", {}, 0.25),
            ("bytes_transferred_sum", {"transport": "cma"}, 2.0**21),
            ("blocks_transferred_sum", {"transport": "cma"}, 4.0),
            ("failed_transfers_total", {"reason": "link"}, 1.0),
            ("early_bytes_total", {}, 2.0**19),
            ("leases_ended_total", {"reason": "released"}, 2.0),
            ("leases_ended_total", {"reason": "expired"}, 1.0),
            ("served_requests_total", {}, 2.0),
            ("served_blocks_total", {}, 8.0),
            ("refused_confirms_total", {}, 1.0),
            ("releases_total", {}, 4.0),
            ("local_prefills_total", {"reason": "role"}, 1.0),
            ("linked_peers", {"transport": "cma"}, 2.0),
            ("held_leases", {}, 3.0),
            ("held_blocks", {}, 12.0),
            ("oldest_lease_seconds", {}, 7.0),
            ("pulling_requests", {}, 5.0),
        ],
    )
    def test_values(self, name: str, labels: dict[str, str], value: float) -> None:
        registry = CollectorRegistry()
        prometheus(registry).observe(told(busy()), engine_idx=1)
        engine = {"model": "m", "engine": "1"}
        assert registry.get_sample_value(f"vllm:datadist_{name}", {**engine, **labels}) == value

    def test_counters_add_up_and_gauges_follow(self) -> None:
        registry, engine = CollectorRegistry(), MeasuredEngine()
        metrics = prometheus(registry)
        for count in (3, 1):
            engine.link(0, count)
            engine.ranks[0].failed(Failure.LEASE)
            metrics.observe(told(engine))
        labels = {"model": "m", "engine": "0"}
        linked = registry.get_sample_value("vllm:datadist_linked_peers", {**labels, "transport": "cma"})
        failed = registry.get_sample_value("vllm:datadist_failed_transfers_total", {**labels, "reason": "lease"})
        assert (linked, failed) == (1, 2)

    def test_every_value_of_every_label_is_there_from_the_start(self) -> None:
        """Of each engine: whatever is told later makes no series."""
        registry = CollectorRegistry()
        metrics = prometheus(registry)

        def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
            samples = [sample for family in registry.collect() for sample in family.samples]
            return {(s.name, tuple(sorted(s.labels.items()))) for s in samples if not s.name.endswith("_created")}

        values = [s.value for f in registry.collect() for s in f.samples if not s.name.endswith("_created")]
        assert set(values) == {0.0}
        before = series()
        everything = {
            kind: {key: value for name, family in FAMILIES.items() if family.kind in of for key in family.keys(name)}
            for kind, of, value in (("series", ("histogram",), [1.0]), ("counts", ("counter",), 1))
        }
        gauges = {key: 1 for name, family in FAMILIES.items() if family.kind == "gauge" for key in family.keys(name)}
        for engine in ENGINES:
            metrics.observe({**everything, "gauges": {"e": {"at": 1.0, "values": gauges}}}, engine)
        assert series() == before
        names = {name.removeprefix("vllm:datadist_") for name, _ in before}
        assert {"failed_transfers_total", "served_requests_total", "oldest_lease_seconds"} <= names
        reasons = {dict(labels).get("reason") for name, labels in before if name.endswith("failed_transfers_total")}
        assert reasons == {each.value for each in Failure}

    def test_constructed_again_with_another_registry(self) -> None:
        for _ in range(2):
            prometheus(CollectorRegistry())


def test_a_transport_that_nobody_knows_is_another() -> None:
    """The engine names it, or cannot: a metric must not fail for that."""
    assert {Transport(name) for name in ("local", "?", "")} == {Transport.OTHER}
