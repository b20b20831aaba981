"""Two P and two D, pulls and pushes of all sizes, and a fault every second or so; every block that arrived is compared.

    python tests/soak/soak_run.py --seconds 600 --seed 7

Both D work all the time, one by cma and one by tcp, half of their links over a wire that can be cut or made slow. The
second P and the second D are never killed: what they hold in the end is compared with what they held in the beginning.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.party import (
    BLOCK_BYTES,
    BLOCKS,
    TENSORS,
    Answer,
    Party,
    engine_options,
    wait_for_baseline,
    wait_until,
    wire_between,
)
from support.wire import Mode, Wire

FAULTS = ("kill", "restart", "stop", "slow", "cut")
HEARTBEAT_MS = 500
LINK_MS = TRANSFER_MS = 1000
SLACK_S = 10.0
"""What a call may take beyond its timeout on a machine that has other work, too."""
PUSHED = (range(512, 768), range(768, BLOCKS))
"""Blocks of every P that one D pushes to; below, nobody writes."""
PAUSE_S = 0.004
"""Between two calls of a D, on average: others use the machine, too."""
CHECK_EVERY = 100
"""Calls after which all of a D's memory is compared, and not only what arrived."""
ALLOWED = {
    "LLM_SUCCESS",
    "LLM_FAILED",
    "LLM_TIMEOUT",
    "LLM_NOT_YET_LINK",
    "LLM_LINK_FAILED",
    "LLM_ALREADY_LINK",
    "LLM_KV_CACHE_NOT_EXIST",
}
MAX_ANON_GROWTH_KIB = 16 << 10
WARM = 0.25
"""The part of the run after which memory has to stay as it is."""


@dataclass
class Tally:
    blocks: int = 0
    wrong_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


class Prefill:
    """A P that may be killed and come back on the same port, with other contents."""

    def __init__(self, cluster_id: int, seeds: random.Random) -> None:
        self._cluster_id = cluster_id
        self._seeds = seeds
        self.alive = threading.Event()
        self.party = self._start(0)
        self.alive.set()

    def _start(self, port: int) -> Party:
        options = engine_options("auto", heartbeat_ms=HEARTBEAT_MS, transfer_ms=TRANSFER_MS, port=port)
        return Party(self._cluster_id, options, self._seeds.getrandbits(32))

    def restart(self) -> None:
        dead = self.party
        self.alive.clear()
        dead.kill()
        self.party = self._start(dead.port)
        self.alive.set()

    def now(self) -> Party:
        """Not one of which nobody knows yet."""
        self.alive.wait()
        return self.party

    def stop(self, seconds: float) -> None:
        self.party.stop()
        time.sleep(seconds)  # so long is it silent
        self.party.go_on()


