"""A wire of known speed between a client and a server that listens on loopback."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time

HOST = "127.0.0.1"
CHUNK = 16 * 1024


class SlowRelay:
    """Passes every connection to its port on to `server_port`, each direction at `bytes_per_s` at most.

    With a `gate` nothing passes before it is set; `arrived` is set once there is something to pass.
    """

    def __init__(self, server_port: int, bytes_per_s: float = math.inf, gate: threading.Event | None = None) -> None:
        self._server_port = server_port
        self._bytes_per_s = bytes_per_s
        self._gate = gate
        self.arrived = threading.Event()
        self._moved = 0
        self._progress = threading.Condition()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> SlowRelay:
        return self

    def __exit__(self, *error: object) -> None:
        with self._progress:
            self._closed = True
        for end in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):  # its other end was faster
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @property
    def moved(self) -> int:
        """Bytes passed on so far, both ways."""
        with self._progress:
            return self._moved

    def wait_until_moved(self, count: int, timeout_s: float) -> bool:
        with self._progress:
            return self._progress.wait_for(lambda: self._moved >= count, timeout_s)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                server = socket.create_connection((HOST, self._server_port))
            except OSError:
                client.close()  # the server is gone: its client learns of it in the same way
                continue
            with self._progress:
                if self._closed:  # meanwhile, without these two
                    client.close()
                    server.close()
                    return
                self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while chunk := source.recv(CHUNK):
                self.arrived.set()
                if self._gate is not None:
                    self._gate.wait()
                target.sendall(chunk)
                with self._progress:
                    self._moved += len(chunk)
                    self._progress.notify_all()
                time.sleep(len(chunk) / self._bytes_per_s)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # an end is gone, and with it the connection
