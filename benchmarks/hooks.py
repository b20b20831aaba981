#!/usr/bin/env python3
"""What each vLLM scheduler hook costs, beside NixlConnector's on like requests in the same run.

    python benchmarks/hooks.py [--rounds 400] [--tokens 8192]

256 running requests, 64 transfers in flight, 256 held leases. One round is what a busy step asks of an instance that is
P and D: a request comes for each side, a transfer ends, a prefill ends, a lease ends. NIXL's library is not needed: its
scheduler side never loads it. Afterwards the hooks of every step are measured once more with 0, 256 and 1024 leases.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.engine_config import FULL, group_of, vllm_config
from support.pd import BLOCK_SIZE, TO_P, finish, make_request
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from vllm_datadist_connector.connector import DataDistConnector

RUNNING, PULLING, HELD = 256, 64, 256
MORE_HELD = 1024
EVERY_STEP = ("build_connector_meta", "update_connector_output", "get_kv_connector_stats")

Times = dict[str, list[float]]


def config_of() -> Any:
    config = vllm_config("kv_both")
    transfer = config.kv_transfer_config
    transfer.kv_buffer_device = "cpu"
    transfer.get_from_extra_config = lambda _, default: default
    config.cache_config = SimpleNamespace(block_size=BLOCK_SIZE)
    config.num_prefill_lookahead_tokens = 0
    config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    return config


def kv_cache_config() -> Any:
    groups = [group_of(FULL, "layers.0")]
    return SimpleNamespace(
        kv_cache_groups=groups,
        transfer_groups=groups,
        transfer_group_ids=(0,),
        select_transfer_block_ids=lambda block_ids: block_ids,
        has_mamba_layers=False,
    )


class Ours:
    name = "datadist"

    def __init__(self) -> None:
        self.hooks: Any = DataDistConnector(config_of(), KVConnectorRole.SCHEDULER, kv_cache_config())

    def end_lease(self) -> None:
        """That of the oldest request, as its D does by the side channel."""
        self.hooks._scheduler._producer.leases.revoke("all", 0.0, 1)

    def held(self) -> int:
        return int(self.hooks._scheduler._producer.held()[0])

    def close(self) -> None:
        self.hooks.shutdown()


class Nixl:
    name = "nixl"

    def __init__(self) -> None:
        scheduler = NixlPullConnectorScheduler(config_of(), "engine-nixl", kv_cache_config())
        self.hooks: Any = scheduler
        scheduler.request_finished_all_groups = scheduler.request_finished
        scheduler.get_kv_connector_stats = lambda: None

    def end_lease(self) -> None:
        """Its workers keep the leases."""

    def close(self) -> None:
        self.hooks.shutdown()


class Load:
    """Drives one connector as vLLM's scheduler does."""

    def __init__(self, side: Ours | Nixl, remote: Ours, tokens: int) -> None:
        self.times: Times = defaultdict(list)
        self._side, self._remote, self._tokens = side, remote, tokens
        self._numbers = itertools.count()
        self._table = [KVCacheBlock(block) for block in range(1, 1 + -(-tokens // BLOCK_SIZE))]
        self._blocks = KVCacheBlocks((self._table,))
        self._ids = ([block.block_id for block in self._table],)
        self._step = SchedulerOutput.make_empty()
        self._step.total_num_scheduled_tokens = RUNNING
        self._pulling: deque[Request] = deque()
        self._held: deque[str] = deque()
        for _ in range(RUNNING):
            self._admit(self._new(None), "plain")
        for _ in range(PULLING):
            self._pull()
        self.hold(HELD)
        self.times.clear()

    def round(self) -> None:
        self._pull()
        self._prefill()
        self._side.end_lease()
        self._timed("build_connector_meta", self._step)
        done = self._pulling.popleft()
        sent = {self._held.popleft()}
        output = KVConnectorOutput(finished_recving={done.request_id}, finished_sending=sent)
        self._timed("update_connector_output", output)
        self._timed("get_kv_connector_stats")
        done.status = RequestStatus.FINISHED_STOPPED
        self._timed("request_finished_all_groups", done, self._ids, as_name="request_finished (D)")

    def idle(self) -> None:
        """A step in which the connector has nothing to do."""
        self._timed("build_connector_meta", self._step)
        self._timed("update_connector_output", KVConnectorOutput())
        self._timed("get_kv_connector_stats")

    def hold(self, count: int) -> None:
        while len(self._held) < count:
            self._prefill()
        while len(self._held) > count:
            self._side.end_lease()
            self._held.popleft()

    def _new(self, params: dict[str, Any] | None) -> Request:
        number = next(self._numbers)
        prompt = [(number * 7919 + position) % 30000 for position in range(self._tokens)]
        return make_request(prompt, params, f"cmpl-{self._side.name}-{number}-0-00000000")

    def _pull(self) -> None:
        request = self._new(None)
        _, params = self._remote.hooks.request_finished_all_groups(
            finish(make_request(request.prompt_token_ids, TO_P, f"p-{request.request_id}")), self._ids
        )
        request.kv_transfer_params = params
        self._admit(request, "D")
        self._pulling.append(request)

    def _admit(self, request: Request, side: str) -> None:
        self._timed("on_new_request", request, as_name=f"on_new_request ({side})")
        while (count := self._timed("get_num_new_matched_tokens", request, 0)[0]) is None:
            time.sleep(0)  # as between two steps
        self._timed("update_state_after_alloc", request, self._blocks, count)

    def _prefill(self) -> None:
        request = self._new(dict(TO_P))
        self._admit(request, "P")
        time.sleep(0.001)  # a prefill takes longer
        held, _ = self._timed("request_finished_all_groups", finish(request), self._ids, as_name="request_finished (P)")
        if not held:
            raise RuntimeError("a finished prefill is not held")
        self._held.append(request.request_id)

    def _timed(self, name: str, *arguments: Any, as_name: str = "") -> Any:
        hook: Callable[..., Any] = getattr(self._side.hooks, name)
        begin = time.perf_counter()
        value = hook(*arguments)
        self.times[as_name or name].append(time.perf_counter() - begin)
        return value


def quantiles(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99, in microseconds."""
    ordered = sorted(seconds)
    return statistics.median(ordered) * 1e6, ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e6


def growth(load: Load, rounds: int) -> dict[str, list[float]]:
    """The p50 of each hook of every step, with 0, HELD and MORE_HELD leases."""
    grown: dict[str, list[float]] = {name: [] for name in EVERY_STEP}
    for held in (0, HELD, MORE_HELD):
        load.hold(held)
        load.idle()
        load.times.clear()
        for _ in range(rounds):
            load.idle()
        for name in EVERY_STEP:
            grown[name].append(quantiles(load.times[name])[0])
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    remote = Ours()
    ours, nixl = Load(side := Ours(), remote, arguments.tokens), Load(other := Nixl(), remote, arguments.tokens)
    gc.freeze()
    for _ in range(arguments.rounds):
        ours.round()
        nixl.round()
    print(f"{'microseconds':32}{'datadist p50':>14}{'p99':>10}{'nixl p50':>12}{'p99':>10}{'ratio p50':>11}{'p99':>7}")
    for name, seconds in ours.times.items():
        (our_50, our_99), (their_50, their_99) = quantiles(seconds), quantiles(nixl.times[name])
        ratios = f"{our_50 / their_50:11.1f}{our_99 / their_99:7.1f}"
        print(f"{name:32}{our_50:14.1f}{our_99:10.1f}{their_50:12.1f}{their_99:10.1f}{ratios}")
    print(f"\n{'p50 of an idle step, with':32}" + "".join(f"{held:>8} leases" for held in (0, HELD, MORE_HELD)))
    for name, medians in growth(ours, arguments.rounds).items():
        print(f"{name:32}" + "".join(f"{median:15.1f}" for median in medians))
    for each in (side, other, remote):
        each.close()


if __name__ == "__main__":
    main()
