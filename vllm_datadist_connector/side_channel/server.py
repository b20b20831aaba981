"""P's listener: one ROUTER socket on one address, served by one thread.

Contract of the handler: it runs on the server's thread, must not block, and answers every request. An exception in it
is our bug: it is logged, the peer is refused, the thread lives. A frame that breaks the protocol is dropped with a
refusal; a peer that does not read its answers loses them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import zmq

from vllm_datadist_connector.protocol.messages import (
    MAX_BODY_BYTES,
    ProtocolError,
    Refused,
    Request,
    Response,
    decode_request,
    encode,
)
from vllm_datadist_connector.side_channel.endpoint import Endpoint, zmq_url

logger = logging.getLogger(__name__)

_MAX_QUEUED_ANSWERS = 1024
"""Per peer; beyond it answers to that peer are dropped, so that a peer that stops reading cannot fill our memory."""

_MAX_QUEUED_REQUESTS = 64
"""Per peer; beyond it that peer waits. A request may be MAX_BODY_BYTES long."""


class SideChannelServer:
    """Binds at once (so that the port is known), serves after start()."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Binds `endpoint`; port 0 lets the system choose.

        Raises:
            OSError: names the address that could not be bound.
        """
        self._context = zmq.Context(io_threads=1)
        self._context.max_sockets = 8
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in endpoint.host
        self._socket.maxmsgsize = MAX_BODY_BYTES + 64
        self._socket.sndhwm = _MAX_QUEUED_ANSWERS
        self._socket.rcvhwm = _MAX_QUEUED_REQUESTS
        try:
            self._socket.bind(zmq_url(endpoint))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(f"side channel: cannot listen on {endpoint}: {error}") from error
        port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.endpoint = Endpoint(endpoint.host, port)
        self._thread: threading.Thread | None = None

    def start(self, handler: Callable[[Request], Response]) -> None:
        self._thread = threading.Thread(target=self._serve, args=(handler,), name="datadist-side-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving; idempotent."""
        if self._thread is None:
            self._context.destroy(linger=0)
            return
        # Terminating the context wakes the thread, which closes its socket; term() returns when it did.
        self._context.term()
        self._thread.join()

    def _serve(self, handler: Callable[[Request], Response]) -> None:
        with self._socket:
            while True:
                try:
                    identity, *frames = self._socket.recv_multipart()
                except zmq.ContextTerminated:
                    return
                if len(frames) != 1:
                    continue
                answer = _answer(frames[0], handler)
                try:
                    self._socket.send_multipart([identity, answer], flags=zmq.NOBLOCK)
                except zmq.ContextTerminated:
                    return
                except zmq.ZMQError as error:
                    logger.debug("side channel: answer dropped: %s", error)


def _answer(frame: bytes, handler: Callable[[Request], Response]) -> bytes:
    try:
        request = decode_request(frame)
    except ProtocolError as error:
        logger.debug("side channel: refused a frame: %s", error)
        return encode(Refused(id=0, reason=str(error)[:1024]))
    try:
        return encode(handler(request))
    except Exception:
        logger.exception("side channel: %s failed", type(request).__name__)
        return encode(Refused(id=request.id, reason="internal error"))
