"""D's end: requests to many servers from one thread, with a deadline on each.

Single-threaded: whoever created the client calls it. Every sent request comes back exactly once from wait(), as an
answer or as the reason why there is none; close() drops what is outstanding. A server that let a request time out gets
a fresh connection next time, so that nothing that was queued for its dead predecessor reaches it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from vllm_datadist_connector.protocol.messages import (
    MAX_BODY_BYTES,
    ProtocolError,
    Refused,
    Request,
    Response,
    decode_response,
    encode,
)
from vllm_datadist_connector.side_channel.endpoint import Endpoint, zmq_url

MAX_ENDPOINTS = 256
"""Open connections; requests beyond it fail at once, so that forged params cannot make us pile up sockets."""

IDLE_S = 300.0
"""A connection unused for so long is closed; it must exceed the renewal interval of the longest lease we grant by
default, or each renewal would reconnect."""


class Answer(NamedTuple):
    """`response` or, if it is None, why there is none."""

    id: int
    response: Response | None
    error: str
    timed_out: bool = False
    """The server said nothing, but somebody listens there, or nothing is known of it: to ask again may help."""


class _Pending(NamedTuple):
    endpoint: Endpoint
    deadline: float


class _Connection:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint, now: float) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.ipv6 = ":" in endpoint.host
        self.socket.maxmsgsize = MAX_BODY_BYTES + 64
        self.socket.reconnect_ivl = 100
        self.socket.reconnect_ivl_max = 2000
        self.last_used = now
        self._monitor = self.socket.get_monitor_socket(zmq.Event.CONNECTED | zmq.Event.CLOSED)
        self._refused = False
        try:
            self.socket.connect(zmq_url(endpoint))
        except (zmq.ZMQError, UnicodeEncodeError) as error:
            # A socket that stays open would keep the client's close() waiting for ever.
            self.close()
            raise ProtocolError(f"cannot connect: {error}") from None

    def is_refused(self) -> bool:
        """Whether the last attempt to connect has failed: who is only busy accepts all the same."""
        while self._monitor.poll(0):
            self._refused = recv_monitor_message(self._monitor)["event"] == zmq.Event.CLOSED
        return self._refused

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()


class SideChannelClient:
    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._poller = zmq.Poller()
        self._connections: dict[Endpoint, _Connection] = {}
        self._pending: dict[int, _Pending] = {}
        self._failed: list[Answer] = []
        self._ids = itertools.count(1)

    def send(self, endpoint: Endpoint, build: Callable[[int], Request], timeout_s: float) -> int:
        """Sends build(id) and returns the id; never blocks. Failures come back from wait() as well."""
        request_id = next(self._ids)
        now = time.monotonic()
        try:
            frame = encode(build(request_id))
            self._connection(endpoint, now).socket.send(frame, flags=zmq.NOBLOCK)
        except (ProtocolError, zmq.ZMQError) as error:
            self._failed.append(Answer(request_id, None, f"{endpoint}: {error}"))
            return request_id
        self._pending[request_id] = _Pending(endpoint, now + timeout_s)
        return request_id

    def wait(self, fds: Sequence[int], until: float | None) -> tuple[list[Answer], set[int]]:
        """Waits for answers, for readiness of `fds`, or for time.monotonic() to reach `until`.

        Returns:
            Every answer that is due, and those of `fds` that are readable.
        """
        now = time.monotonic()
        timeout_ms = 0 if self._failed else self._timeout_ms(now, until)
        for fd in fds:
            self._poller.register(fd, zmq.POLLIN)
        ready = {source for source, _ in self._poller.poll(timeout_ms)}
        for fd in fds:
            self._poller.unregister(fd)
        answers, self._failed = self._failed, []
        for endpoint, connection in list(self._connections.items()):
            if connection.socket in ready:
                answers += self._receive(endpoint, connection)
        now = time.monotonic()
        answers += self._expire(now)
        self._close_idle(now)
        return answers, {fd for fd in fds if fd in ready}

    def close(self) -> None:
        for endpoint in list(self._connections):
            self._disconnect(endpoint)
        self._context.destroy(linger=0)

    def _connection(self, endpoint: Endpoint, now: float) -> _Connection:
        connection = self._connections.get(endpoint)
        if connection is None:
            if len(self._connections) >= MAX_ENDPOINTS:
                raise ProtocolError(f"more than {MAX_ENDPOINTS} side channels open")
            connection = _Connection(self._context, endpoint, now)
            self._connections[endpoint] = connection
            self._poller.register(connection.socket, zmq.POLLIN)
        connection.last_used = now
        return connection

    def _disconnect(self, endpoint: Endpoint) -> None:
        connection = self._connections.pop(endpoint)
        self._poller.unregister(connection.socket)
        connection.close()

    def _timeout_ms(self, now: float, until: float | None) -> int | None:
        deadlines = [pending.deadline for pending in self._pending.values()]
        if until is not None:
            deadlines.append(until)
        # Rounded up: a poll that ends just before its deadline would be repeated until the millisecond is over.
        return max(0, math.ceil((min(deadlines) - now) * 1000)) if deadlines else None

    def _receive(self, endpoint: Endpoint, connection: _Connection) -> list[Answer]:
        answers: list[Answer] = []
        while True:
            try:
                frame = connection.socket.recv(flags=zmq.NOBLOCK)
            except zmq.Again:
                return answers
            try:
                response = decode_response(frame)
            except ProtocolError as error:
                return answers + self._fail_endpoint(endpoint, f"{endpoint}: {error}")
            if isinstance(response, Refused) and response.id == 0:
                # The server could not read our frame, so it does not know which request it was.
                return answers + self._fail_endpoint(endpoint, f"{endpoint} refused: {response.reason}")
            pending = self._pending.get(response.id)
            if pending is not None and pending.endpoint == endpoint:
                del self._pending[response.id]
                answers.append(Answer(response.id, response, ""))

    def _expire(self, now: float) -> list[Answer]:
        overdue = {pending.endpoint for pending in self._pending.values() if pending.deadline <= now}
        answers: list[Answer] = []
        for endpoint in overdue:
            expired = [i for i, p in self._pending.items() if p.endpoint == endpoint and p.deadline <= now]
            # A pending request has a connection: whoever closes one drops its requests first.
            refused = self._connections[endpoint].is_refused()
            reason = "does not let us connect" if refused else "did not answer in time"
            for request_id in expired:
                del self._pending[request_id]
                answers.append(Answer(request_id, None, f"{endpoint} {reason}", timed_out=not refused))
            if endpoint in self._connections and not any(p.endpoint == endpoint for p in self._pending.values()):
                self._disconnect(endpoint)
        return answers

    def _fail_endpoint(self, endpoint: Endpoint, reason: str) -> list[Answer]:
        failed = [i for i, p in self._pending.items() if p.endpoint == endpoint]
        for request_id in failed:
            del self._pending[request_id]
        self._disconnect(endpoint)
        return [Answer(request_id, None, reason) for request_id in failed]

    def _close_idle(self, now: float) -> None:
        busy = {pending.endpoint for pending in self._pending.values()}
        for endpoint, connection in list(self._connections.items()):
            if endpoint not in busy and now - connection.last_used > IDLE_S:
                self._disconnect(endpoint)
