"""Measurements: from worker ranks and the scheduler, through vLLM, to its log line and to Prometheus.

    WorkerMeter, SchedulerMeter ── take() ──> DataDistStats ── vLLM merges and ships ──> DataDistPromMetrics, log line

A stats object holds three kinds of values, all plain: `series` (one number per event), `counts` (events since the last
object) and `gauges` (state, per source: merging two objects keeps the newer value of each source).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_datadist_connector.worker.transfers import Failure, Transfer

_PREFIX: Final = "vllm:datadist_"

_SECONDS: Final = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_BYTES: Final = [float(2**power) for power in range(12, 36, 2)]
_BLOCKS: Final = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0, 20000.0]

HISTOGRAMS: Final[dict[str, tuple[str, list[float]]]] = {
    "transfer_seconds": ("Time from the start of a pull on a D rank to P's confirmation.", _SECONDS),
    "queue_seconds": ("Time a pull's slowest native call waited for its turn.", _SECONDS),
    "copy_seconds": ("Time a pull's slowest native call took.", _SECONDS),
    "handshake_seconds": ("Time to meet and link a new peer.", _SECONDS),
    "bytes_transferred": ("Bytes of a pull on one D rank.", _BYTES),
    "blocks_transferred": ("Blocks of a pull on one D rank.", _BLOCKS),
}
COUNTERS: Final[dict[str, str]] = {
    "failed_transfers": "Pulls that failed on a D rank, by reason.",
    "leases_ended": "Leases of P that ended, by reason.",
    "refused_confirms": "Pulls that P refused to confirm: their lease had ended or did not cover them.",
    "releases": "Leases that D gave back.",
    "local_prefills": "Requests that an instance prefilled itself although it serves with others, by reason.",
}
GAUGES: Final[dict[str, str]] = {
    "held_leases": "Requests whose blocks P keeps for a D.",
    "held_blocks": "Blocks that P keeps for a D.",
    "pulling_requests": "Requests of D that wait for their KV cache.",
    "linked_peers": "Worker ranks of P that D's ranks are linked with.",
}
_LABELLED: Final = frozenset({"failed_transfers", "leases_ended", "local_prefills"})
"""Counters with a `reason` label; their keys in `counts` are "name:reason"."""


def _empty() -> dict[str, Any]:
    return {"series": {}, "counts": {}, "gauges": {}}


@dataclass
class DataDistStats(KVConnectorStats):
    """Implements vLLM's KVConnectorStats over the three kinds of values."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = _empty()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> DataDistStats:
        for name, values in other.data["series"].items():
            self.data["series"].setdefault(name, []).extend(values)
        for name, count in other.data["counts"].items():
            self.data["counts"][name] = self.data["counts"].get(name, 0) + count
        for name, sources in other.data["gauges"].items():
            self.data["gauges"].setdefault(name, {}).update(sources)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM prints each interval."""
        series, counts = self.data["series"], self.data["counts"]
        seconds, num_bytes = sorted(series.get("transfer_seconds", [])), sum(series.get("bytes_transferred", []))
        line: dict[str, int | float] = {"Transfers": len(seconds)}
        if seconds:
            copying = sum(series["copy_seconds"])
            line["Avg transfer (ms)"] = round(sum(seconds) / len(seconds) * 1e3, 3)
            line["P90 transfer (ms)"] = round(seconds[(len(seconds) * 9 - 1) // 10] * 1e3, 3)
            line["MiB moved"] = round(num_bytes / 2**20, 3)
            line["Copy rate (MiB/s)"] = round(num_bytes / 2**20 / copying, 1) if copying else 0.0
        line["Failed"] = sum(count for name, count in counts.items() if name.startswith("failed_transfers:"))
        line["Leases expired"] = counts.get("leases_ended:expired", 0)
        for name, sources in self.data["gauges"].items():
            line[name.replace("_", " ").capitalize()] = sum(sources.values())
        return line


class _Meter:
    """Collects values of one source; any thread may record."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._stats = DataDistStats()
        self._gauges: dict[str, int] = {}

    def has_some(self) -> bool:
        with self._lock:
            return not self._stats.is_empty()

    def take(self) -> DataDistStats | None:
        """What was recorded since the last call; None if nothing was."""
        with self._lock:
            if self._stats.is_empty():
                return None
            taken, self._stats = self._stats, DataDistStats()
            return taken

    def _observe(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._stats.data["series"].setdefault(name, []).append(value)

    def _count(self, name: str, amount: int = 1) -> None:
        if amount:
            with self._lock:
                self._stats.data["counts"][name] = self._stats.data["counts"].get(name, 0) + amount

    def _set(self, name: str, value: int) -> None:
        """Recorded only when it changed: this runs in every step."""
        if self._gauges.get(name, 0) == value:
            return
        self._gauges[name] = value
        with self._lock:
            self._stats.data["gauges"].setdefault(name, {})[self._source] = value


class WorkerMeter(_Meter):
    """Measurements of one worker rank; the pull driver's TransferObserver."""

    def pulled(self, transfer: Transfer, seconds: float) -> None:
        self._observe(
            transfer_seconds=seconds,
            queue_seconds=transfer.queued_s,
            copy_seconds=transfer.run_s,
            bytes_transferred=float(transfer.num_bytes),
            blocks_transferred=float(transfer.num_blocks),
        )

    def failed(self, reason: Failure) -> None:
        self._count(f"failed_transfers:{reason.value}")

    def handshake(self, seconds: float) -> None:
        self._observe(handshake_seconds=seconds)

    def linked_peers(self, count: int) -> None:
        self._set("linked_peers", count)


class SchedulerMeter(_Meter):
    """Measurements of the scheduler process."""

    def producer(self, leases: int, blocks: int, ended: dict[str, int], refused_confirms: int) -> None:
        self._set("held_leases", leases)
        self._set("held_blocks", blocks)
        for reason, count in ended.items():
            self._count(f"leases_ended:{reason}", count)
        self._count("refused_confirms", refused_confirms)

    def consumer(self, pulling: int, releases: int) -> None:
        self._set("pulling_requests", pulling)
        self._count("releases", releases)

    def local_prefills(self, by_reason: dict[str, int]) -> None:
        for reason, count in by_reason.items():
            self._count(f"local_prefills:{reason}", count)


class DataDistPromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics `vllm:datadist_*`, one set per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        histogram, counter, gauge = metric_types[Histogram], metric_types[Counter], metric_types[Gauge]
        self._metrics: dict[str, Any] = {}
        for name, (text, buckets) in HISTOGRAMS.items():
            self._metrics[name] = histogram(
                name=_PREFIX + name, documentation=text, buckets=buckets, labelnames=labelnames
            )
        for name, text in COUNTERS.items():
            labels = [*labelnames, "reason"] if name in _LABELLED else labelnames
            self._metrics[name] = counter(name=_PREFIX + name, documentation=text, labelnames=labels)
        for name, text in GAUGES.items():
            self._metrics[name] = gauge(name=_PREFIX + name, documentation=text, labelnames=labelnames)
        self._gauge_sources: dict[tuple[int, str], dict[str, int]] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, values in transfer_stats_data["series"].items():
            for value in values:
                self._metrics[name].labels(*labels).observe(value)
        for name, reason, count in _split_counts(transfer_stats_data["counts"]):
            self._metrics[name].labels(*labels, *reason).inc(count)
        for name, sources in transfer_stats_data["gauges"].items():
            known = self._gauge_sources.setdefault((engine_idx, name), {})
            known.update(sources)
            self._metrics[name].labels(*labels).set(sum(known.values()))


def _split_counts(counts: dict[str, int]) -> Iterator[tuple[str, tuple[str, ...], int]]:
    for key, count in counts.items():
        name, _, reason = key.partition(":")
        yield name, (reason,) if name in _LABELLED else (), count
