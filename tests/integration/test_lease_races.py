"""Leases that end while their blocks are read, and blocks that are another request's a moment later: real engines, a
real driver, a real lease table, and a pool so small that every block is used again at once."""

from __future__ import annotations

import json
import multiprocessing
import random
import struct
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import pytest
from support.consumer import Consumer
from support.kv_ranks import KV, PROMPT_ROLE, TOKEN_BYTES, Place, RankEngine, make_kv
from support.producer_process import prefill, start_scheduler

from vllm_datadist_connector.protocol.params import EXTRA_KEY, parse_remote_prefill

ROUNDS = 500
AT_ONCE, BLOCKS_EACH = 5, 8
POOL = range(1, 1 + AT_ONCE * BLOCKS_EACH)
"""P's blocks: as many as the requests of one batch need."""
FIRST_LEASE_S = 0.02
LATEST = 2.0
"""In leases: after its grant a reader comes at any time up to then, half of them too late."""
ENOUGH = ROUNDS // 10
"""Of both ends of a round, or the readers came at the wrong times."""
CLUSTER = 300
_PAUSE_S = 0.0002


def contents(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Of each token of what has that number: a request's KV, or what its blocks hold afterwards."""
    return np.frombuffer(struct.pack("<Q", number) * (TOKEN_BYTES // 8), dtype=np.uint8)


def run_producer(pipe: Connection, transport: str) -> None:
    """A P whose blocks are written over as soon as vLLM would have them back."""
    scheduler = start_scheduler(0)
    memory = Place().part_of(make_kv(CLUSTER, Place().block_size))
    engine = RankEngine(CLUSTER, PROMPT_ROLE, Place(), memory, transport)
    scheduler.set_geometries({(0, 0): msgspec.msgpack.encode(engine.geometry())})
    held: dict[str, list[int]] = {}
    free = list(POOL)
    pipe.send_bytes(b"{}")
    wanted = None
    while True:
        for request_id in scheduler.take_ended():
            blocks = held.pop(request_id)
            memory[:, blocks] = contents(1 << 32)
            free += blocks
        if wanted is None and pipe.poll(_PAUSE_S):
            try:
                wanted = json.loads(pipe.recv_bytes())
            except EOFError:
                return
        if wanted is not None and len(free) >= BLOCKS_EACH:
            request_id, lease_s = str(wanted["number"]), wanted["lease_s"]
            blocks, free = free[:BLOCKS_EACH], free[BLOCKS_EACH:]
            held[request_id] = blocks
            memory[:, blocks] = contents(wanted["number"])
            params = prefill(scheduler, request_id, blocks, lease_s=lease_s)
            params[EXTRA_KEY]["lease_s"] = 1.0  # the shortest that a ticket may say; nobody renews here
            pipe.send_bytes(json.dumps(params).encode())
            wanted = None


@pytest.fixture
def start_pool() -> Iterator[Callable[[str], Connection]]:
    processes = multiprocessing.get_context("forkserver")
    ours, theirs = processes.Pipe()
    started = []

    def start(transport: str) -> Connection:
        process = processes.Process(target=run_producer, args=(theirs, transport), daemon=True)
        process.start()
        started.append(process)
        theirs.close()
        ours.recv_bytes()
        return ours

    yield start
    for process in started:
        process.kill()
        process.join()
    ours.close()


def is_whole(memory: KV, blocks: list[int], number: int) -> bool:
    return bool((memory[:, blocks] == contents(number)).all())


@pytest.mark.parametrize("transport", ["cma", "tcp"])
def test_no_block_that_was_used_again_is_taken_for_the_requests_own(
    transport: str, start_pool: Callable[[str], Connection], start_consumer: Callable[..., Consumer]
) -> None:
    pool, consumer, source = start_pool(transport), start_consumer(transport=transport), random.Random(11)
    lease_s, failed = FIRST_LEASE_S, 0
    for first in range(0, ROUNDS, AT_ONCE):
        remotes = []
        for number in range(first, first + AT_ONCE):
            pool.send_bytes(json.dumps({"number": number, "lease_s": lease_s}).encode())
            remotes.append(parse_remote_prefill(json.loads(pool.recv_bytes())))
        late = source.uniform(0, LATEST * lease_s / AT_ONCE)
        for index, remote in enumerate(remotes):
            threading.Event().wait(late)  # a reader that comes when it comes
            blocks = list(range(1 + index * BLOCKS_EACH, 1 + (index + 1) * BLOCKS_EACH))
            consumer.pull(str(first + index), remote, blocks)
        consumer.wait(first + AT_ONCE)
        for index in range(AT_ONCE):
            blocks = list(range(1 + index * BLOCKS_EACH, 1 + (index + 1) * BLOCKS_EACH))
            if str(first + index) not in consumer.failed:
                assert is_whole(consumer.memory, blocks, first + index), f"round {first + index}"
        # As short as lets some readers come in time and some not, however busy the machine is.
        failed, before = len(consumer.failed), failed
        lease_s *= 0.8 if failed - before < AT_ONCE / 2 else 1.25
    assert ENOUGH < len(consumer.failed) < ROUNDS - ENOUGH
