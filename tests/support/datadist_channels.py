"""Where the node of a test's peer lives: in a process of its own, or in this one."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from support.datadist_node import Node, answer
from vllm_datadist_connector.llm_datadist import LLMDataDist

_ANSWER_DEADLINE_S = 300
_TESTS = Path(__file__).resolve().parents[1]


class Channel(Protocol):
    """Where a node lives."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def kill(self) -> None: ...


class ProcessChannel:
    """A node in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.datadist_node"],
            cwd=_TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the node's process has no pipes")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], _ANSWER_DEADLINE_S)[0]:
            self.kill()  # a late answer would be taken for that to the next request
            raise RuntimeError(f"no answer within {_ANSWER_DEADLINE_S} s to {request}")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the node's process ended with status {self.process.wait()}, asked {request}")
        answered: dict[str, Any] = json.loads(line)
        return answered

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class InProcessChannel:
    """A node in this process, for the transport between endpoints of one process."""

    def __init__(self) -> None:
        self._node: Node | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._node, answered = answer(self._node, json.loads(json.dumps(request)))
        # One LLMDataDist per process is a rule of the Python API, not of the engine; here two ends share a process.
        LLMDataDist.llm_engine_instance = None
        return answered

    def kill(self) -> None:
        raise RuntimeError("a node in this process cannot be killed alone")


class ProcessPool:
    """Processes that serve one node after the other; a test that kills one costs the next test a new one."""

    def __init__(self) -> None:
        self._idle: list[ProcessChannel] = []

    def take(self) -> ProcessChannel:
        return self._idle.pop() if self._idle else ProcessChannel()

    def give(self, channel: ProcessChannel) -> None:
        if channel.is_alive:
            self._idle.append(channel)

    def close(self) -> None:
        for channel in self._idle:
            channel.kill()