class Decode(threading.Thread):
    """A D and who works with it."""

    def __init__(self, index: int, transport: str, prefills: list[Prefill], seed: int, end: threading.Event) -> None:
        super().__init__(name=f"D{index}")
        self._index = index
        self._transport = transport
        self._prefills = prefills
        self._random = random.Random(seed)
        self._end = end
        self._wires: dict[int, Wire] = {}
        self._linked: dict[int, Party] = {}
        self.tally = Tally()
        self.error: Exception | None = None
        self._killed = False
        self.party = self._start()

    def _start(self) -> Party:
        options = engine_options(self._transport, heartbeat_ms=HEARTBEAT_MS, transfer_ms=TRANSFER_MS)
        return Party(101 + self._index, options, self._random.getrandbits(32))

    def run(self) -> None:
        try:
            while not self._end.wait(self._random.expovariate(1 / PAUSE_S)):
                self._work(self._random.choice(self._prefills))
            for prefill in self._prefills:
                self._forget(prefill.party)
            self.party.check()
        except Exception as error:
            self.error = error
            self._end.set()

    # ---- faults, from another thread ----

    def kill(self) -> None:
        self._killed = True
        self.party.process.kill()
        self.party.process.wait()

    def cut(self) -> bool:
        return self._strike("reset")

    def slow(self, seconds: float) -> bool:
        if not self._strike("drip"):
            return False
        time.sleep(seconds)  # so long is it slow
        self._strike("pass")
        return True

    def _strike(self, mode: Mode) -> bool:
        wires = list(self._wires.values())
        for wire in wires:
            wire.release(mode)
        return bool(wires)

    # ---- one transfer ----

    def _work(self, prefill: Prefill) -> None:
        owner = prefill.now()
        try:
            if self._linked.get(owner.cluster_id) is owner or self._link(owner):
                self._transfer(prefill, owner)
        except (ConnectionError, BrokenPipeError):  # of the test's own connection to one of the two: it was killed
            self._linked.pop(owner.cluster_id, None)
            if self._killed:
                self._renew()

    def close(self) -> None:
        self.party.kill()
        while self._wires:
            self._wires.popitem()[1].close()

    def _renew(self) -> None:
        self.close()
        self._linked.clear()
        self._killed = False
        self.party = self._start()

    def _link(self, owner: Party) -> bool:
        self._forget(owner)
        port = owner.port
        if self._random.random() < 0.5:
            self._wires[owner.cluster_id], port = wire_between(self._transport, self.party, owner)
        answer = self._call("link", owner.cluster_id, port, LINK_MS)
        if answer.status == "LLM_SUCCESS":
            self._linked[owner.cluster_id] = owner
        return answer.status == "LLM_SUCCESS"

    def _transfer(self, prefill: Prefill, owner: Party) -> None:
        count = min(int(self._random.paretovariate(0.5)), 200)
        push = self._random.random() < 0.2
        theirs = PUSHED[self._index] if push else range(PUSHED[0].start)
        src = self._random.sample(range(BLOCKS) if push else theirs, count)
        dst = self._random.sample(theirs if push else range(BLOCKS), count)
        into = owner if push else self.party
        into.fill(dst, self._random.randrange(256))
        answer = self._call("push" if push else "pull", owner.cluster_id, owner.cache_id, src, dst)
        if answer.status != "LLM_SUCCESS":
            # The owner of pushed blocks may write until the link is gone at its end.
            self._forget(owner)
            if push:
                wait_until(lambda: self._is_forgotten(owner), "the owner drops the link")
            into.accept(dst)
            return
        successor = prefill.now()
        if push and successor is not owner:
            successor.accept(dst)  # one of the two has them
            return
        self.tally.blocks += count
        self.tally.wrong_bytes += self._wrong_bytes(into, [self.party] if push else [owner, successor], src, dst)
        if sum(self.tally.calls.values()) % CHECK_EVERY == 0:
            self.party.check()

    def _wrong_bytes(self, into: Party, sources: list[Party], src: list[int], dst: list[int]) -> int:
        """All of them are of one source: of two lives of a P that was renewed during the call, either may have sent."""
        wrong = 0
        for source in sources:
            into.expect(source, src, dst)
            wrong = into.wrong_bytes(dst)
            if not wrong:
                break
        return wrong

    def _is_forgotten(self, owner: Party) -> bool:
        return not owner.ask("is_linked", self.party.cluster_id).value

    def _forget(self, owner: Party) -> None:
        self._linked.pop(owner.cluster_id, None)
        self.party.ask("unlink", owner.cluster_id, owner.port, LINK_MS, True)
        if wire := self._wires.pop(owner.cluster_id, None):
            wire.close()

    def _call(self, do: str, *arguments: object) -> Answer:
        answer = self.party.start(do, *arguments).result()
        self.tally.calls[f"{do} {answer.status}"] += 1
        self.tally.slowest_s = max(self.tally.slowest_s, answer.seconds)
        timeout_ms = LINK_MS if do == "link" else TRANSFER_MS
        if answer.status not in ALLOWED or answer.seconds > timeout_ms / 1000 + SLACK_S:
            raise AssertionError(f"{do}: {answer}")
        return answer


TCP_THREADS = max(2, min(os.cpu_count() or 1, 8))
"""Started when there are connections for them, with a descriptor each; they stay, as do those that served pushes."""


