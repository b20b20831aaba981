#!/usr/bin/env python3
"""What each vLLM scheduler hook costs, beside NixlConnector's on like requests in the same run, and nothing's.

    python benchmarks/hooks.py [--rounds 400] [--tokens 8192] [--check]

256 running requests, 64 transfers in flight, 256 held leases. One round is what a busy step asks of an instance that is
P and D: a request comes for each side, a transfer ends, a prefill ends, a lease ends; and then a step in which nothing
happens. NIXL's library is not needed: its scheduler side never loads it. Hooks that do nothing show what calls and the
clock take; with them goes what it takes to read the prompt's ids, which have to be read to be compared, and to have
vLLM make the list of block ids, which have to be known to be filled. Afterwards all is measured once more with 0, 256
and 1024 leases.

Times are those of the calling thread on a core: what other programs take of the machine does not count. What it would
wait for threads of ours shows in the wall times, and is ruled out by there being none that need the interpreter.

--check ends with 1 where a bound of BOUNDS is exceeded, hooks take longer with more leases, or such a thread runs. It
judges medians, which hold on a busy machine, too.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from idle_connector import IdleConnector
from support.engine_config import FULL, group_of, vllm_config
from support.pd import BLOCK_SIZE, TO_P, finish, make_request
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from vllm_datadist_connector.connector import DataDistConnector

RUNNING, PULLING, HELD = 256, 64, 256
MORE_HELD = 1024
HELD_IN_TURN = (HELD, MORE_HELD, 0)
TURNS = 4
EVERY_STEP = ("build_connector_meta", "update_connector_output", "get_kv_connector_stats")

D, P, IDLE = " (D)", " (P)", " (idle)"
"""What a hook is called for: a request whose KV cache is pulled, one that is prefilled for others, or nothing."""
READ_PROMPT, LIST_BLOCKS = "to read the ids of a prompt", "to list the ids of its blocks"
SUMS: Final = {
    D: "all hooks of a D request",
    P: "all hooks of a P request",
    "": "all hooks of a step",
    IDLE: "all hooks of an idle step",
}


class Cost(NamedTuple):
    """Seconds of the calling thread on a core, and on a clock."""

    cpu: float
    wall: float


BOUNDS: Final = {SUMS[D]: 4.0, SUMS[P]: 6.0, SUMS[""]: 6.0, SUMS[IDLE]: 2.6}
"""Most times NixlConnector's, medians: twice what was measured. A cost that is added to a hook shows, a busy machine
does not. We read the prompt, and give a ticket that proves what the blocks are. Of a hook in which NixlConnector does
nothing no ratio says much, so a request's are judged together."""
GROWTH: Final = 2.0
"""Most times that hooks may take with MORE_HELD leases of what they take with none, medians. To walk through so many
takes many times an idle step."""

Times = dict[str, list[Cost]]


def config_of() -> Any:
    config = vllm_config("kv_both")
    transfer = config.kv_transfer_config
    transfer.kv_role, transfer.kv_buffer_device = "kv_both", "cpu"
    config.parallel_config.prefill_context_parallel_size = 1
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


class Side:
    """A connector's scheduler side."""

    def __init__(self, name: str, connector: Callable[..., Any]) -> None:
        self.name = name
        self.hooks = connector(config_of(), KVConnectorRole.SCHEDULER, kv_cache_config())

    def end_lease(self, params: dict[str, Any]) -> None:
        """NIXL's workers keep the leases; who does nothing has none."""

    def close(self) -> None:
        self.hooks.shutdown()


class Ours(Side):
    def __init__(self) -> None:
        super().__init__("datadist", DataDistConnector)

    def end_lease(self, params: dict[str, Any]) -> None:
        """As its D does by the side channel."""
        self.hooks._scheduler._producer.leases.release([params["datadist"]["token"]])


