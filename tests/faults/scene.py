"""How a call of the caller's is brought into a phase, and held there until the fault has struck."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

import numpy as np
from support.party import PATIENCE_MS, Answer, Call, Party, wait_until
from support.wire import Mode, Place, Wire
from table import Cell, is_patient
from trio import CONSUMED, FAULT_MS, OWNER, Trio

LINK_MS, UNLINK_MS = 1500, 500
"""Timeouts of links and unlinks that wait in vain. A wire that drips needs longer for what an unlink says."""
FEW = list(range(100, 116))
MANY = list(range(256, 512))
SCATTERED = np.random.default_rng(0).permutation(960).tolist()
"""As much as fits beside what the healthy pair moves, in an order that leaves hardly a block its neighbour."""
DATA_BYTES = 64 * 1024
"""Of a transfer over tcp that have passed when the fault strikes."""


@dataclass
class Scene:
    trio: Trio
    cell: Cell
    wire: Wire
    port: int
    call: Call | None = None
    into: Party | None = None
    """Who is written to, if anybody."""
    expects: tuple[list[int], list[int]] | None = None
    """(source blocks, destination blocks) if the call succeeds."""
    frozen: bool = False
    fillers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def timeout_ms(self) -> int:
        """Of the call."""
        if is_patient(self.cell):
            return PATIENCE_MS
        if self.cell.phase == "unlink":
            return UNLINK_MS
        return LINK_MS if self.cell.phase in ("dial", "handshake") else FAULT_MS

    def enter(self) -> None:
        {
            "dial": self._dial,
            "handshake": self._handshake,
            "describe": self._describe,
            "pull": self._pull,
            "push": self._push,
            "confirm": self._confirm,
            "idle": self._idle,
            "unlink": self._unlink,
        }[self.cell.phase]()

    def go_on(self, mode: Mode = "pass") -> None:
        self.wire.release(mode)
        if self.frozen and mode == "reset":  # a copy that goes on may end before the wire fails
            wait_until(lambda: self.wire.resets > 0, "the wire resets")
        self.thaw()

    def thaw(self) -> None:
        if self.frozen:
            self.trio.caller.go_on()
            self.frozen = False

    def result(self) -> Answer:
        if self.call is None:
            raise RuntimeError("nothing was called")
        return self.call.result()

    def settle(self, succeeded: bool) -> None:
        """After the call. What it wrote into the caller is complete, or ends here; the owner may still be writing."""
        if self.into is None:
            return
        if succeeded and self.expects is not None:
            self.into.unsettled = []
            self.into.expect(self.trio.owner if self.into is self.trio.caller else self.trio.caller, *self.expects)
        elif self.into is self.trio.caller:
            self.into.settle()

    def start_pull(self) -> None:
        self.call = self.trio.caller.start(*self._transfer("pull", FEW, FEW))

    def is_unanswered(self) -> bool:
        """Whether nobody answers who dials now, because as many wait already as the kernel lets."""
        with socket.socket(self.wire.family, socket.SOCK_STREAM) as end:
            return not self._knock(end)

    # ---- phases ----

    def _dial(self) -> None:
        self.wire.hold(Place("dial"))
        if self.cell.fault == "swallow both":
            self.wire.shrink_backlog()
            self._fill_backlog()
        self._start("link", OWNER, self.port, self.timeout_ms)

    def _handshake(self) -> None:
        self.wire.hold(Place("control"))
        self._start("link", OWNER, self.port, self.timeout_ms)

    def _describe(self) -> None:
        self._link()
        self.wire.hold(Place("control"))
        self._start(*self._transfer("pull", FEW, FEW))

    def _pull(self) -> None:
        self._link()
        self._make_known()
        if self.cell.transport == "tcp":
            self.wire.hold(Place("data", direction="down", count=DATA_BYTES))
            self._start(*self._transfer("pull", SCATTERED, SCATTERED))  # more than the kernel's buffers take
        else:
            self._freeze_copying()

    def _push(self) -> None:
        self._link()
        self._make_known()
        tcp = self.cell.transport == "tcp"
        self.wire.hold(Place("data", direction="up", count=DATA_BYTES) if tcp else Place("control"))
        self._start(*self._transfer("push", MANY, MANY))

    def _confirm(self) -> None:
        self._link()
        self.wire.hold(Place("control", turn=2))  # the first one asks what the key names
        caller, (row,) = self.trio.caller, FEW[:1]
        caller.fill([row], self.trio.next_fill())
        self._await_write(caller, [0], [row])
        self._start("pull_row", OWNER, CONSUMED[0], row)

    def _idle(self) -> None:
        self._link()
        self._make_known()

    def _unlink(self) -> None:
        self._link()
        self.wire.hold(Place("control"))
        self._start("unlink", OWNER, self.port, self.timeout_ms)

    # ---- steps ----

    def _link(self) -> None:
        self.trio.caller.ask("link", OWNER, self.port, PATIENCE_MS)

    def _make_known(self) -> None:
        """The owner's cache, so that the call has nothing to ask."""
        self.trio.pull(self.trio.caller, self.trio.owner, FEW, FEW)

    def _start(self, do: str, *arguments: object) -> None:
        self.call = self.trio.caller.start(do, *arguments)
        self.wire.wait_held()

    def _transfer(self, do: str, src: list[int], dst: list[int]) -> tuple[str, int, int, list[int], list[int]]:
        into = self.trio.caller if do == "pull" else self.trio.owner
        into.fill(dst, self.trio.next_fill())
        self._await_write(into, src, dst)
        return do, OWNER, self.trio.owner.cache_id, src, dst

    def _await_write(self, into: Party, src: list[int], dst: list[int]) -> None:
        self.into, self.expects, into.unsettled = into, (src, dst), dst

    def _freeze_copying(self) -> None:
        """The kernel copies for the caller, without a wire: seen half-way in its memory, he is stopped."""
        caller, owner = self.trio.caller, self.trio.owner
        src = list(range(len(SCATTERED)))
        self._await_write(caller, src, SCATTERED)
        caller.forget_pages(len(src))
        tensors = caller.tensors(caller.whole)
        self.call = caller.start("pull", OWNER, owner.cache_id, src, SCATTERED)
        while not tensors[0][SCATTERED[0]].any():
            os.sched_yield()
        caller.stop()
        self.frozen = True
        assert not tensors[-1][SCATTERED[-1]].any(), "all was copied before the caller had stopped"

    def _fill_backlog(self) -> None:
        while not self.is_unanswered():
            end = self.fillers.enter_context(socket.socket(self.wire.family, socket.SOCK_STREAM))
            self._knock(end)

    def _knock(self, end: socket.socket) -> bool:
        """Whether the kernel has answered. Over loopback it does so at once, or not at all."""
        end.setblocking(False)
        try:
            end.connect(self.wire.address)
        except BlockingIOError:
            with contextlib.suppress(OSError):
                return bool(end.getpeername())
            return False
        return True
