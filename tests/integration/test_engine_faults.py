"""Peers that die or fall silent, and what Python must survive: exit, fork, garbage collection, other threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.endpoints import Endpoint, PeerProcess, copy_blocks

from vllm_datadist_connector import _native

WAIT_MS = 2000
# Whatever a call takes beyond its own timeout on a busy machine.
SLACK_S = 10.0
# Within which a program ends, though its calls could wait for twice as long.
EXIT_S = 30.0
REMOTE = pytest.mark.parametrize("transport", ["cma", "tcp"])


def _options(transport: str, wait_ms: int = WAIT_MS) -> dict[str, str]:
    return {"datadist.Transport": transport, "llm.SyncKvCacheWaitTime": str(wait_ms)}


@REMOTE
def test_a_killed_peer_ends_calls_and_its_successor_can_be_linked(
    transport: str, make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., PeerProcess]
) -> None:
    mine = make_endpoint(cluster_id=1, options=_options(transport))
    first = make_peer(transport, cluster_id=2)
    mine.link(first)
    assert mine.pull(first, [0], [0]) == _native.LLM_SUCCESS
    first.kill()
    started = time.monotonic()
    assert mine.pull(first, [0], [0]) in (_native.LLM_FAILED, _native.LLM_TIMEOUT)
    assert _native.last_error()
    assert time.monotonic() - started < WAIT_MS / 1000 + SLACK_S
    second = make_peer(transport, cluster_id=2, seed=1)
    mine.link(second)
    expected = mine.read_memory()
    copy_blocks(second.read_memory(), expected, [3], [4])
    assert mine.pull(second, [3], [4]) == _native.LLM_SUCCESS
    np.testing.assert_array_equal(mine.memory, expected)


@REMOTE
def test_kill_during_queued_transfers_completes_each_of_them_once(
    transport: str, make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., PeerProcess]
) -> None:
    sizes = {"tensors": 8, "blocks": 64, "block_bytes": 64 * 1024}
    mine = make_endpoint(cluster_id=1, options=_options(transport), **sizes)
    peer = make_peer(transport, cluster_id=2, **sizes)
    mine.link(peer)
    queue = _native.TransferQueue(mine.datadist, threads=2)
    blocks = list(range(sizes["blocks"]))
    ids = {
        queue.submit_pull_blocks(peer.cluster_id, peer.cache_id, mine.cache_id, blocks, blocks, 30_000)
        for _ in range(50)
    }
    peer.kill()
    queue.close()
    completions = queue.poll()
    assert sorted(completion.id for completion in completions) == sorted(ids)
    allowed = {_native.LLM_SUCCESS, _native.LLM_FAILED, _native.LLM_TIMEOUT}
    assert {completion.status for completion in completions} <= allowed


@pytest.fixture
def stopped_peer(
    make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., PeerProcess]
) -> tuple[Endpoint, PeerProcess]:
    """Linked over tcp, then stopped: pulls from it wait for their whole timeout."""
    mine = make_endpoint(cluster_id=1, options=_options("tcp"))
    peer = make_peer("tcp", cluster_id=2)
    mine.link(peer)
    assert mine.pull(peer, [0], [0]) == _native.LLM_SUCCESS
    peer.stop()
    return mine, peer


def test_a_silent_peer_ends_the_call_at_its_timeout(stopped_peer: tuple[Endpoint, PeerProcess]) -> None:
    mine, peer = stopped_peer
    started = time.monotonic()
    assert mine.pull(peer, [0], [0]) == _native.LLM_TIMEOUT
    assert WAIT_MS / 1000 * 0.9 < time.monotonic() - started < WAIT_MS / 1000 + SLACK_S


def test_other_threads_run_while_a_call_waits(stopped_peer: tuple[Endpoint, PeerProcess]) -> None:
    mine, peer = stopped_peer
    thread = threading.Thread(target=lambda: mine.pull(peer, [0], [0]))
    turns = 0
    thread.start()
    while thread.is_alive():
        thread.join(0.001)
        turns += 1
    assert turns > 10  # with the GIL held for all of the timeout there would be one or two


def test_a_dropped_queue_and_endpoint_wait_for_what_runs(stopped_peer: tuple[Endpoint, PeerProcess]) -> None:
    mine, peer = stopped_peer
    queue = _native.TransferQueue(mine.datadist, threads=1)
    for _ in range(3):
        queue.submit_pull_blocks(peer.cluster_id, peer.cache_id, mine.cache_id, [0], [0], 60_000)
    started = time.monotonic()
    del queue
    assert time.monotonic() - started < WAIT_MS / 1000 + SLACK_S


PREAMBLE = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from support.endpoints import Endpoint, PeerProcess
from vllm_datadist_connector import _native

mine = Endpoint(cluster_id=1, options={{"datadist.Transport": "tcp", "llm.SyncKvCacheWaitTime": "60000"}})
peer = PeerProcess(cluster_id=2, options={{"datadist.Transport": "tcp"}})
mine.link(peer)
assert mine.pull(peer, [0], [0]) == 0
"""

