"""A caller, an owner of memory that it links to, and a third that both are linked to and that never fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from support.party import BLOCKS, PATIENCE_MS, Call, Key, Party, engine_options, wire_between
from support.wire import Wire
from table import Cell, is_patient

CALLER, OWNER, HEALTHY = 1, 2, 3
FAULT_MS = 1500
"""Timeout of transfers that wait in vain."""
QUICK_HEARTBEAT_MS = 500
NO_HEARTBEAT_MS = 60_000
"""Of engines whose turns on the wire are counted."""
CONSUMED: list[Key] = [("request", row + 1) for row in range(BLOCKS)]
LASTING: list[Key] = [("prefix", row + 1) for row in range(BLOCKS)]
"""Of the rows of two-sided caches: those of the owner, and those of who is pulled from again and again."""

_FRESH = range(64, 80)
_HEALTHY_SRC, _HEALTHY_DST = range(16), range(1000, 1016)
_LOAD_SRC, _LOAD_DST = range(16, 20), range(1016, 1020)


@dataclass(frozen=True, order=True)
class TrioKind:
    transport: str
    quick_heartbeat: bool
    two_sided: bool
    patient: bool
    """Its transfers may take as long as they need: no fault makes them wait in vain."""


def kind_of(cell: Cell) -> TrioKind:
    return TrioKind(cell.transport, cell.phase == "idle", cell.phase == "confirm", is_patient(cell))


class Trio:
    def __init__(self, kind: TrioKind) -> None:
        self._kind = kind
        self._seeds = itertools.count(1)
        self._fills = itertools.cycle(range(1, 250))
        self.healthy = self._party(HEALTHY)
        self.caller = self._party(CALLER)
        self.owner = self._party(OWNER)
        self._meet(self.caller)
        self._meet(self.owner)
        self.check_fresh_link()  # what is made once for all is made now

    @property
    def two_sided(self) -> bool:
        return self._kind.two_sided

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
        kind = self._kind
        options = engine_options(
            kind.transport,
            heartbeat_ms=QUICK_HEARTBEAT_MS if kind.quick_heartbeat else NO_HEARTBEAT_MS,
            transfer_ms=PATIENCE_MS if kind.patient else FAULT_MS,
            two_sided=kind.two_sided,
            port=port,
        )
        keys = (LASTING if cluster_id == HEALTHY else CONSUMED) if self._kind.two_sided else ()
        return Party(cluster_id, options, next(self._seeds), keys)

    def _meet(self, party: Party) -> None:
        party.ask("link", HEALTHY, self.healthy.port, PATIENCE_MS)
        self.check_healthy(party)

    def meet_again(self, party: Party) -> None:
        """Who did not say anything for too long has lost its links, the healthy one, too."""
        if not party.ask("is_linked", HEALTHY).value:
            party.ask("unlink", HEALTHY, self.healthy.port, PATIENCE_MS, True)
            self._meet(party)

    # ---- what must work ----

    def pull(self, party: Party, owner: Party, src: Sequence[int], dst: Sequence[int]) -> None:
        """Two-sided: the first of the blocks, as a row."""
        party.fill(dst, next(self._fills))
        party.ask(*self._call_of_pull(party, owner, src, dst))
        party.check()

    def _call_of_pull(self, party: Party, owner: Party, src: Sequence[int], dst: Sequence[int]) -> tuple[Any, ...]:
        if not self._kind.two_sided:
            party.expect(owner, src, dst)
            return "pull", owner.cluster_id, owner.cache_id, list(src), list(dst)
        party.expect(owner, src[:1], dst[:1])
        return "pull_row", owner.cluster_id, (LASTING if owner is self.healthy else CONSUMED)[src[0]], dst[0]

    def check_healthy(self, party: Party) -> None:
        self.pull(party, self.healthy, _HEALTHY_SRC, _HEALTHY_DST)

    def check_fresh_link(self) -> None:
        """A new link of the two works, both ways, and leaves nothing behind."""
        caller, owner = self.caller, self.owner
        owner.register()
        caller.ask("link", OWNER, owner.port, PATIENCE_MS)
        self.pull(caller, owner, _FRESH, _FRESH)
        if not self._kind.two_sided:
            owner.fill(_FRESH, next(self._fills))
            owner.expect(caller, _HEALTHY_SRC, _FRESH)
            caller.ask("push", OWNER, owner.cache_id, list(_HEALTHY_SRC), list(_FRESH))
        owner.check()
        caller.ask("unlink", OWNER, owner.port, PATIENCE_MS, True)  # who is told in so many words lingers for a second

    def start_load(self) -> Call:
        self.pull(self.caller, self.healthy, _LOAD_SRC, _LOAD_DST)
        return self.caller.start("load", *self._call_of_pull(self.caller, self.healthy, _LOAD_SRC, _LOAD_DST))

    def end_load(self, load: Call) -> None:
        self.caller.ask("idle")
        answer = load.result()
        assert answer.status == "LLM_SUCCESS", answer
        assert answer.value > 0

    def next_fill(self) -> int:
        return next(self._fills)

    def wire(self) -> tuple[Wire, int]:
        """Between caller and owner."""
        return wire_between(self._kind.transport, self.caller, self.owner)
