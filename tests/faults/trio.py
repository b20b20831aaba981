"""A caller, an owner of memory that it links to, and a third that both are linked to all the time and that never fails."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence

from support.party import BLOCKS, Call, Party, engine_options, wait_until
from support.wire import LOOPBACK, Wire

CALLER, OWNER, HEALTHY = 1, 2, 3
PATIENCE_MS = 20_000
QUICK_HEARTBEAT_MS = 200
NO_HEARTBEAT_MS = 60_000
"""Of engines whose turns on the wire are counted."""
KEYS = range(1, BLOCKS + 1)
"""Of a two-sided cache: the request that row KEYS[i] - 1 belongs to."""

_FRESH = range(64, 80)
_HEALTHY_SRC, _HEALTHY_DST = range(16), range(1000, 1016)
_LOAD_SRC, _LOAD_DST = range(16, 20), range(1016, 1020)


class Trio:
    def __init__(self, transport: str, *, heartbeat_ms: int = NO_HEARTBEAT_MS, two_sided: bool = False) -> None:
        self.transport = transport
        self.two_sided = two_sided
        self._heartbeat_ms = heartbeat_ms
        self._seeds = itertools.count(1)
        self._fills = itertools.cycle(range(1, 250))
        self._keys = itertools.count(1)
        self.healthy = self._party(HEALTHY)
        self.caller = self._party(CALLER)
        self.owner = self._party(OWNER)
        self._meet(self.caller)
        self._meet(self.owner)
        self.check_fresh_link()  # what is made once for all is made now

    @property
    def parties(self) -> tuple[Party, Party, Party]:
        return self.caller, self.owner, self.healthy

    def close(self) -> None:
        for party in self.parties:
            party.kill()

    def renew_owner(self, port: int = 0) -> None:
        """After its death."""
        self.owner = self._party(OWNER, port)
        self._meet(self.owner)

    def renew_caller(self) -> None:
        self.caller = self._party(CALLER)
        self._meet(self.caller)

    def _party(self, cluster_id: int, port: int = 0) -> Party:
        options = engine_options(
            self.transport, heartbeat_ms=self._heartbeat_ms, two_sided=self.two_sided, port=port
        )
        return Party(cluster_id, options, next(self._seeds), KEYS if self.two_sided else ())

    def _meet(self, party: Party) -> None:
        party.ask("link", HEALTHY, self.healthy.port, PATIENCE_MS)
        self.check_healthy(party)

    # ---- what must work ----

    def pull(self, party: Party, owner: Party, src: Sequence[int], dst: Sequence[int]) -> None:
        """Two-sided: a row by a key that nobody has pulled by."""
        party.fill(dst, next(self._fills))
        if not self.two_sided:
            party.expect(owner, src, dst)
            party.ask("pull", owner.cluster_id, owner.cache_id, list(src), list(dst))
        else:
            key = KEYS[next(self._keys) % BLOCKS] if owner is self.healthy else KEYS[src[0]]
            party.expect(owner, [key - 1], dst[:1])
            party.ask("pull_row", owner.cluster_id, key, dst[0])
        party.check()

    def check_healthy(self, party: Party) -> None:
        self.pull(party, self.healthy, _HEALTHY_SRC, _HEALTHY_DST)

    def check_fresh_link(self) -> None:
        """A new link of the two works, both ways, and leaves nothing behind."""
        caller, owner = self.caller, self.owner
        owner.cache_id = owner.ask("register", list(KEYS) if self.two_sided else []).value
        caller.ask("link", OWNER, owner.port, PATIENCE_MS)
        self.pull(caller, owner, _FRESH, _FRESH)
        if not self.two_sided:
            owner.fill(_FRESH, next(self._fills))
            owner.expect(caller, _HEALTHY_SRC, _FRESH)
            caller.ask("push", OWNER, owner.cache_id, list(_HEALTHY_SRC), list(_FRESH))
        owner.check()
        caller.ask("unlink", OWNER, owner.port, PATIENCE_MS)

    def start_load(self) -> Call:
        self.caller.expect(self.healthy, _LOAD_SRC, _LOAD_DST)
        return self.caller.start("load", HEALTHY, self.healthy.cache_id, list(_LOAD_SRC), list(_LOAD_DST))

    def end_load(self, load: Call) -> None:
        self.caller.ask("idle")
        answer = load.result()
        assert answer.status == "LLM_SUCCESS", answer
        assert answer.value > 0

    def next_fill(self) -> int:
        return next(self._fills)

    # ---- the wire between caller and owner ----

    def wire(self) -> tuple[Wire, int]:
        """(the wire, the port by which the caller reaches the owner over it)."""
        if self.transport == "tcp":
            listener = socket.create_server((LOOPBACK, 0))
            port: int = listener.getsockname()[1]
            # The owner of the moment: it may be another by then.
            return Wire(listener, lambda: socket.create_connection((LOOPBACK, self.owner.port))), port
        # Within a host the two ask the kernel who the other is, and it must say the truth: the owner makes the listener
        # and the caller the connections.
        with socket.socket() as unused:
            unused.bind((LOOPBACK, 0))
            port = unused.getsockname()[1]
        listener = self.owner.ask_socket("listen", f"datadist/{LOOPBACK}:{port}")
        owner = self.owner
        return Wire(listener, lambda: self.caller.ask_socket("connect", f"datadist/{LOOPBACK}:{owner.port}")), port


def wait_for_baseline(party: Party, baseline: tuple[int, int]) -> None:
    def held() -> bool:
        descriptors, threads = party.held()
        return descriptors <= baseline[0] and threads <= baseline[1]

    wait_until(held, f"cluster {party.cluster_id} back to {baseline} descriptors and threads")
