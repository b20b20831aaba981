"""Readings of running servers, and waits for a reading to become true. A wait polls, and always has a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from scrape import Metrics, scrape

POLL_S = 0.1
# What a reading needs from the last engine step to the API server's registry, on a busy machine.
SETTLE_DEADLINE_S = 60.0

EXTERNAL_HITS = "vllm:external_prefix_cache_hits"
KV_USAGE = "vllm:kv_cache_usage_perc"
BYTES = "vllm:datadist_bytes_transferred_sum"
EARLY_BYTES = "vllm:datadist_early_bytes"
PUSHED_BYTES = "vllm:datadist_pushed_bytes"
LINKED_PEERS = "vllm:datadist_linked_peers"
PULLING = "vllm:datadist_pulling_requests"
HELD_LEASES = "vllm:datadist_held_leases"
LEASES_ENDED = "vllm:datadist_leases_ended"
FAILED = "vllm:datadist_failed_transfers"
LOCAL_PREFILLS = "vllm:datadist_local_prefills"
ROLE = "vllm:datadist_role"
PREEMPTIONS = "vllm:num_preemptions"

T = TypeVar("T")


async def read(url: str) -> Metrics:
    return await asyncio.to_thread(scrape, url)


async def wait_for(what: str, probe: Callable[[], T], good: Callable[[T], bool], deadline_s: float) -> T:
    """The first value of `probe` that is `good`; an AssertionError names the last one at the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        value = await asyncio.to_thread(probe)
        if good(value):
            return value
        if time.monotonic() > until:
            raise AssertionError(f"{what}: still {value!r} after {deadline_s:.0f} s")
        await asyncio.sleep(POLL_S)


async def wait_metric(
    url: str, name: str, good: Callable[[float], bool], deadline_s: float = SETTLE_DEADLINE_S, **labels: str
) -> float:
    return await wait_for(f"{name} at {url}", lambda: scrape(url).total(name, **labels), good, deadline_s)


async def wait_empty(url: str, deadline_s: float) -> None:
    """No KV block is held: neither by a request nor for a peer."""
    await wait_metric(url, KV_USAGE, lambda usage: usage == 0.0, deadline_s)


class Change:
    """How much a server's counters grow from here on."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._start = scrape(url)

    def now(self, name: str, **labels: str) -> float:
        return scrape(self._url).total(name, **labels) - self._start.total(name, **labels)

    async def reaches(self, name: str, least: float, deadline_s: float = SETTLE_DEADLINE_S, **labels: str) -> float:
        """Waits until the counter has grown by `least`."""
        what = f"growth of {name} at {self._url}"
        return await wait_for(what, lambda: self.now(name, **labels), lambda grown: grown >= least, deadline_s)
