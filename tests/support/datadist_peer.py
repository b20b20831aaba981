"""Both ends of LLM-DataDist transfers for tests: nodes in processes of their own, an oracle beside each cache.

prompt, decoder = cluster.open(1), cluster.open(2)
src, dst = prompt.register("src"), decoder.register("dst")
decoder.link(prompt)
decoder.manager.pull_cache(src.row(2), dst, 5)
dst.expect_rows(src, [(2, 5)])
cluster.check()
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from support.datadist_channels import Channel
from support.datadist_node import CacheSpec, NumpyMemory
from support.datadist_values import Address, cluster_info, decode, encode, raise_error
from vllm_datadist_connector.llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LLMClusterInfo,
    LLMStatusCode,
)

LOOPBACK = "127.0.0.1"
LINK_TIMEOUT_MS = 20_000


@dataclass
class RemoteCache:
    """A cache of a node, and in `expected` what its memory must be."""

    peer: Peer
    name: str
    spec: CacheSpec
    cache_id: int = -1
    addrs: list[int] = field(default_factory=list)
    allocated: bool = False

    def __post_init__(self) -> None:
        self.expected = NumpyMemory(self.spec.seed, self.spec.tensors, self.spec.rows, self.spec.row_bytes)

    def encoded(self) -> dict[str, list[str]]:
        return {"Cache": [self.name]}

    def row(self, batch_index: int) -> CacheKeyByIdAndIndex:
        return CacheKeyByIdAndIndex(self.peer.cluster_id, self.cache_id, batch_index)

    @property
    def blocks_key(self) -> BlocksCacheKey:
        """The key that Peer.register gives a blocks cache."""
        return BlocksCacheKey(self.peer.cluster_id, self.spec.seed)

    def expect_rows(
        self,
        src: RemoteCache,
        rows: Iterable[tuple[int, int]],
        tensors: Iterable[tuple[int, int]] | None = None,
        size: int | None = None,
    ) -> None:
        """(source row, our row) of each (source tensor, our tensor), in that order; or blocks."""
        pairs = list(rows)
        for src_tensor, dst_tensor in tensors or zip(range(src.spec.tensors), range(self.spec.tensors), strict=True):
            for src_row, dst_row in pairs:
                self.expected[dst_tensor][dst_row, :size] = src.expected[src_tensor][src_row, :size]

    def expect_pieces(
        self,
        src: RemoteCache,
        src_row: int,
        blocks: Sequence[int],
        tensors: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        """The k-th piece of the source's row in our block blocks[k]; the last one is as long as the row lets it."""
        length = self.spec.row_bytes
        for src_tensor, dst_tensor in tensors or zip(range(src.spec.tensors), range(self.spec.tensors), strict=True):
            row = src.expected[src_tensor][src_row]
            for index, block in enumerate(blocks):
                piece = row[index * length : (index + 1) * length]
                self.expected[dst_tensor][block, : len(piece)] = piece

    def check(self) -> None:
        """The node's memory is what we expect, guards included."""
        read = np.frombuffer(base64.b64decode(self.peer.ask("read", self.name)), dtype=np.uint8)
        tensors = [
            self.expected[tensor].reshape(-1) if self.allocated else self.expected.whole[tensor]
            for tensor in range(self.spec.tensors)
        ]
        for index, (now, expected) in enumerate(zip(np.split(read, self.spec.tensors), tensors, strict=True)):
            wrong = np.flatnonzero(now != expected)
            if wrong.size:
                where = f"cache {self.name} of cluster {self.peer.cluster_id}, tensor {index}"
                raise AssertionError(f"{where}: bytes {wrong[:8]} ({wrong.size} in all) of {expected.size} are wrong")


class Gate:
    """A LayerSynchronizer of a node: layers below `opened` are ready; see datadist_node.Layers."""

    _count = 0

    def __init__(self, peer: Peer, opened: int, refused: int | None = None, broken: int | None = None) -> None:
        Gate._count += 1
        self._peer = peer
        self._name = f"layers {Gate._count}"
        self._arguments = [opened, refused, broken]

    def encoded(self) -> dict[str, Any]:
        return {"Layers": [self._name, *self._arguments]}

    def open_until(self, layer: int) -> None:
        self._peer.call(self._name, "open_until", layer)

    @property
    def asked(self) -> list[int]:
        """The layers that were waited for."""
        layers: list[int] = self._peer.call(self._name, "asked")
        return layers


