"""Expectations: requests of D whose prefill P has still to begin. They hold no blocks while they wait.

request names a hand-off ──> AWAIT at P's side channel ──┬── begun: what P will hold ──> an ordinary request of D
                             (again, as long as P        ├── ended, or nobody is there ──> prefilled here
                              has it in its queue)       └── P does not know of it after handoff_wait_s ──> the same
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vllm_datadist_connector.protocol.params import Expected, ParamsError, RemotePrefill, decode_prefill
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, HandoffNews, open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

MAX_WAITING = 2048
"""P keeps no more questions of one connection than twice that."""

PATIENCE_S = 5.0
"""P keeps a question so long before it answers that there is nothing new."""


@dataclass(slots=True)
class _Waiting:
    expected: Expected
    until_sealed: bool
    known_until: float
    """When P must have heard of it."""
    question: int = 0
    answer: RemotePrefill | str | None = None
    """What P has begun, or why it will not."""


class Expectations:
    """Belongs to the scheduler thread; asks, and never waits for an answer."""

    def __init__(self, trust: Trust, wait_s: float, answer_timeout_s: float) -> None:
        """
        Args:
            wait_s: a P that has not heard of a hand-off for so long will not.
        """
        self._trust = trust
        self._wait_s = wait_s
        self._answer_timeout_s = answer_timeout_s
        self._client: ChannelClient | None = None
        self._requests: dict[str, _Waiting] = {}
        self._questions: dict[int, str] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def expect(self, request_id: str, expected: Expected, until_sealed: bool) -> bool:
        """False: there are too many.

        Args:
            until_sealed: the prefill counts only once it is done.
        """
        if len(self._requests) >= MAX_WAITING:
            return False
        waiting = self._requests[request_id] = _Waiting(expected, until_sealed, time.monotonic() + self._wait_s)
        self._ask(request_id, waiting)
        return True

    def take(self, request_id: str) -> RemotePrefill | str | None:
        """What P has begun, or why there will be nothing, and the request is forgotten; None: not known yet."""
        self._hear()
        waiting = self._requests[request_id]
        if waiting.answer is not None:
            del self._requests[request_id]
        return waiting.answer

    def give_up(self, request_id: str) -> None:
        """Nobody waits for it any more: P need not keep its blocks."""
        waiting = self._requests.pop(request_id, None)
        if waiting is not None and self._client is not None:
            endpoint = Endpoint(waiting.expected.remote_host, waiting.expected.remote_port)
            self._client.release(endpoint, [waiting.expected.handoff], self._answer_timeout_s)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self, request_id: str, waiting: _Waiting, version: int = 0, stamp: int = 0) -> None:
        if self._client is None:
            self._client = open_client(self._trust)
        expected = waiting.expected
        endpoint = Endpoint(expected.remote_host, expected.remote_port)
        patience_s = min(PATIENCE_S, self._wait_s)
        waiting.question = self._client.await_handoff(
            endpoint, expected.handoff, None, version, stamp, patience_s, self._answer_timeout_s
        )
        self._questions[waiting.question] = request_id

    def _hear(self) -> None:
        for answer in self._client.take() if self._client is not None else ():
            request_id = self._questions.pop(answer.id, "")
            waiting = self._requests.get(request_id)
            if waiting is not None and waiting.question == answer.id:
                self._on_answer(request_id, waiting, answer)

    def _on_answer(self, request_id: str, waiting: _Waiting, answer: ChannelAnswer) -> None:
        news = answer.response
        late = time.monotonic() >= waiting.known_until
        if not isinstance(news, HandoffNews):
            if answer.timed_out and not late:
                self._ask(request_id, waiting)
            else:
                waiting.answer = f"{waiting.expected}: {answer.error or 'refused'}"
        elif news.blob is not None and (news.state == "sealed" or (news.state == "begun" and not waiting.until_sealed)):
            expected = waiting.expected
            try:
                waiting.answer = decode_prefill(news.blob, expected.remote_host, expected.remote_port)
            except ParamsError as error:
                waiting.answer = f"{expected}: {error}"
        elif news.state == "ended":
            waiting.answer = f"{waiting.expected}: {news.reason}"
        elif news.state == "unknown" and late:
            waiting.answer = f"{waiting.expected}: P has not heard of it for {self._wait_s:g} s"
        else:
            if news.state != "unknown":
                waiting.known_until = time.monotonic() + self._wait_s
            self._ask(request_id, waiting, news.version, news.stamp)
