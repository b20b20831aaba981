"""One endpoint of a provider in a process of its own, driven line by line through standard input and output.

A request names a method of Party and its arguments; the answer is its value, or why it raised. What a provider refuses
is a value, not an error: an Outcome.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.selftest import memory as memories

HOST = "host"
MEMORY = re.compile(r"host|(?:cpu|npu)(?::\d{1,3})?")
"""Host memory, or a device of torch's."""
ALLOCATOR = "PYTORCH_NPU_ALLOC_CONF"
_MIX = 3
_UINT8 = 4
_BUSY_PORTS = 8
"""Ports that are tried where the provider cannot say which one the system chose."""
_POLL_S = 0.0005
_STEPS_BYTE = 0x3C
"""What a step in flight writes."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of the provider came to."""

    status: str
    why: str = ""
    seconds: float = 0.0
    value: int = 0
    """Cache id or port."""

    @property
    def ok(self) -> bool:
        return self.status == "LLM_SUCCESS"


class PullLoop(msgspec.Struct, frozen=True, kw_only=True):
    """Pulls that were repeated until one failed."""

    last: Outcome
    succeeded: int
    failed_at: float
    """On the host's monotonic clock."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """What the provider reports of a link."""

    alive: bool
    transport: str = ""
    reason: str = ""


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a cluster listens; port 0: nowhere."""

    cluster_id: int
    host: str
    port: int