class _Remote:
    """Calls of an object in the node's process, written as if it were here."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer = peer
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._peer.call(self._name, method, *args, **kwargs)


class Peer:
    """A node and its caches."""

    def __init__(self, channel: Channel, cluster_id: int, role: str, settings: dict[str, Any]) -> None:
        self.channel = channel
        self.cluster_id = cluster_id
        self.caches: dict[str, RemoteCache] = {}
        self.manager = _Remote(self, "manager")
        self.datadist = _Remote(self, "datadist")
        self.port: int = self.ask("open", cluster_id, role, settings)

    def ask(self, what: str, *arguments: Any) -> Any:
        answered = self.channel.ask({what: list(arguments)})
        if "error" in answered:
            raise_error(answered["error"])
        return answered["result"]

    def call(self, on: str, method: str, *args: Any, **kwargs: Any) -> Any:
        named = {name: encode(value) for name, value in kwargs.items()}
        return decode(self.ask("call", on, method, encode(list(args)), named))

    def object(self, name: str) -> _Remote:
        """One that an earlier call has made, such as a task."""
        return _Remote(self, name)

    def register(
        self, name: str, *, keys: Any = None, remote_accessible: bool | None = None, **shape: Any
    ) -> RemoteCache:
        """A cache of random memory between guards. A blocks cache gets RemoteCache.blocks_key unless `keys` is one."""
        cache = self._new_cache(name, **shape)
        if keys is None and cache.spec.layout == "blocks":
            keys = cache.blocks_key
        made = self.ask("register", name, asdict(cache.spec), encode(keys), remote_accessible)
        cache.cache_id, cache.addrs = made
        self.caches[name] = cache
        return cache

    def allocate(self, name: str, *, keys: Any = None, **shape: Any) -> RemoteCache:
        """As register, from the node's memory pool and without guards. No key for a blocks cache: keys=()."""
        cache = self._new_cache(name, **shape)
        if keys is None and cache.spec.layout == "blocks":
            keys = cache.blocks_key
        cache.cache_id, cache.addrs = self.ask("allocate", name, asdict(cache.spec), encode(keys))
        cache.allocated = True
        self.caches[name] = cache
        return cache

    def create_cpu_cache(self, name: str, **shape: Any) -> RemoteCache:
        """As register, host memory of a legacy node that its engine does not know."""
        cache = self._new_cache(name, placement="HOST", layout="blocks", **shape)
        self.ask("create_cpu_cache", name, asdict(cache.spec))
        self.caches[name] = cache
        return cache

    def forget(self, cache: RemoteCache) -> None:
        """Drops the node's last reference to a cache."""
        self.ask("forget", cache.name)
        del self.caches[cache.name]

    def _new_cache(self, name: str, **shape: Any) -> RemoteCache:
        defaults: dict[str, Any] = {
            "layout": "contiguous",
            "tensors": 8,
            "rows": 6,
            "row_bytes": 40,
            "seed": 1000 * self.cluster_id + len(self.caches),
            "placement": "DEVICE",
            "data_type": "DT_UINT8",
            "memory": "numpy",
        }
        return RemoteCache(self, name, CacheSpec(**(defaults | shape)))

    @property
    def address(self) -> Address:
        return LOOPBACK, self.port

    def info(self) -> LLMClusterInfo:
        """How another node links to this one."""
        return cluster_info(self.cluster_id, [self.address], [(LOOPBACK, 0)])

    def link(self, *servers: Peer) -> None:
        result = self.datadist.link_clusters([server.info() for server in servers], LINK_TIMEOUT_MS)
        if result != (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS] * len(servers)):
            raise RuntimeError(f"linking cluster {self.cluster_id} with {servers}: {result}")

    def check(self) -> None:
        for cache in self.caches.values():
            cache.check()

    def kill(self) -> None:
        """Ends the process, as a crash would."""
        self.channel.kill()