LEAVE = "print(peer.process.pid, flush=True)"

EXITS = {
    "queue_and_objects_alive": """
queue = _native.TransferQueue(mine.datadist, threads=2)
for _ in range(10):
    queue.submit_pull_blocks(2, peer.cache_id, mine.cache_id, [0], [0], 60_000)
""",
    "queue_in_a_cycle": """
class Holder: pass
holder = Holder()
holder.itself = holder
holder.queue = _native.TransferQueue(mine.datadist, threads=2)
holder.queue.submit_pull_blocks(2, peer.cache_id, mine.cache_id, [0], [0], 60_000)
del holder
""",
    "daemon_threads_in_calls": """
def pull():
    while True:
        mine.pull(peer, [0], [0])
for _ in range(4):
    threading.Thread(target=pull, daemon=True).start()
""",
    "exception": """
queue = _native.TransferQueue(mine.datadist, threads=2)
queue.submit_pull_blocks(2, peer.cache_id, mine.cache_id, [0], [0], 60_000)
raise SystemExit(7)
""",
}


def _run(program: str) -> tuple[int, float, str]:
    """Exit status, seconds from LEAVE to the program's end, and what it wrote to standard error.

    The peer outlives the program: its end must not be what ends a call.
    """
    here = Path(__file__).resolve().parent
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE.format(tests=str(here.parent)) + program],
        cwd=here,  # not the repository's root, whose sources would stand before the installed package
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if process.stdout is None:
        raise RuntimeError("no standard output")
    peer = process.stdout.readline()
    started = time.monotonic()
    try:
        process.wait(timeout=EXIT_S)
        seconds = time.monotonic() - started
    finally:
        process.kill()
        if peer:
            os.kill(int(peer), signal.SIGKILL)
        _, errors = process.communicate()  # only now: the peer holds the same pipes
    assert peer, errors
    return process.returncode, seconds, errors


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_exits_with_operations_in_flight(name: str) -> None:
    status, seconds, errors = _run(f"peer.stop()\n{LEAVE}\n{EXITS[name]}")
    assert status == (7 if name == "exception" else 0), errors
    assert seconds < EXIT_S, errors


def test_a_forked_child_is_refused_and_ends_cleanly() -> None:
    program = f"""
queue = _native.TransferQueue(mine.datadist, threads=2)
import warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    signal.alarm(30)
    refused = [
        mine.pull(peer, [0], [0]),
        mine.push(peer, [0], [0]),
        mine.datadist.register_kv_cache([1, 8], 4, [mine.memory.ctypes.data])[0],
        mine.datadist.link_clusters([_native.ClusterInfo(2)], 100)[0],
        mine.datadist.listen_port()[0],
    ]
    if refused != [_native.LLM_FAILED] * len(refused):
        os._exit(3)
    for use in (queue.poll, queue.fileno, queue.close, lambda: queue.drain(0), lambda: queue.cancel(1)):
        try:
            use()
        except RuntimeError:
            continue
        os._exit(4)
    sys.exit(5)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 5, status
assert mine.pull(peer, [1], [1]) == 0, _native.last_error()
queue.close()
mine.datadist.finalize()
{LEAVE}
"""
    status, _, errors = _run(program)
    assert status == 0, errors


def test_a_child_forked_before_the_first_endpoint_has_its_own() -> None:
    program = f"""
mine.datadist.finalize()
import warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    signal.alarm(30)
    own = Endpoint(cluster_id=3, options={{"datadist.Transport": "tcp"}})
    own.link(peer)
    status = own.pull(peer, [0], [0])
    sys.exit(status)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
{LEAVE}
"""
    status, _, errors = _run(program)
    assert status == 0, errors


def test_the_program_that_serves_no_more_can_be_interrupted(stopped_peer: tuple[Endpoint, PeerProcess]) -> None:
    """A signal that comes during a call is handled when the call returns: at its timeout, not later."""
    mine, peer = stopped_peer
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT))

    def pull_and_be_interrupted() -> None:
        timer.start()
        mine.pull(peer, [0], [0])

    # Python leaves SIGINT ignored where it found it so: in a background job of a shell.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pull_and_be_interrupted()
        timer.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - started < WAIT_MS / 1000 + SLACK_S
