"""KV caches as vllm-ascend 0.23 allocates them, on the CPU.

data/ascend_layouts.json is what its model runner's allocation returned when it ran with torch on the CPU: for each
layer of a model the kind of container, then (storage, offset in bytes, dtype, shape, strides in elements) of each
tensor. Storages begin where it aligns them, at 2 MiB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_datadist_connector.worker.kv_layout import KVCaches
from vllm_datadist_connector.worker.kv_spec import LayerKV, Shards, StateKV, StatePart, TokenKV

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data/ascend_layouts.json").read_text())
NUM_BLOCKS = 4
_ONE = Shards(1, 0, 1)


class Memory:
    """One instance's, of a recorded model; every byte as `seed` has it."""

    def __init__(self, model: str, seed: int) -> None:
        self._recorded = RECORDED[model]
        random = torch.Generator().manual_seed(seed)
        self.storages = [
            torch.randint(0, 256, (size,), dtype=torch.uint8, generator=random) for size in self._recorded["storages"]
        ]
        self.tensors: KVCaches = {
            name: {"list": list, "tuple": tuple}[kind](self._view(*part) for part in parts)
            for name, (kind, *parts) in self._recorded["layers"].items()
        }

    def _view(self, storage: int, offset: int, dtype: str, shape: list[int], stride: list[int]) -> torch.Tensor:
        kind = getattr(torch, dtype)
        typed = torch.empty(0, dtype=kind).set_(self.storages[storage].untyped_storage())
        return typed.as_strided(shape, stride, offset // kind.itemsize)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of each group, by the first tensor of its first layer: kernel blocks may be smaller."""
        sizes = []
        for group in self._recorded["groups"]:
            shape = self.tensors[group[0]][0].shape
            sizes.append(0 if "linear_attn" in group[0] else shape[0] // NUM_BLOCKS * shape[1])
        return tuple(sizes)

    def layers(self) -> Mapping[str, LayerKV]:
        """As kv_spec has them of such a model on one rank."""
        described: dict[str, LayerKV] = {}
        for index, names in enumerate(self._recorded["groups"]):
            for name in names:
                tensors = self.tensors[name]
                if "linear_attn" in name:
                    parts = (StatePart(tuple(t.shape[1:]), t.element_size(), 0, (_all(t.shape[1]),)) for t in tensors)
                    described[name] = StateKV(index, tuple(parts))
                else:
                    described[name] = TokenKV(index, self.block_sizes[index], _all(tensors[0].shape[2]), _ONE)
        return described

    def copy_block(self, group: int, src: Memory, src_block: int, dst_block: int) -> None:
        """The oracle: what any tensor of the group's layers has in a block."""
        for name in self._recorded["groups"][group]:
            for ours, theirs in zip(self.tensors[name], src.tensors[name], strict=True):
                whole = (NUM_BLOCKS, -1)
                ours.view(torch.uint8).unflatten(0, whole)[dst_block] = theirs.view(torch.uint8).unflatten(0, whole)[
                    src_block
                ]


def _all(count: int) -> Shards:
    return Shards(count, 0, count)
