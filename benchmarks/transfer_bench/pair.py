"""One mechanism in a process pair: the owner is a child that answers JSON lines, the initiator measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transfer_bench.mechanisms import MECHANISMS
from transfer_bench.pools import TENSORS, Case, Memcpy, Pool, find_wrong_block

Row = dict[str, Any]
PAGES = {False: "base", True: "huge"}


def own(name: str, tensor_bytes: int, huge_pages: bool) -> None:
    """The owner's side: serves the pool for each block size that standard input names, until it ends."""
    # Libraries log to standard output: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pool = Pool(TENSORS, tensor_bytes, huge_pages)
    pool.fill()
    mechanism = MECHANISMS[name]()
    for line in sys.stdin:
        if line.strip() == "cpu":
            answer: Any = time.process_time()
        else:
            answer = mechanism.serve(pool, int(line))
        print(json.dumps(answer), file=answers, flush=True)


def measure(
    name: str, tensor_bytes: int, huge_pages: bool, cases: list[Case], budget_s: float, idle_s: float
) -> Iterator[Row]:
    """The initiator's side: one row per case, then one about idle CPU."""
    owner = subprocess.Popen(
        [sys.executable, sys.argv[0], "--own", name, "--tensor-bytes", str(tensor_bytes), "--pages", PAGES[huge_pages]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(line: str) -> Any:
        if owner.stdin is None or owner.stdout is None:
            raise RuntimeError("the owner has no pipes")
        print(line, file=owner.stdin, flush=True)
        answer = owner.stdout.readline()
        if not answer:
            raise RuntimeError(f"{name}: the owner process ended")
        return json.loads(answer)

    try:
        mechanism, memcpy = MECHANISMS[name](), Memcpy()
        destination, source = (Pool(TENSORS, tensor_bytes, huge_pages) for _ in range(2))
        source.fill()
        block_bytes = 0
        for case in sorted(cases, key=lambda c: c.block_bytes):
            if case.block_bytes != block_bytes:
                block_bytes = case.block_bytes
                mechanism.connect(destination, block_bytes, ask(str(block_bytes)))
            destination.clear()
            move, reference = mechanism.bind(case), memcpy.bind(case, destination, source)
            move()
            wrong = find_wrong_block(case, destination, source)
            if wrong is not None:
                raise RuntimeError(f"{name}: wrong bytes in {wrong} of {case}")
            seconds, reference_s = _interleaved(move, reference, budget_s)
            yield {"pages": PAGES[huge_pages]} | _row(name, case, seconds, reference_s, mechanism.describe())
        yield {"mechanism": name, "pages": PAGES[huge_pages], "idle_cpu": _idle_cpu(lambda: ask("cpu"), idle_s)}
    finally:
        owner.kill()
        owner.wait()


def _interleaved(move: Callable[[], None], reference: Callable[[], None], budget_s: float) -> tuple[float, float]:
    """20th percentile of both, measured alternately so that a noisy neighbour hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + budget_s
    while len(times[0]) < 7 or time.perf_counter() < end:
        for call, into in ((move, times[0]), (reference, times[1])):
            start = time.perf_counter()
            call()
            into.append(time.perf_counter() - start)
        if len(times[0]) >= 2000:
            break
    return float(np.percentile(times[0], 20)), float(np.percentile(times[1], 20))


def _idle_cpu(owner_cpu_s: Callable[[], float], idle_s: float) -> float:
    """Cores that both processes use while nothing is asked of them."""
    before = owner_cpu_s() + time.process_time()
    time.sleep(idle_s)
    return (owner_cpu_s() + time.process_time() - before) / idle_s


def _row(name: str, case: Case, seconds: float, reference_s: float, transport: str) -> Row:
    return {
        "mechanism": name,
        "transport": transport,
        "block_bytes": case.block_bytes,
        "scattered": case.scattered,
        "total_bytes": case.total_bytes,
        "seconds": seconds,
        "memcpy_seconds": reference_s,
        "ratio": reference_s / seconds,
        "gb_per_s": case.total_bytes / seconds / 1e9,
    }
