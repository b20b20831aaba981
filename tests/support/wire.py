"""A wire between two engines that a test can hold at a chosen place, and then let pass, drip, swallow or break.

    with Wire(listener, connect) as wire:
        wire.hold(Place("control", turn=1))   # the next thing that the client says
        ...                                    # start the call
        wire.wait_held()                       # it has said it, and the server has not heard it
        wire.release("reset")

It knows nothing of what the bytes mean: connections count in the order in which they are made, the control connection
first, and what a client says in one go is a turn. Heartbeats are turns, too: give engines a long interval.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

LOOPBACK = "127.0.0.1"
OWN = ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])
"""A loopback address of our own: whoever comes back on a port there finds that nobody has taken it meanwhile."""
CHUNK = 16 * 1024
DRIP_S = 0.02
"""Of one byte."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() a reset
_WAIT_S = 60.0

Mode = Literal["pass", "swallow answers", "swallow both", "drip", "reset"]
Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Place:
    """Where to hold: before a connection is accepted (on="dial"), when the client begins its `turn`-th turn on the
    control connection (on="control"), or when more than `count` bytes have come `direction` on the data connections."""

    on: Literal["dial", "control", "data"]
    turn: int = 1
    direction: Direction = "down"
    count: int = 0


class _Connection:
    def __init__(self, number: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number
        self.ends: dict[Direction, socket.socket] = {"up": client, "down": server}
        """By the direction of what is read from it."""
        self.last: Direction | None = None
        self.silent: set[Direction] = set()
        """Where nothing comes any more."""

    def other(self, direction: Direction) -> socket.socket:
        return self.ends["down" if direction == "up" else "up"]


class Wire:
    """`connect` gives the server's end of a new connection; OSError where nobody listens."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self._listener = listener
        self._connect = connect
        self._lock = threading.Condition()
        self._place: Place | None = None
        self._held = False
        self._mode: Mode = "pass"
        self._counted = 0
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        self._healing = False
        self._connections: list[_Connection] = []
        self.accepted = 0
        self.swallowed = 0
        """Bytes that came and went nowhere."""
        self.dripped = 0
        self.resets = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def family(self) -> int:
        return self._listener.family

    @property
    def address(self) -> Any:
        """As connect() takes it."""
        return self._listener.getsockname()

    def shrink_backlog(self) -> None:
        self._listener.listen(0)

    def hold(self, place: Place) -> None:
        with self._lock:
            self._place, self._counted = place, 0
        self._nudge()

    def wait_held(self) -> None:
        with self._lock:
            if not self._lock.wait_for(lambda: self._held, _WAIT_S):
                raise TimeoutError(f"nothing came to {self._place}")

    def release(self, mode: Mode = "pass") -> None:
        with self._lock:
            self._mode, self._place, self._held = mode, None, False
        self._nudge()

    def heal(self) -> None:
        """Passes again. What stood breaks: bytes have been lost there, which a connection never does and goes on."""
        with self._lock:
            self._healing = True
            self._place, self._held = None, False
        self._nudge()

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for connection in list(self._connections):
            for end in connection.ends.values():
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # a send to somebody who does not read ends
        self._nudge()
        self._thread.join()
        for end in (self._listener, self._wake, self._woken, *self._ends()):
            end.close()

    def _ends(self) -> list[socket.socket]:
        return [end for connection in self._connections for end in connection.ends.values()]

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _run(self) -> None:
        while not self._closing:
            sources = {end: (c, d) for c in self._connections for d, end in c.ends.items() if d not in c.silent}
            held = self._held
            ready, _, _ = select.select([self._woken, *([] if held else [self._listener, *sources])], [], [])
            if self._woken in ready:
                self._woken.recv(CHUNK)
                if self._mode == "reset" or self._healing:
                    self._break_all()
                if self._healing:
                    self._mode, self._healing = "pass", False
                continue  # what is to be done with the rest may have changed
            for end in ready:
                if self._held or self._closing:
                    break
                if end is self._listener:
                    self._accept()
                elif end.fileno() >= 0:
                    self._move(*sources[end])

    def _accept(self) -> None:
        if self._arrived(lambda place: place.on == "dial"):
            return
        client, _ = self._listener.accept()
        self.accepted += 1
        if self._mode == "reset":
            self._break(client)
            return
        try:
            server = self._connect()
        except OSError:
            client.close()
            return
        for end in (client, server):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append(_Connection(len(self._connections), client, server))

    def _move(self, connection: _Connection, direction: Direction) -> None:
        source, target = connection.ends[direction], connection.other(direction)
        try:
            chunk = source.recv(CHUNK, socket.MSG_PEEK)
            if chunk and self._arrived(lambda place: self._is_at(place, connection, direction, len(chunk))):
                return
            source.recv(len(chunk))
        except OSError:
            chunk = b""
        if not chunk:
            self._ended(connection, direction)
            return
        connection.last = direction
        if self._mode == "swallow both" or (self._mode == "swallow answers" and direction == "down"):
            self.swallowed += len(chunk)
            return
        try:
            if self._mode == "drip":
                self._drip(chunk, target)
            else:
                target.sendall(chunk)
        except OSError:
            self._ended(connection, direction)

    def _ended(self, connection: _Connection, direction: Direction) -> None:
        """Who waits at the end of a wire that swallows or drips does not hear of it."""
        connection.silent.add(direction)
        if self._mode in ("pass", "reset"):
            self._connections.remove(connection)
            for end in connection.ends.values():
                end.close()

    def _drip(self, chunk: bytes, target: socket.socket) -> None:
        for byte in chunk:
            if self._closing:
                return
            time.sleep(DRIP_S)  # a slow wire is what this is
            target.sendall(bytes([byte]))
            self.dripped += 1

    def _is_at(self, place: Place, connection: _Connection, direction: Direction, size: int) -> bool:
        if place.on == "control" and connection.number == 0 and direction == "up" and connection.last != "up":
            self._counted += 1
            return self._counted == place.turn
        if place.on == "data" and connection.number > 0 and direction == place.direction:
            self._counted += size
            return self._counted > place.count
        return False

    def _arrived(self, is_at: Callable[[Place], bool]) -> bool:
        with self._lock:
            if self._place is None or not is_at(self._place):
                return False
            self._held = True
            self._lock.notify_all()
            return True

    def _break_all(self) -> None:
        for connection in list(self._connections):
            self._connections.remove(connection)
            for end in connection.ends.values():
                self._break(end)

    def _break(self, end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.close()
        self.resets += 1
