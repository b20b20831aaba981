"""The other host's end: `selftest --role b` starts a party for each connection and relays lines to it.

Who connects makes this host run transfers of memory of its own, nothing else: but that takes time and memory, so both
ends prove that they know a key before the first line, unless the user lets in whoever can connect.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import selectors
import socket
import threading
import time
from pathlib import Path

from vllm_datadist_connector.selftest.remote import ProcessWire, SocketWire
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

_GREETING = b"vllm-datadist selftest 1\n"
_NONCE_BYTES = 32
_GREETING_S = 10.0
_CONNECT_S = 10.0
_MAX_PARTIES = 64
_MAX_REQUEST = 1 << 22


class HostError(RuntimeError):
    """The other host cannot be reached, or is not who it should be."""


def _key(trust: Trust) -> bytes:
    """The first key of the file; without one whoever speaks this protocol is let in."""
    if not trust.auth:
        return b""
    lines = (line.strip() for line in Path(trust.auth).read_text(encoding="ascii").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise HostError(f"key file {trust.auth!r}: no key in it")
    return bytes.fromhex(keys[0])


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise HostError("the other end hung up in the greeting: is it a selftest, with the same key?")
        data += more
    return data


def greet(connection: socket.socket, trust: Trust, role: bytes) -> None:
    """Both ends of a connection prove that they know the key.

    Raises:
        HostError: the other one does not, or is no selftest.
    """
    connection.settimeout(_GREETING_S)
    ours = secrets.token_bytes(_NONCE_BYTES)
    key, theirs_role = _key(trust), b"b" if role == b"a" else b"a"
    try:
        connection.sendall(_GREETING + ours)
        if _exactly(connection, len(_GREETING)) != _GREETING:
            raise HostError("the other end is no selftest of this version")
        theirs = _exactly(connection, _NONCE_BYTES)
        # With the role of the prover, so that a proof cannot be sent back to who made it.
        both = (ours + theirs) if role == b"a" else (theirs + ours)
        connection.sendall(hmac.new(key, role + both, hashlib.sha256).digest())
        proof = _exactly(connection, hashlib.sha256().digest_size)
    except OSError as error:
        raise HostError(f"the greeting failed: {error}") from error
    if not hmac.compare_digest(proof, hmac.new(key, theirs_role + both, hashlib.sha256).digest()):
        raise HostError("the other end does not know our key")
    connection.settimeout(None)


def connect(endpoint: Endpoint, trust: Trust) -> tuple[SocketWire, str]:
    """A party on the other host, and the address of ours by which we reach it."""
    try:
        connection = socket.create_connection(endpoint, timeout=_CONNECT_S)
    except OSError as error:
        raise HostError(f"{endpoint}: {error}; does `vllm-datadist selftest --role b` run there?") from error
    try:
        greet(connection, trust, b"a")
    except HostError:
        connection.close()
        raise
    return SocketWire(connection), str(connection.getsockname()[0])


class Supervisor:
    """Starts a party for each connection, and ends it with it."""

    def __init__(self, endpoint: Endpoint, trust: Trust) -> None:
        """
        Raises:
            OSError: the address cannot be bound.
        """
        self._trust = trust
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        self._listener = socket.create_server(endpoint, family=family)
        self.port: int = self._listener.getsockname()[1]
        self._room = threading.BoundedSemaphore(_MAX_PARTIES)

    def serve(self) -> None:
        """Until close()."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            if not self._room.acquire(blocking=False):
                return
            try:
                greet(connection, self._trust, b"b")
                _relay(connection)
            except (HostError, OSError):
                return  # it knows itself why
            finally:
                self._room.release()


def _relay(connection: socket.socket) -> None:
    party = ProcessWire()
    answers = party.process.stdout
    if answers is None:
        raise RuntimeError("a process without pipes")
    unread = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(answers, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if answers in ready:
                    came = party.receive(time.monotonic())
                    if not came:
                        return
                    connection.sendall(came)
                if connection in ready:
                    came = connection.recv(1 << 16)
                    if not came:
                        return
                    *lines, unread = (unread + came).split(b"\n")
                    if len(unread) > _MAX_REQUEST:
                        return
                    for line in lines:
                        if line + b"\n" == SocketWire.KILL:
                            party.kill()
                            connection.sendall(SocketWire.KILLED)
                            return
                        party.send(line + b"\n")
    finally:
        party.kill()
