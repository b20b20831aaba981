"""Ends of the side channel for tests: a client that is asked and waited for, and a server of no code of ours."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from support import frames
from support.pd import LOOPBACK, WAIT_S
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.wakeup import wait_readable


def collect(client: ChannelClient, count: int) -> dict[int, ChannelAnswer]:
    """The next `count` answers."""
    answers: dict[int, ChannelAnswer] = {}
    end = time.monotonic() + WAIT_S
    while len(answers) < count:
        assert wait_readable([client.fileno()], end), "no answer and no failure"
        for one in client.take():
            assert one.id not in answers
            answers[one.id] = one
    return answers


def wait_for(client: ChannelClient, request_id: int) -> ChannelAnswer:
    return collect(client, 1)[request_id]


Answer = Callable[[frames.Frame], frames.Frame | None]


class BareServer:
    """Listens as an instance does, within the host; answers each request as it is told."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._tcp = socket.create_server((LOOPBACK, 0))
        self.endpoint = Endpoint(LOOPBACK, self._tcp.getsockname()[1])
        self._local = socket.socket(socket.AF_UNIX)
        self._local.bind(f"\0datadist/{self.endpoint}")
        self._local.listen()
        self._streams: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._local.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for each in (*self._streams, self._local, self._tcp):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self._local.accept()
                self._streams.append(stream)
                self._threads.append(threading.Thread(target=self._serve, args=(stream,)))
                self._threads[-1].start()

    def _serve(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (request := frames.receive(stream)) is not None:
                if request.kind == frames.CHANNEL:
                    stream.sendall(frames.encode(frames.Frame(frames.CHANNEL_READY, request.seq, b"")))
                elif (answer := self._answer(request)) is not None:
                    stream.sendall(frames.encode(answer))