class Party:
    def __init__(self, provider: str, memory: str, cluster_id: int, expandable: bool | None = None) -> None:
        """
        Args:
            memory: MEMORY.
            expandable: whether memory comes in segments that grow; None: as the environment has it.
        """
        if not MEMORY.fullmatch(memory):
            raise ValueError(f"{memory!r} is no memory of a party's")
        self._device = None if memory == HOST else memory
        self._host_memory = memories.SegmentedMemory if expandable else memories.HostMemory
        if expandable is not None:
            os.environ[ALLOCATOR] = f"expandable_segments:{expandable}"  # read when torch_npu is imported
        if self._device:
            # Before the provider, as in a vLLM worker: torch brings libraries along that it may find or stumble over.
            _enter_device(self._device)
        self._datadist = _native.LlmDataDist(cluster_id, _MIX, provider)
        self._capabilities = self._datadist.capabilities
        self._memories: dict[str, memories.Memory] = {}
        self._host = ""
        self._loop: threading.Thread | None = None
        self._looped: PullLoop | None = None

    def _enter(self) -> None:
        status = self._datadist.enter_thread()
        if status != _native.LLM_SUCCESS:
            raise RuntimeError(f"EnterThread: {_native.status_name(status)}: {_native.last_error()}")

    def _timed(self, call: Callable[[], int | tuple[int, int]]) -> Outcome:
        started = time.monotonic()
        answer = call()
        seconds = time.monotonic() - started
        status, value = answer if isinstance(answer, tuple) else (answer, 0)
        why = _native.last_error() if status != _native.LLM_SUCCESS else ""
        return Outcome(status=_native.status_name(status), why=why, seconds=seconds, value=value)

    # ---- what may be asked for ----

    def capabilities(self) -> dict[str, int]:
        return {name: int(value) for name, value in self._capabilities._asdict().items()}

    def initialize(self, host: str, listen: bool, options: Mapping[str, str]) -> Outcome:
        """`value` is the port of the listener, if any."""
        self._host = host
        tries = _BUSY_PORTS if listen and not self._capabilities.reports_port else 1
        for _ in range(tries):
            port = 0 if self._capabilities.reports_port or not listen else _free_port(host)
            given = {**options, **({"llm.ListenIpInfo": f"{host}:{port}"} if listen else {})}
            outcome = self._timed(lambda given=given: self._datadist.initialize(given))  # type: ignore[misc]
            if outcome.ok:
                break
        if outcome.ok:
            self._enter()  # as the thread that makes links does; the device is known from now on
        if not outcome.ok or not listen or not self._capabilities.reports_port:
            return msgspec.structs.replace(outcome, value=port)
        return msgspec.structs.replace(self._timed(self._datadist.listen_port), seconds=outcome.seconds)

    def allocate(self, name: str, size: int, seed: int | None) -> int:
        """Address of new memory that holds a pattern, or zeros."""
        new = memories.DeviceMemory(size, self._device) if self._device else self._host_memory(size)
        if seed is not None:
            memories.fill(new, seed)
        self._memories[name] = new
        return new.address

    def register(self, name: str, offset: int, blocks: int, block_bytes: int, repeat: int) -> Outcome:
        """`value` is the cache id. The memory is registered as `repeat` tensors that follow one another."""
        first = self._memories[name].address + offset
        addrs = [first + i * blocks * block_bytes for i in range(repeat)]
        return self._timed(lambda: self._datadist.register_kv_cache([blocks, block_bytes], _UINT8, addrs))

    def unregister(self, cache_id: int) -> Outcome:
        return self._timed(lambda: self._datadist.unregister_kv_cache(cache_id))

    def link(self, peer: Mapping[str, Any], timeout_ms: int) -> Outcome:
        return self._timed(lambda: _worst(self._datadist.link_clusters([self._cluster(peer)], timeout_ms)))

    def unlink(self, peer: Mapping[str, Any], timeout_ms: int, force: bool) -> Outcome:
        return self._timed(lambda: _worst(self._datadist.unlink_clusters([self._cluster(peer)], timeout_ms, force)))

    def _cluster(self, peer: Mapping[str, Any]) -> _native.ClusterInfo:
        address = msgspec.convert(peer, Address)
        return _native.ClusterInfo(address.cluster_id, [(address.host, address.port)], [(self._host, 0)])

    def pull(self, source: int, cache: int, to: int, blocks: list[int], to_blocks: list[int]) -> Outcome:
        return self._timed(lambda: self._datadist.pull_kv_blocks(source, cache, to, blocks, to_blocks))

    def pull_in_thread(self, enter: bool, **pull: Any) -> Outcome:
        outcomes: list[Outcome] = []

        def run() -> None:
            if enter:
                self._enter()
            outcomes.append(self.pull(**pull))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return outcomes[0]

    def pull_beside_work(self, at: tuple[int, int, int], fenced: bool, times: int, **pull: Any) -> int:
        """After how many of so many pulls that each fill one block the memory `kv` does not hold what was pulled. Each
        time a step in flight begins to write to that block before.

        Args:
            at: seed of the source's pattern, offset there, length.
            fenced: the pull waits until that step has ended.
        """
        seed, source, length = at
        memory, (block,) = self._memories["kv"], pull["to_blocks"]
        expected, wrong = memories.pattern(seed, source, length), 0
        for _ in range(times):
            work = memory.begin_work(block * length, length, _STEPS_BYTE)
            while fenced and not work.has_ended():
                time.sleep(_POLL_S)
            outcome = self.pull(**pull)
            work.wait()
            if not outcome.ok:
                raise RuntimeError(f"PullKvBlocks: {outcome.status}: {outcome.why}")
            wrong += memory.read(block * length, length) != expected
        return wrong

    def begin_pulls(self, **pull: Any) -> int:
        """Repeats a pull in a thread until it fails; returns once it has been made for the first time."""
        begun = threading.Event()

        def run() -> None:
            self._enter()
            succeeded = 0
            while (last := self.pull(**pull)).ok:
                succeeded += 1
                begun.set()
            self._looped = PullLoop(last=last, succeeded=succeeded, failed_at=time.monotonic())
            begun.set()

        self._loop = threading.Thread(target=run, daemon=True)
        self._loop.start()
        begun.wait()
        return 0

    def end_pulls(self) -> PullLoop:
        if self._loop is None:
            raise RuntimeError("no pulls were begun")
        self._loop.join()
        if self._looped is None:
            raise RuntimeError("the pulls ended without a result")
        return self._looped

    def query(self, cluster_id: int) -> Link | None:
        status, report = self._datadist.query_link(cluster_id)
        if status != _native.LLM_SUCCESS or report is None:
            return None
        return Link(alive=report.alive, transport=report.transport, reason=report.transport_reason)

    def wait_until_lost(self, cluster_id: int, seconds: float) -> float | None:
        """When, on the host's monotonic clock, the provider said that the link is not alive; None: it never did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            report = self.query(cluster_id)
            if report is None or not report.alive:
                return time.monotonic()
            time.sleep(_POLL_S)
        return None

    def grow(self, name: str) -> int:
        self._memories[name].grow()
        return 0

    def fill(self, name: str, value: int) -> int:
        memories.fill_with(self._memories[name], value)
        return 0

    def fill_pattern(self, name: str, seed: int) -> int:
        memories.fill(self._memories[name], seed)
        return 0

    def write(self, name: str, offset: int, value: int, length: int) -> int:
        self._memories[name].write(offset, bytes([value]) * length)
        return 0

    def count(self, name: str, offset: int, value: int, length: int) -> int:
        """Bytes of a range that are `value`."""
        return self._memories[name].read(offset, length).count(value)

    def watch(self, name: str, value: int, seconds: float) -> int:
        """Bytes of the memory that are not `value` at any look during `seconds`; the last look comes after them."""
        end = time.monotonic() + seconds
        while True:
            last = time.monotonic() >= end
            changed = memories.count_other_than(self._memories[name], value)
            if changed or last:
                return changed

    def wrong(self, name: str, seed: int, source_seed: int, moves: list[tuple[int, int, int]]) -> int:
        return memories.count_wrong(self._memories[name], seed, source_seed, moves)

    def memcpy_rate(self, size: int, run: int) -> float | None:
        """Bytes a second of copies of `run` bytes each between two memories of this process; None on a device."""
        if self._device:
            return None
        source, target = memories.HostMemory(size), memories.HostMemory(size)
        memories.fill(source, 1)
        memories.fill(target, 2)
        started = time.monotonic()
        for offset in range(0, size - run + 1, 2 * run):
            ctypes.memmove(target.address + offset, source.address + offset, run)
        return (size // 2) / max(time.monotonic() - started, 1e-9)

    def memory_used(self) -> int:
        """Bytes of host memory that this process has, and of its device's that are taken."""
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident + (_device_memory_used(self._device) if self._device else 0)

    def finalize(self) -> int:
        self._datadist.finalize()
        return 0