class Soak:
    def __init__(self, seconds: float, seed: int) -> None:
        self._seconds = seconds
        self._random = random.Random(seed)
        self._end = threading.Event()
        self._deck: list[str] = []
        self.faults: Counter[str] = Counter()
        self.prefills = [Prefill(1, self._random), Prefill(2, self._random)]
        self.decodes = [
            Decode(index, transport, self.prefills, self._random.getrandbits(32), self._end)
            for index, transport in enumerate(("cma", "tcp"))
        ]
        self._steady = {"P2": self.prefills[1].party, "D2": self.decodes[1].party}
        self._baseline = {name: party.held() for name, party in self._steady.items()}
        self.anon_kib: dict[str, list[int]] = {name: [] for name in self._steady}

    def run(self) -> None:
        started = time.monotonic()
        for decode in self.decodes:
            decode.start()
        while not self._end.wait(self._random.uniform(0.3, 1.2)) and time.monotonic() - started < self._seconds:
            self._strike()
            if time.monotonic() - started > WARM * self._seconds:
                for name, party in self._steady.items():
                    self.anon_kib[name].append(party.status_kib("RssAnon"))
        self._end.set()
        for decode in self.decodes:
            decode.join()

    def _strike(self) -> None:
        if not self._deck:
            self._deck = self._random.sample(FAULTS, len(FAULTS))
        fault = self._deck.pop()
        decode, seconds = self._random.choice(self.decodes), self._random.uniform(0.1, 2.5)
        fired = True
        if fault == "kill":
            self.decodes[0].kill()
        elif fault == "restart":
            self.prefills[0].restart()
        elif fault == "stop":
            self._random.choice(self.prefills).stop(seconds)
        elif fault == "slow":
            fired = decode.slow(seconds)
        else:
            fired = decode.cut()
        self.faults[fault] += fired

    def check(self) -> None:
        for decode in self.decodes:
            if decode.error is not None:
                raise decode.error
            assert decode.tally.wrong_bytes == 0, self.report()
            assert decode.tally.blocks > 0, self.report()
        assert all(self.faults[fault] for fault in FAULTS), self.report()
        for name, party in self._steady.items():
            descriptors, threads = self._baseline[name]
            wait_for_baseline(party, (descriptors + TCP_THREADS, threads + TCP_THREADS + len(self.decodes)))
            party.check()
            assert self.anon_kib[name][-1] - self.anon_kib[name][0] < MAX_ANON_GROWTH_KIB, self.report()

    def report(self) -> str:
        tallies = [decode.tally for decode in self.decodes]
        lines = [
            f"{self._seconds:.0f} s, {sum(tally.blocks for tally in tallies)} blocks of {TENSORS} x {BLOCK_BYTES} bytes"
            f" verified, {sum(tally.wrong_bytes for tally in tallies)} wrong bytes",
            f"faults: {dict(self.faults)}",
        ]
        for decode, tally in zip(self.decodes, tallies, strict=True):
            lines.append(f"{decode.name}: slowest call {tally.slowest_s:.2f} s, {dict(sorted(tally.calls.items()))}")
        for name, party in self._steady.items():
            kib = self.anon_kib[name] or [0]
            lines.append(
                f"{name}: (descriptors, threads) {self._baseline[name]} before, {party.held()} after; "
                f"anonymous memory {kib[0]} KiB at {WARM:.0%} of the time, {kib[-1]} KiB at its end"
            )
        return "\n".join(lines)

    def close(self) -> None:
        self._end.set()
        for decode in self.decodes:
            if decode.is_alive():
                decode.join()
            decode.close()
        for prefill in self.prefills:
            prefill.party.kill()


def soak(seconds: float, seed: int) -> str:
    """What was done; raises if anything did not hold."""
    run = Soak(seconds, seed)
    try:
        run.run()
        run.check()
        return run.report()
    finally:
        run.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(soak(arguments.seconds, arguments.seed))


if __name__ == "__main__":
    main()
