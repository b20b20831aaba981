"""Engine endpoints with numpy memory, in this process or in one of their own, and the oracle of what transfers do."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from support import stopping
from vllm_datadist_connector import _native

Memory = npt.NDArray[np.uint8]
"""[tensor, block, byte]"""

LOOPBACK = "127.0.0.1"
UINT8 = 4
MIX = 3


def check(status: int) -> None:
    if status != _native.LLM_SUCCESS:
        raise RuntimeError(f"{_native.status_name(status)}: {_native.last_error()}")


class Peer(Protocol):
    """What a test needs of the other end."""

    cluster_id: int
    cache_id: int
    port: int

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of its LlmDataDist."""

    def read_memory(self) -> Memory: ...
    def link(self, peer: Peer) -> None: ...


class Endpoint:
    """An initialised LlmDataDist that listens on a free port and has registered random memory."""

    def __init__(
        self,
        cluster_id: int,
        tensors: int = 4,
        blocks: int = 32,
        block_bytes: int = 1000,
        seed: int = 0,
        options: Mapping[str, str] | None = None,
        provider: str = "engine",
    ) -> None:
        self.cluster_id = cluster_id
        random = np.random.default_rng(seed * 1000 + cluster_id)
        self.memory: Memory = random.integers(0, 256, (tensors, blocks, block_bytes), dtype=np.uint8)
        self.datadist = _native.LlmDataDist(cluster_id, MIX, provider)
        check(
            self.datadist.initialize(
                {"llm.DeviceId": "0", "llm.ListenIpInfo": f"{LOOPBACK}:0", "llm.SyncKvCacheWaitTime": "20000"}
                | dict(options or {})
            )
        )
        status, self.port = self.datadist.listen_port()
        check(status)
        status, self.cache_id = self.datadist.register_kv_cache(
            self.memory.shape[1:], UINT8, [tensor.ctypes.data for tensor in self.memory]
        )
        check(status)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.datadist.finalize()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.datadist, method)(*args, **kwargs)

    def read_memory(self) -> Memory:
        return self.memory.copy()

    def link(self, peer: Peer) -> None:
        status, _ = self.link_status(peer)
        check(status)

    def link_status(self, peer: Peer, timeout_ms: int = 20_000) -> tuple[int, list[int]]:
        return self.datadist.link_clusters([cluster_info(peer)], timeout_ms)

    def pull(self, peer: Peer, src: Sequence[int], dst: Sequence[int], **layers: Any) -> int:
        return self.datadist.pull_kv_blocks(peer.cluster_id, peer.cache_id, self.cache_id, src, dst, **layers)

    def push(self, peer: Peer, src: Sequence[int], dst: Sequence[int], **layers: Any) -> int:
        return self.datadist.push_kv_blocks(
            self.cache_id, peer.cluster_id, peer.cache_id, src, dst, len(self.memory), **layers
        )


def cluster_info(peer: Peer) -> _native.ClusterInfo:
    return _native.ClusterInfo(peer.cluster_id, [(LOOPBACK, peer.port)], [(LOOPBACK, 0)])


def copy_blocks(
    src: Memory, dst: Memory, src_blocks: Sequence[int], dst_blocks: Sequence[int], tensors: slice = slice(None)
) -> None:
    """The oracle: block by block, in list order."""
    for s, d in zip(src_blocks, dst_blocks, strict=True):
        dst[tensors, d] = src[tensors, s]


class PeerProcess:
    """An Endpoint in a process of its own, driven line by line through its standard input and output."""

    def __init__(self, **settings: Any) -> None:
        self.cluster_id: int = settings["cluster_id"]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer_main.py")), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cache_id, self.port = self._answer()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._ask({"method": method, "args": args, "kwargs": kwargs})

    def read_memory(self) -> Memory:
        answer = self._ask({"memory": True})
        return np.frombuffer(base64.b64decode(answer["bytes"]), dtype=np.uint8).reshape(answer["shape"]).copy()

    def link(self, peer: Peer) -> None:
        self._ask({"link": [peer.cluster_id, peer.cache_id, peer.port]})

    def stop(self) -> None:
        stopping.stop(self.process.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        if self.process.stdin is None:
            raise RuntimeError("the peer process has no standard input")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        if self.process.stdout is None:
            raise RuntimeError("the peer process has no standard output")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer process ended with status {self.process.wait()}")
        return json.loads(line)