class Load:
    """Drives one connector as vLLM's scheduler does."""

    def __init__(self, side: Side, remote: Ours, tokens: int) -> None:
        self.times: Times = defaultdict(list)
        self._side, self._remote, self._tokens = side, remote, tokens
        self._numbers = itertools.count()
        self._table = [KVCacheBlock(block) for block in range(1, 1 + -(-tokens // BLOCK_SIZE))]
        self._blocks = KVCacheBlocks((self._table,))
        self._ids = ([block.block_id for block in self._table],)
        self._step = SchedulerOutput.make_empty()
        self._step.total_num_scheduled_tokens = RUNNING
        self._pulling: deque[Request] = deque()
        self._held: deque[tuple[str, dict[str, Any]]] = deque()
        for _ in range(RUNNING):
            self._admit(self._new(None), "")
        for _ in range(PULLING):
            self._pull()
        self.hold(HELD)
        self.times.clear()

    def round(self) -> None:
        begun = {name: len(costs) for name, costs in self.times.items()}
        self._pull()
        self._prefill()
        sent, params = self._held.popleft()
        self._side.end_lease(params)
        self._timed("build_connector_meta", "", self._step)
        done = self._pulling.popleft()
        output = KVConnectorOutput(finished_recving={done.request_id}, finished_sending={sent})
        self._timed("update_connector_output", "", output)
        self._timed("get_kv_connector_stats", "")
        done.status = RequestStatus.FINISHED_STOPPED
        self._timed("request_finished_all_groups", D, done, self._ids)
        self._timed("build_connector_meta", IDLE, self._step)
        self._timed("update_connector_output", IDLE, KVConnectorOutput())
        self._timed("get_kv_connector_stats", IDLE)
        for side, total in SUMS.items():
            hooks = [name for name in self.times if name.endswith(side) and (side or name in EVERY_STEP)]
            costs = [cost for name in hooks for cost in self.times[name][begun.get(name, 0) :]]
            self.times[total].append(Cost(sum(each.cpu for each in costs), sum(each.wall for each in costs)))

    def hold(self, count: int) -> None:
        while len(self._held) < count:
            self._prefill()
        while len(self._held) > count:
            self._side.end_lease(self._held.popleft()[1])

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
        self._admit(request, D)
        self._pulling.append(request)

    def _admit(self, request: Request, side: str) -> None:
        self._timed("on_new_request", side, request)
        while (count := self._timed("get_num_new_matched_tokens", side, request, 0)[0]) is None:
            time.sleep(0.001)  # as between two steps
        self._timed("update_state_after_alloc", side, request, self._blocks, count)

    def _prefill(self) -> None:
        request = self._new(dict(TO_P))
        self._admit(request, P)
        time.sleep(0.001)  # a prefill takes longer
        held, params = self._timed("request_finished_all_groups", P, finish(request), self._ids)
        if not held and not isinstance(self._side.hooks, IdleConnector):
            raise RuntimeError("a finished prefill is not held")
        self._held.append((request.request_id, params or {}))

    def read(self) -> None:
        """What no connector that compares prompts and fills blocks can do without."""
        request = self._new(None)
        self._clocked(READ_PROMPT, lambda: sum(request.prompt_token_ids or ()))
        self._clocked(LIST_BLOCKS, self._blocks.get_block_ids)

    def _timed(self, name: str, side: str, *arguments: Any) -> Any:
        hook: Callable[..., Any] = getattr(self._side.hooks, name)
        return self._clocked(name.removesuffix("_all_groups") + side, hook, *arguments)

    def _clocked(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        value = call(*arguments)
        self.times[name].append(Cost(time.thread_time() - cpu, time.perf_counter() - wall))
        return value


def quantiles(seconds: Iterable[float]) -> tuple[float, float]:
    """p50 and p99, in microseconds."""
    ordered = sorted(seconds)
    return statistics.median(ordered) * 1e6, ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e6


def growth(load: Load, rounds: int) -> dict[str, list[float]]:
    """The medians of SUMS with so many leases as in HELD_IN_TURN: the least of some turns, as others only add to it."""
    grown = {name: [float("inf")] * len(HELD_IN_TURN) for name in SUMS.values()}
    for _ in range(TURNS):
        for place, held in enumerate(HELD_IN_TURN):
            load.hold(held)
            load.times.clear()
            for _ in range(max(1, rounds // TURNS)):
                load.round()
                gc.collect()
            for name, medians in grown.items():
                medians[place] = min(medians[place], quantiles(cost.cpu for cost in load.times[name])[0])
    return grown


def compare(ours: Times, theirs: Times, idle: Times) -> list[str]:
    """Prints the table; returns what is out of bounds."""
    problems = []
    print(
        f"{'microseconds of CPU':32}{'datadist p50':>14}{'p99':>9}{'nixl p50':>11}{'p99':>9}{'ratio p50':>11}{'p99':>6}"
        f"{'idle p50':>11}"
    )
    for name in (*sorted(ours.keys() - BOUNDS.keys()), *BOUNDS):
        (our_50, our_99), (their_50, their_99), (idle_50, _) = (
            quantiles(each.cpu for each in times[name]) for times in (ours, theirs, idle)
        )
        typical, worst = our_50 / their_50, our_99 / their_99
        print(
            f"{name:32}{our_50:14.1f}{our_99:9.1f}{their_50:11.1f}{their_99:9.1f}{typical:11.1f}{worst:6.1f}"
            f"{idle_50:11.1f}"
        )
        if typical > BOUNDS.get(name, typical):
            problems.append(f"{name}: {typical:.1f} times NixlConnector's, allowed: {BOUNDS[name]}")
    for name in (READ_PROMPT, LIST_BLOCKS):
        print(f"{name:32}{quantiles(each.cpu for each in idle[name])[0]:14.1f}")
    print(f"\n{'and as passes on a clock':32}{'datadist p50':>14}{'p99':>9}{'nixl p50':>11}{'p99':>9}")
    for name in BOUNDS:
        walls = [quantiles(each.wall for each in times[name]) for times in (ours, theirs)]
        print(f"{name:32}{walls[0][0]:14.1f}{walls[0][1]:9.1f}{walls[1][0]:11.1f}{walls[1][1]:9.1f}")
    return problems


def judge_growth(grown: dict[str, list[float]]) -> list[str]:
    """Prints the table; returns what grows."""
    print(f"\n{'p50 with':32}" + "".join(f"{held:>8} leases" for held in HELD_IN_TURN))
    for name, medians in grown.items():
        print(f"{name:32}" + "".join(f"{median:15.1f}" for median in medians))
    return [
        f"{name}: {most:.1f} us with {MORE_HELD} leases, {least:.1f} with none"
        for name, (*_, most, least) in grown.items()
        if most > GROWTH * least
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--check", action="store_true", help="end with 1 if a bound is exceeded")
    arguments = parser.parse_args()
    threads = set(threading.enumerate())
    remote = Ours()
    sides = [Ours(), Side("nixl", NixlPullConnector), Side("idle", IdleConnector)]
    ours, nixl, idle = loads = [Load(side, remote, arguments.tokens) for side in sides]
    gc.freeze()
    for _ in range(arguments.rounds):
        for load in loads:
            load.round()
        idle.read()
        # A collection costs what the whole process has, in whichever hook it falls: neither side's.
        gc.collect()
    problems = compare(ours.times, nixl.times, idle.times) + judge_growth(growth(ours, arguments.rounds))
    problems += [f"a thread that needs the interpreter: {each.name}" for each in set(threading.enumerate()) - threads]
    for each in (*sides, remote):
        each.close()
    for problem in problems if arguments.check else []:
        print(f"out of bounds: {problem}", file=sys.stderr)
    return int(arguments.check and bool(problems))


if __name__ == "__main__":
    gc.disable()
    sys.exit(main())
