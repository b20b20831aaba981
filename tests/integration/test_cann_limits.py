"""The limits of the provider `cann` at their real size: 512 links, 256 regions, 240 addresses in a cache.

Everything is in one process for each test, which a library that stays loaded ends with.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import pd
from support.cann_ranks import (
    P_CLUSTER,
    PATIENCE_S,
    Scenario,
    Told,
    calls,
    check_pull,
    model_of,
    run_in_process,
    start_rank,
)
from support.consumer import Consumer
from support.endpoints import Endpoint, check
from support.kv_ranks import BLOCKS, KV, PROMPT_ROLE, Place, RankEngine, make_kv
from support.producer_process import prefill, start_scheduler

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.params import RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.worker.device import PASSED
from vllm_datadist_connector.worker.janitor import Janitor
from vllm_datadist_connector.worker.kv_layout import LayoutError

MOST_LINKS = 512
PLACE = Place()
AT_ONCE = 64
"""Ps that are met side by side."""


class Gate:
    def __init__(self) -> None:
        self.is_open = False
        self.asked = 0

    def has_passed(self) -> bool:
        self.asked += 1
        return self.is_open


class Producers:
    """Ps of one rank each, whose memories differ and overlap: that of each begins a page after the one before."""

    def __init__(self, count: int) -> None:
        whole = make_kv(1, PLACE.block_size)
        self._bytes = np.random.default_rng(2).integers(0, 256, whole.nbytes + 4096 * count, np.uint8)
        self.memories: list[KV] = []
        self._schedulers = []
        self._engines = []
        for index in range(count):
            memory = self._bytes[4096 * index :][: whole.nbytes].reshape(whole.shape)
            engine = RankEngine(P_CLUSTER + index, PROMPT_ROLE, PLACE, memory, "local", "cann")
            scheduler = start_scheduler()
            scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(engine.geometry())})
            self.memories.append(memory)
            self._engines.append(engine)
            self._schedulers.append(scheduler)

    def prefill(self, index: int, request_id: str, block: int) -> RemotePrefill:
        return parse_remote_prefill(prefill(self._schedulers[index], request_id, [block]))


def pull_each(consumer: Consumer, producers: Producers, which: range, gate: Gate | None = None) -> None:
    """One block from each of those Ps."""
    for index in which:
        block = 1 + index % (BLOCKS - 1)
        name = f"{'held' if gate else 'pull'}-{index}-{len(consumer.received)}"
        remote = producers.prefill(index, name, block)
        consumer.expect(producers.memories[index], remote, [block])
        consumer.pull(name, remote, [block], PATIENCE_S, fence=gate or PASSED)


def d_has_all_its_links(trace: Path) -> None:
    told, producers = Told(), Producers(MOST_LINKS + 1)
    with closing(Consumer("local", provider="cann", handshake_timeout_s=30.0, link_timeout_s=30.0)) as consumer:
        assert consumer.datadist.capabilities.max_links == MOST_LINKS
        for first in (0, 1, *range(2, MOST_LINKS, AT_ONCE)):
            which = range(first, first + 1 if first < 2 else min(first + AT_ONCE, MOST_LINKS))
            pull_each(consumer, producers, which)
            consumer.wait(len(consumer.received) + len(which))
        pd.wait_until(lambda: consumer.linked() == MOST_LINKS, "all links")
        assert calls(trace, "UnlinkLlmClusters") == []

        # The first one is used again: the second is the one that makes room.
        for index in (0, MOST_LINKS):
            pull_each(consumer, producers, range(index, index + 1))
            consumer.wait(len(consumer.received) + 1)
        (unlink,) = calls(trace, "UnlinkLlmClusters")
        assert f"UnlinkLlmClusters {P_CLUSTER + 1} ->" in unlink
        pd.wait_until(lambda: consumer.linked() == MOST_LINKS, "all links")
        assert consumer.failed == set()
        consumer.check_bytes()

        # Nobody can.
        gate = Gate()
        linked = [index for index in range(MOST_LINKS + 1) if index != 1]
        for index in linked:
            pull_each(consumer, producers, range(index, index + 1), gate)
        pd.wait_until(lambda: gate.asked >= MOST_LINKS, "all pulls")
        consumer.pull("one too many", producers.prefill(1, "one too many", 1), [1], deadline_s=0.5)
        count = len(consumer.received) + 1
        consumer.wait(count)
        assert consumer.failed == {"one too many"}
        assert any("one too many" in line and f"all of this rank's {MOST_LINKS} links" in line for line in told.lines)
        gate.is_open = True
        consumer.wait(count + MOST_LINKS)
        pull_each(consumer, producers, range(1, 2))
        consumer.wait(count + MOST_LINKS + 1)
        assert consumer.failed == {"one too many"}
        pd.wait_until(lambda: consumer.linked() == MOST_LINKS, "all links")
        assert [line for line in calls(trace, "LinkLlmClusters") if not line.endswith("0x00000000")] == []
        consumer.check_bytes()


def test_a_d_has_512_links_and_the_idlest_makes_room(tmp_path: Path) -> None:
    run_in_process(d_has_all_its_links, tmp_path)


def p_has_all_its_links(_: Path) -> None:
    memory = make_kv(1, PLACE.block_size)
    engine = RankEngine(P_CLUSTER, PROMPT_ROLE, PLACE, memory, "local", "cann")
    geometry = engine.geometry()
    others = [Endpoint(1 + i, 1, 2, 64, provider="cann") for i in range(MOST_LINKS)]
    link = [_native.ClusterInfo(P_CLUSTER, [(pd.LOOPBACK, geometry.port)], [(pd.LOOPBACK, 0)])]
    for other in others:
        check(other.datadist.link_clusters(link, 30_000)[0])
    told = Told()
    with (
        closing(start_scheduler()) as scheduler,
        closing(Janitor(engine.datadist)) as janitor,
        closing(Consumer("local", provider="cann", link_timeout_s=30.0)) as consumer,
    ):
        scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(geometry)})

        def pull(name: str, deadline_s: float) -> None:
            remote = parse_remote_prefill(prefill(scheduler, name, [3]))
            consumer.pull(name, remote, [4], deadline_s)
            if deadline_s == PATIENCE_S:
                consumer.expect(memory, remote, [4])

        pull("too late", 0.5)
        consumer.wait(1)
        assert consumer.failed == {"too late"}
        assert any("too late" in line and "(512)" in line and "LLM_LINK_FAILED" in line for line in told.lines)
        consumer.check_bytes()
        # Who dies takes its own half along, and nothing else.
        others[7].datadist.finalize()
        pull("still too late", 0.5)
        consumer.wait(2)
        assert "still too late" in consumer.failed
        pull("in time", PATIENCE_S)
        janitor.unlink([others[7].cluster_id])
        consumer.wait(3)
        assert "in time" not in consumer.failed
        consumer.check_bytes()


def test_a_p_has_512_links_and_its_janitor_makes_room(tmp_path: Path) -> None:
    run_in_process(p_has_all_its_links, tmp_path)


# ---- registrations ----


def every_region_is_used(_: Path) -> None:
    check_pull(model_of(128, seed=1), model_of(128, seed=2), addresses=[240, 16])


def an_index_and_its_scales_are_one(_: Path) -> None:
    """320 regions by themselves, of which the library would refuse the last 64."""
    check_pull(model_of(80, 1, sparse=True), model_of(80, 2, sparse=True), addresses=[160, 80, 80])


def one_region_too_many(trace: Path) -> None:
    for layers, sparse, told in (
        (129, False, "258 KV cache tensors in 258 regions"),
        (86, True, "344 KV cache tensors in 344 regions, 258 with neighbours"),
    ):
        with pytest.raises(LayoutError, match=f"^{told}.*at most 256: .*--pipeline-parallel-size"):
            start_rank(model_of(layers, 1, sparse), is_producer=True)
    assert calls(trace, "Initialize") == []


@pytest.mark.parametrize("scenario", [every_region_is_used, an_index_and_its_scales_are_one, one_region_too_many])
def test_registrations(tmp_path: Path, scenario: Scenario) -> None:
    run_in_process(scenario, tmp_path)
