"""Measurements: from worker ranks and the scheduler, through vLLM, to its log line and to Prometheus.

    WorkerMeter ── take() ──> vLLM ── absorb() ──> SchedulerMeter ── take() ──> vLLM ──> one of its API servers

A stats object holds plain values: `series` (one number per event), `counts` (events since the last object), and state.
The state of worker ranks travels as `ranks`, no further than to the scheduler, which owns that of the whole instance:
whatever leaves the engine core has the sum over its ranks as `gauges`, all of them. Each update reaches one API server
only, so that a part of the state, or a change of it, would be lost on the others; `at` says which update is the newest.

vLLM takes stats in steps. An idle instance makes none: its state stays as the last step left it. A P makes steps until
its last lease has ended, so `held_leases` comes to rest at 0; the end of an unused link and a new role are told by the
next step only, and with vLLM 0.23 so is what the end of a step changes (`pulling_requests` after an abort).

No series is by peer: peers come and go, and a series, once made, stays as long as the process.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_datadist_connector import compat
from vllm_datadist_connector.labels import Failure, LeaseEnd, Reason, Transport

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_datadist_connector.worker.transfers import Transfer

PREFIX: Final = "vllm:datadist_"

_SECONDS: Final = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_BYTES: Final = [float(2**power) for power in range(12, 36, 2)]
_BLOCKS: Final = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0, 20000.0]


class Label(NamedTuple):
    name: str
    values: tuple[str, ...]


class Family(NamedTuple):
    """A metric with all its series: a value is stored under "name", or under "name:value of the label"."""

    kind: Literal["histogram", "counter", "gauge"]
    text: str
    label: Label | None = None
    buckets: list[float] | None = None

    def keys(self, name: str) -> list[str]:
        return [f"{name}:{value}" for value in self.label.values] if self.label is not None else [name]


_TRANSPORT: Final = Label("transport", tuple(each.value for each in Transport))
_LINKS: Final = Label("transport", tuple(each.value for each in Transport if each is not Transport.OWN))
_FAILURES: Final = Label("reason", tuple(each.value for each in Failure))
_LEASE_ENDS: Final = Label("reason", tuple(each.value for each in LeaseEnd))
_REASONS: Final = Label("reason", tuple(each.value for each in Reason))
_ROLES: Final = Label("role", ("prefill", "decode", "both"))

FAMILIES: Final[dict[str, Family]] = {
    "transfer_seconds": Family(
        "histogram", "Time from the start of a pull on a D rank to P's confirmation.", _TRANSPORT, _SECONDS
    ),
    "queue_seconds": Family(
        "histogram", "Time a pull's slowest native call waited for its turn.", _TRANSPORT, _SECONDS
    ),
    "copy_seconds": Family("histogram", "Time a pull's slowest native call took.", _TRANSPORT, _SECONDS),
    "handshake_seconds": Family("histogram", "Time to meet and link a new peer.", None, _SECONDS),
    "bytes_transferred": Family("histogram", "Bytes of a pull on one D rank.", _TRANSPORT, _BYTES),
    "blocks_transferred": Family("histogram", "Blocks of a pull on one D rank.", _TRANSPORT, _BLOCKS),
    "early_bytes": Family("counter", "Bytes that a D rank got while P's prefill still went on."),
    "pushed_bytes": Family("counter", "Bytes that P wrote into the blocks of a D rank."),
    "failed_transfers": Family("counter", "Pulls that failed on a D rank, by reason.", _FAILURES),
    "served_requests": Family("counter", "Requests of P whose KV cache a D has read and P has confirmed."),
    "served_blocks": Family("counter", "Blocks of these requests."),
    "leases_ended": Family("counter", "Leases of P that ended, by reason.", _LEASE_ENDS),
    "refused_confirms": Family(
        "counter", "Pulls that P refused to confirm: their lease had ended or did not cover them."
    ),
    "releases": Family("counter", "Leases that D gave back."),
    "local_prefills": Family(
        "counter", "Requests that an instance prefilled itself although it serves with others, by reason.", _REASONS
    ),
    "held_leases": Family("gauge", "Requests whose blocks P keeps for a D."),
    "held_blocks": Family("gauge", "Blocks that P keeps for a D."),
    "oldest_lease_seconds": Family("gauge", "Since when P keeps the blocks of the request that it keeps longest."),
    "pulling_requests": Family("gauge", "Requests of D that wait for their KV cache."),
    "linked_peers": Family("gauge", "Worker ranks of P that D's ranks are linked with.", _LINKS),
    "quarantined_blocks": Family(
        "gauge", "Blocks of pulls that are over on D's ranks, kept back while bytes may still arrive in them."
    ),
    "role": Family("gauge", "1 for the role in which an instance with role_switch serves now.", _ROLES),
}
_NO_STATE: Final = {key: 0 for name, family in FAMILIES.items() if family.kind == "gauge" for key in family.keys(name)}
_OF_RANKS: Final = [key for name in ("linked_peers", "quarantined_blocks") for key in FAMILIES[name].keys(name)]
_BEFORE_ALL: Final = 1e-6
"""When a gauge that nothing is known of was 0. Not at 0: that is how prometheus_client knows that it was never set."""


def _name_of(key: str) -> str:
    return key.partition(":")[0]


@dataclass
class DataDistStats(KVConnectorStats):
    """Implements vLLM's KVConnectorStats; `ranks` is by rank, `gauges` by engine: the newest of each counts."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {kind: {} for kind in ("series", "counts", "ranks", "gauges")}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> DataDistStats:
        for key, values in other.data["series"].items():
            self.data["series"].setdefault(key, []).extend(values)
        for key, count in other.data["counts"].items():
            self.data["counts"][key] = self.data["counts"].get(key, 0) + count
        for kind in ("ranks", "gauges"):
            self.data[kind].update(other.data[kind])
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM prints each interval: of the instance, or of all engines that it prints in one line."""
        counts = self.data["counts"]
        line = self._transfers()
        line["Failed"] = sum(count for key, count in counts.items() if _name_of(key) == "failed_transfers")
        line["Served"] = counts.get("served_requests", 0)
        line["Leases expired"] = counts.get(f"leases_ended:{LeaseEnd.EXPIRED.value}", 0)
        if self.data["gauges"]:
            line |= self._state()
        return line

    def _transfers(self) -> dict[str, int | float]:
        seconds = sorted(self._series("transfer_seconds"))
        line: dict[str, int | float] = {"Transfers": len(seconds)}
        if seconds:
            copying, mib = sum(self._series("copy_seconds")), sum(self._series("bytes_transferred")) / 2**20
            line["Avg transfer (ms)"] = round(sum(seconds) / len(seconds) * 1e3, 3)
            line["P90 transfer (ms)"] = round(seconds[(len(seconds) * 9 - 1) // 10] * 1e3, 3)
            line["MiB moved"] = round(mib, 3)
            line["Copy rate (MiB/s)"] = round(mib / copying, 1) if copying else 0.0
        return line

    def _series(self, name: str) -> Iterator[float]:
        for key, values in self.data["series"].items():
            if _name_of(key) == name:
                yield from values

    def _state(self) -> dict[str, int | float]:
        state = dict.fromkeys((_name_of(key) for key in _NO_STATE), 0)
        del state["role"]  # no number
        for values in (engine["values"] for engine in self.data["gauges"].values()):
            for key, value in values.items():
                if (name := _name_of(key)) not in state:
                    continue
                state[name] = max(state[name], value) if name == "oldest_lease_seconds" else state[name] + value
        return {name.replace("_", " ").capitalize(): value for name, value in state.items()}


class WorkerMeter:
    """Measurements of one worker rank; the driver's TransferObserver. Any thread may record."""

    def __init__(self, rank: str) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._stats = DataDistStats()
        self._state: tuple[dict[Transport, int], int] = ({}, 0)

    def take(self) -> DataDistStats | None:
        """What was recorded since the last call; None if nothing was."""
        with self._lock:
            if self._stats.is_empty():
                return None
            taken, self._stats = self._stats, DataDistStats()
            return taken

    def pulled(self, transfer: Transfer, seconds: float) -> None:
        self._observe(
            f":{transfer.transport.value}",
            transfer_seconds=seconds,
            queue_seconds=transfer.queued_s,
            copy_seconds=transfer.run_s,
            bytes_transferred=float(transfer.num_bytes),
            blocks_transferred=float(transfer.num_blocks),
        )
        if transfer.early_bytes:
            self._count("early_bytes", transfer.early_bytes)
        if transfer.pushed_bytes:
            self._count("pushed_bytes", transfer.pushed_bytes)

    def failed(self, reason: Failure) -> None:
        self._count(f"failed_transfers:{reason.value}", 1)

    def handshake(self, seconds: float) -> None:
        self._observe("", handshake_seconds=seconds)

    def state(self, linked_peers: dict[Transport, int], quarantined_blocks: int) -> None:
        """Recorded only when it changed: this runs in every step."""
        if (linked_peers, quarantined_blocks) == self._state:
            return
        self._state = linked_peers, quarantined_blocks
        links = {f"linked_peers:{transport.value}": count for transport, count in linked_peers.items()}
        with self._lock:
            self._stats.data["ranks"][self._rank] = links | {"quarantined_blocks": quarantined_blocks}

    def _count(self, key: str, amount: int) -> None:
        with self._lock:
            self._stats.data["counts"][key] = self._stats.data["counts"].get(key, 0) + amount

    def _observe(self, label: str, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._stats.data["series"].setdefault(name + label, []).append(value)


class SchedulerMeter:
    """Measurements of the scheduler, and the state of the instance. Belongs to the scheduler thread."""

    def __init__(self, engine: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock
        self._at = 0.0
        self._counts: dict[str, int] = {}
        self._ranks: dict[str, dict[str, int]] = {}
        self._state = _NO_STATE
        """Of the instance; replaced, never changed: it is what was told, too."""
        self._due = False

    def count(self, name: str, amount: int = 1, label: str = "") -> None:
        if amount:
            key = f"{name}:{label}" if label else name
            self._counts[key] = self._counts.get(key, 0) + amount
            self._due = True

    def held(self, leases: int, blocks: int, oldest_s: float) -> None:
        # Whole seconds: each change is a message.
        self._become({"held_leases": leases, "held_blocks": blocks, "oldest_lease_seconds": int(oldest_s)})

    def pulling(self, requests: int) -> None:
        self._become({"pulling_requests": requests})

    def serves(self, role: str) -> None:
        if not self._state[f"role:{role}"]:
            self._become({key: int(key == f"role:{role}") for key in FAMILIES["role"].keys("role")})

    def absorb(self, stats: KVConnectorStats | None) -> None:
        """Takes the ranks' state out of what the workers report in a step, on its way past the scheduler."""
        # MultiConnector's has one for each of its connectors.
        parts = [stats] if isinstance(stats, DataDistStats) else stats.data.values() if stats is not None else ()
        for ours in parts:
            if not isinstance(ours, DataDistStats) or ours.is_empty():
                continue
            # The log line of an interval has no other state than what is told in it. vLLM 0.23 has told it already.
            self._due |= not ours.data["gauges"]
            self._ranks.update(ours.data["ranks"])
            ours.data["ranks"] = {}
            total: Tally[str] = Tally()
            for values in self._ranks.values():
                total.update(values)
            self._become({key: total[key] for key in _OF_RANKS})

    def _become(self, state: dict[str, int]) -> None:
        before, self._state = self._state, self._state | state
        self._due |= self._state != before

    def has_some(self) -> bool:
        return self._due

    def take(self) -> DataDistStats | None:
        """What was counted since the last call, and the state; None if there is nothing to tell."""
        if not self._due:
            return None
        # Later than the last one whatever becomes of the clock, or all that follows would be taken for older.
        self._at = max(self._clock(), self._at + _BEFORE_ALL)
        counts, self._counts, self._due = self._counts, {}, False
        gauges = {self._engine: {"at": self._at, "values": self._state}}
        return DataDistStats({"series": {}, "counts": counts, "ranks": {}, "gauges": gauges})


class DataDistPromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics `vllm:datadist_*`, one set per engine. Every series exists before its first event: a rate over
    one that begins at 1 would miss that."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        types = {"histogram": metric_types[Histogram], "counter": metric_types[Counter], "gauge": metric_types[Gauge]}
        self._series: dict[tuple[int, str], Any] = {}
        for name, family in FAMILIES.items():
            more: dict[str, Any] = {}
            if family.kind == "histogram":
                more["buckets"] = family.buckets
            elif family.kind == "gauge":
                more["multiprocess_mode"] = "mostrecent"
            labels = [*labelnames, family.label.name] if family.label is not None else labelnames
            metric = types[family.kind](name=PREFIX + name, documentation=family.text, labelnames=labels, **more)
            for engine, values in per_engine_labelvalues.items():
                for key in family.keys(name):
                    series = metric.labels(*values, *key.split(":")[1:])
                    self._series[engine, key] = series
                    if family.kind == "gauge":
                        compat.set_gauge(series, 0, _BEFORE_ALL)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, values in transfer_stats_data["series"].items():
            for value in values:
                self._series[engine_idx, key].observe(value)
        for key, count in transfer_stats_data["counts"].items():
            self._series[engine_idx, key].inc(count)
        for state in transfer_stats_data["gauges"].values():
            for key, value in state["values"].items():
                compat.set_gauge(self._series[engine_idx, key], value, state["at"])