ASKED = frozenset(name for name, value in vars(Party).items() if callable(value) and not name.startswith("_"))


def _worst(answer: tuple[int, list[int]]) -> int:
    """The status of the one cluster if there is one: the overall status says less."""
    overall, each = answer
    return each[0] if each and each[0] != _native.LLM_SUCCESS else overall


def _enter_device(device: str) -> None:
    import torch

    if device.startswith("npu"):
        importlib.import_module("torch_npu")  # makes torch know the device
    if device.partition(":")[0] != "cpu":
        getattr(torch, device.partition(":")[0]).set_device(device)


def _device_memory_used(device: str) -> int:
    import torch

    if device.partition(":")[0] == "cpu":
        return 0
    free, total = getattr(torch, device.partition(":")[0]).mem_get_info()
    return int(total - free)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def serve(make: Callable[..., Party] = Party) -> None:
    """Answers what comes on standard input until it ends."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    party: Party | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "open":
                party = make(**request["args"])
                value: object = party.capabilities()
            elif party is None or request["do"] not in ASKED:
                raise ValueError(f"{request['do']!r} may not be asked for")  # noqa: TRY301
            else:
                value = getattr(party, request["do"])(**request["args"])
            answer = {"value": msgspec.to_builtins(value)}
        except Exception as error:
            # Whatever it was, it is the test's finding: this process goes on answering.
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
