"""Several API servers of one vLLM, each of which hears of some steps only: /metrics is true all the same.

Through prometheus_client's multi-process collector, which is what answers under /metrics of such a vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from support import front_ends as program
from support.measured_engine import MeasuredEngine

from vllm_datadist_connector.labels import Failure, LeaseEnd, Reason, Transport

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if str(TOOLS) not in sys.path:
    sys.path.insert(0, str(TOOLS))

from scrape import Metrics  # noqa: E402

NUM_FRONT_ENDS = 3


class Vllm:
    """Its front ends, and one engine core for each label that they have."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self._process = process
        self._directory = directory
        self.engines = {index: MeasuredEngine(f"dp{index}") for index in program.ENGINES}
        for number in range(NUM_FRONT_ENDS):
            self.tell(number, 0, None)

    def tell(self, front_end: int, engine: int, stats: dict[str, Any] | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self._directory), front_end, engine, stats]) + "\n")
        self._process.stdin.flush()
        assert json.loads(self._process.stdout.readline()) is True

    def step(self, front_end: int, engine: int = 0) -> None:
        stats = self.engines[engine].step()
        assert stats is not None
        self.tell(front_end, engine, stats)

    def read(self) -> Metrics:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self._directory))
        return Metrics(generate_latest(registry).decode())

    def value(self, name: str, engine: int = 0, **labels: str) -> float:
        metrics = self.read()
        assert metrics.samples(f"vllm:datadist_{name}")
        return metrics.total(f"vllm:datadist_{name}", engine=str(engine), **labels)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("unused"))}
    command, pipe = [sys.executable, program.__file__], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as started:
        yield started
        assert started.stdin is not None
        started.stdin.close()


@pytest.fixture
def vllm(process: subprocess.Popen[str], tmp_path: Path) -> Vllm:
    return Vllm(process, tmp_path)


def test_an_idle_p_holds_nothing(vllm: Vllm) -> None:
    """40 leases are granted in steps that one front end hears of, and end in a step that another hears of."""
    p = vllm.engines[0].scheduler
    for leases in range(1, 41):
        p.held(leases, 3 * leases, leases / 10)
        vllm.step(leases % 2)
        assert (vllm.value("held_leases"), vllm.value("held_blocks")) == (leases, 3 * leases)
    assert vllm.value("oldest_lease_seconds") == 4
    p.held(0, 0, 0.0)
    vllm.step(2)
    for name in ("held_leases", "held_blocks", "oldest_lease_seconds"):
        assert vllm.value(name) == 0


def test_what_one_front_end_heard_of_one_rank_is_part_of_what_another_hears(vllm: Vllm) -> None:
    d = vllm.engines[0]
    for rank, transport in ((0, Transport.CMA), (1, Transport.TCP)):
        d.link(rank, rank + 1, transport)
        vllm.step(rank)
    assert (vllm.value("linked_peers", transport="cma"), vllm.value("linked_peers", transport="tcp")) == (1, 2)
    d.link(1, 2, Transport.CMA)
    vllm.step(2)
    assert (vllm.value("linked_peers", transport="cma"), vllm.value("linked_peers", transport="tcp")) == (3, 0)


def test_a_front_end_that_is_late_does_not_overrule_the_newest(vllm: Vllm) -> None:
    d = vllm.engines[0]
    d.scheduler.pulling(7)
    before = d.step()
    d.scheduler.pulling(0)
    after = d.step()
    vllm.tell(0, 0, after)
    vllm.tell(1, 0, before)
    assert vllm.value("pulling_requests") == 0


def test_each_engine_has_its_own(vllm: Vllm) -> None:
    for index, engine in vllm.engines.items():
        engine.scheduler.held(index + 1, 0, 0.0)
        vllm.step(index, index)
    assert [vllm.value("held_leases", index) for index in vllm.engines] == [1, 2]
    vllm.engines[0].scheduler.held(0, 0, 0.0)
    vllm.step(1, 0)
    assert [vllm.value("held_leases", index) for index in vllm.engines] == [0, 2]


def test_what_is_counted_adds_up(vllm: Vllm) -> None:
    d = vllm.engines[0]
    for front_end in range(NUM_FRONT_ENDS):
        d.pull(0, 0.5, 1000, Transport.TCP)
        d.ranks[1].failed(Failure.LEASE)
        d.scheduler.count("served_blocks", 4)
        vllm.step(front_end)
    assert vllm.value("bytes_transferred_sum", transport="tcp") == NUM_FRONT_ENDS * 1000
    assert vllm.value("transfer_seconds_count", transport="tcp") == NUM_FRONT_ENDS
    assert vllm.value("failed_transfers", reason="lease") == NUM_FRONT_ENDS
    assert vllm.value("served_blocks") == NUM_FRONT_ENDS * 4


def test_every_series_is_there_before_its_first_event(vllm: Vllm) -> None:
    metrics = vllm.read()
    ours = [sample for name in metrics.names() for sample in metrics.samples(name) if "datadist" in name]
    assert {sample.value for sample in ours} == {0.0}
    labels = {
        "failed_transfers_total": ("reason", Failure),
        "leases_ended_total": ("reason", LeaseEnd),
        "local_prefills_total": ("reason", Reason),
        "bytes_transferred_count": ("transport", Transport),
    }
    for name, (label, values) in labels.items():
        found = {(each.labels["engine"], each.labels[label]) for each in metrics.samples(f"vllm:datadist_{name}")}
        assert found == {(str(engine), each.value) for engine in program.ENGINES for each in values}
    for name in ("held_leases", "oldest_lease_seconds", "pulling_requests", "served_requests_total", "releases_total"):
        assert len(metrics.samples(f"vllm:datadist_{name}")) == len(program.ENGINES)
