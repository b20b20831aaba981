"""One LLMDataDist and its caches, by requests; as a program a JSON request a line in, a JSON answer a line out.

`python -m support.datadist_node` serves one node after the other, so that tests need not pay for a process each.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from support.arenas import Arena, view
from support.datadist_values import Decoders, decode, encode, encode_error
from vllm_datadist_connector.llm_datadist import (
    Cache,
    CacheDesc,
    CacheTask,
    DataType,
    KvCache,
    KvCacheManager,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    Placement,
)
from vllm_datadist_connector.llm_datadist.v2.cache_manager import CacheManager

Bytes = npt.NDArray[np.uint8]
_GATE_DEADLINE_S = 60.0


class NumpyMemory(Arena):
    """Tensors of numpy."""

    @property
    def whole(self) -> Sequence[Bytes]:
        """The tensors with the guard bytes around them."""
        return self._whole


class TorchMemory(NumpyMemory):
    """Tensors of torch on the CPU; an address is what their data_ptr() says."""

    def __init__(self, seed: int, tensors: int, rows: int, row_bytes: int) -> None:
        import torch

        super().__init__(seed, tensors, rows, row_bytes)
        first = self[0].ctypes.data - self._whole[0].ctypes.data
        guarded = [torch.from_numpy(tensor).clone() for tensor in self._whole]
        self.tensors = [tensor[first:-first].view(rows, row_bytes) for tensor in guarded]
        self._whole = [tensor.numpy() for tensor in guarded]

    @property
    def addrs(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors]


_MEMORIES = {"numpy": NumpyMemory, "torch": TorchMemory}


@dataclass(frozen=True)
class CacheSpec:
    """How a node makes a cache and what its oracle is made of. Allocated memory has no guards."""

    layout: str
    tensors: int
    rows: int
    row_bytes: int
    seed: int
    placement: str
    data_type: str
    memory: str
    devices: int = 1
    """Of a legacy node: `tensors` are those of all of them, device by device."""

    def desc(self) -> CacheDesc:
        itemsize = CacheDesc(1, [1], DataType[self.data_type]).size
        shape = [self.rows, self.row_bytes // itemsize]
        return CacheDesc(self.tensors // self.devices, shape, DataType[self.data_type], Placement[self.placement])


class Layers(LayerSynchronizer):
    """Layer i is ready once `opened` says so; refuses or breaks at a layer of choice."""

    def __init__(self, opened: int, refused: int | None = None, broken: int | None = None) -> None:
        self._changed = threading.Condition()
        self._opened = opened
        self._refused = refused
        self._broken = broken
        self.asked: list[int] = []

    def open_until(self, opened: int) -> None:
        with self._changed:
            self._opened = opened
            self._changed.notify_all()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:  # noqa: ARG002
        self.asked.append(layer_index)
        if layer_index == self._broken:
            raise RuntimeError(f"layer {layer_index} is broken")
        with self._changed:
            return self._changed.wait_for(lambda: layer_index < self._opened, _GATE_DEADLINE_S) and (
                layer_index != self._refused
            )


class Node:
    """Answers the requests of datadist_peer.Peer."""

    def __init__(self, cluster_id: int, role: str, settings: dict[str, Any]) -> None:
        config = LLMConfig()
        for name, value in settings.items():
            setattr(config, name, value)
        self._legacy = not config.enable_cache_manager
        self._datadist = LLMDataDist(LLMRole[role], cluster_id)
        self._datadist.init(config.generate_options())
        self._caches: dict[str, Cache] = {}
        self._arenas: dict[str, NumpyMemory] = {}
        self._allocated: dict[str, Sequence[Bytes]] = {}
        self._objects: dict[str, Any] = {}

    def close(self) -> None:
        self._datadist.finalize()

    def port(self) -> int:
        native = self._datadist._llm_datadist
        return native.listen_port()[1] if native is not None else 0

    def register(self, name: str, spec: dict[str, Any], keys: Any, remote_accessible: bool | None) -> list[Any]:
        made = CacheSpec(**spec)
        arena = _MEMORIES[made.memory](made.seed, made.tensors, made.rows, made.row_bytes)
        manager = self._datadist.cache_manager
        if made.layout == "blocks":
            cache = manager.register_blocks_cache(made.desc(), arena.addrs, decode(keys), remote_accessible)
        else:
            cache = manager.register_cache(made.desc(), arena.addrs, decode(keys) or (), remote_accessible)
        self._caches[name], self._arenas[name] = cache, arena
        return [cache.cache_id, cache.tensor_addrs]

    def allocate(self, name: str, spec: dict[str, Any], keys: Any) -> list[Any]:
        made = CacheSpec(**spec)
        cache: Cache
        if made.layout == "blocks":
            cache = self._manager.allocate_blocks_cache(made.desc(), decode(keys) or None)
        else:
            cache = self._manager.allocate_cache(made.desc(), decode(keys) or ())
        tensors = view(cache.tensor_addrs, made.rows, made.row_bytes)
        contents = Arena(made.seed, made.tensors, made.rows, made.row_bytes)
        for index, tensor in enumerate(tensors):
            tensor[:] = contents[index]
        self._caches[name], self._allocated[name] = cache, tensors
        return [cache.cache_id, cache.tensor_addrs]

    def create_cpu_cache(self, name: str, spec: dict[str, Any]) -> None:
        """A legacy node's: the same memory on each device."""
        made = CacheSpec(**spec)
        arena = NumpyMemory(made.seed, made.tensors, made.rows, made.row_bytes)
        per_device = made.tensors // made.devices
        addrs = [arena.addrs[first : first + per_device] for first in range(0, made.tensors, per_device)]
        self._caches[name], self._arenas[name] = KvCache.create_cpu_cache(made.desc(), addrs), arena

    def tensors(self, name: str, index: int) -> list[list[Any]]:
        """(type, shape, bytes) of what get_cache_tensors shows on each device."""
        cache = self._caches[name]
        if not isinstance(cache, KvCache):
            raise TypeError(f"cache {name} is not of a legacy node")
        arrays = [tensor.numpy() for tensor in self._datadist.kv_cache_manager.get_cache_tensors(cache, index)]
        return [[a.dtype.name, list(a.shape), base64.b64encode(a.tobytes()).decode()] for a in arrays]

    def forget(self, name: str) -> None:
        """Drops the last reference to a cache that was not deallocated."""
        del self._caches[name]
        self._allocated.pop(name, None)
        gc.collect()

    def read(self, name: str) -> str:
        memory = self._arenas[name].whole if name in self._arenas else self._allocated[name]
        return base64.b64encode(b"".join(tensor.tobytes() for tensor in memory)).decode()

    def call(self, on: str, method: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A method of the LLMDataDist, of its cache manager, or of an object that an earlier call has made."""
        own: Decoders = {"Cache": self._caches.__getitem__, "Layers": self._layers}
        member = getattr(self._target(on), method)
        if not callable(member):
            return encode(member)
        result = member(*decode(args, own), **{name: decode(value, own) for name, value in kwargs.items()})
        if isinstance(result, CacheTask):
            return self._keep("task", result)
        return encode(result)

    def _target(self, on: str) -> Any:
        if on == "datadist":
            return self._datadist
        return self._manager if on == "manager" else self._objects[on]

    @property
    def _manager(self) -> CacheManager | KvCacheManager:
        return self._datadist.kv_cache_manager if self._legacy else self._datadist.cache_manager

    def _keep(self, kind: str, made: Any) -> str:
        name = f"{kind} {len(self._objects)}"
        self._objects[name] = made
        return name

    def _layers(self, name: str, opened: int, refused: int | None, broken: int | None) -> Layers:
        layers: Layers = self._objects.setdefault(name, Layers(opened, refused, broken))
        return layers


def answer(node: Node | None, request: dict[str, Any]) -> tuple[Node | None, dict[str, Any]]:
    """(the node from now on, the answer)."""
    ((what, arguments),) = request.items()
    try:
        if what == "open":
            return (node := Node(*arguments)), {"result": node.port()}
        result = getattr(node, what)(*arguments)
    except Exception as error:
        return node, {"error": encode_error(error)}
    return (None if what == "close" else node), {"result": result}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the package logs to standard output must not come between the answers
    node: Node | None = None
    for line in sys.stdin:
        node, answered = answer(node, json.loads(line))
        print(json.dumps(answered), file=answers, flush=True)


if __name__ == "__main__":
    main()
