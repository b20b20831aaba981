"""A small model's KV cache dealt out to worker ranks, in numpy, with an engine for each: both ends of pull tests.

Every instance has its own random bytes for the whole model, [layer, block, head, token of the block, byte]; a rank's
memory is the part of its layers and heads. What a pull must do is said by token and head, never by byte offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import CacheLayout, RankGeometry, Segment
from vllm_datadist_connector.worker.caches import RegisteredCaches
from vllm_datadist_connector.worker.kv_layout import CacheSpec

from . import pd
from .endpoints import check

KV: TypeAlias = "npt.NDArray[np.uint8]"
"""[layer, block, head, token, byte]"""

LAYERS, HEADS, BLOCKS, TOKEN_BYTES = 3, 2, 512, 128
PROMPT_ROLE, DECODER_ROLE, MIX_ROLE = 1, 2, 3


def make_kv(seed: int, block_size: int) -> KV:
    """The whole model's KV of one instance."""
    return np.random.default_rng(seed).integers(0, 256, (LAYERS, BLOCKS, HEADS, block_size, TOKEN_BYTES), np.uint8)


@dataclass(frozen=True)
class Place:
    """One rank of an instance."""

    tp_rank: int = 0
    pp_rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    block_size: int = pd.BLOCK_SIZE

    @property
    def layers(self) -> range:
        per_stage = -(-LAYERS // self.pp_size)
        return range(LAYERS)[self.pp_rank * per_stage : (self.pp_rank + 1) * per_stage]

    @property
    def heads(self) -> range:
        count = HEADS // self.tp_size
        return range(self.tp_rank * count, (self.tp_rank + 1) * count)

    def part_of(self, kv: KV) -> KV:
        """This rank's memory: heads before tokens, as vLLM keeps them for this connector."""
        layers, heads = self.layers, self.heads
        return np.ascontiguousarray(kv[layers.start : layers.stop, :, heads.start : heads.stop])


class RankEngine:
    """An engine endpoint that has registered a rank's memory as the connector's worker does."""

    def __init__(
        self,
        cluster_id: int,
        role: int,
        place: Place,
        memory: KV,
        transport: str,
        provider: str = "engine",
        **options: str,
    ) -> None:
        self._cluster_id, self._place, self._role = cluster_id, place, role
        self.datadist = _native.LlmDataDist(cluster_id, role, provider)
        if role != DECODER_ROLE:
            options["llm.ListenIpInfo"] = f"{pd.LOOPBACK}:0"
        check(self.datadist.initialize({"llm.DeviceId": "0", "datadist.Transport": transport, **options}))
        self.caches = RegisteredCaches(self.datadist, [_spec(place, memory)])

    def geometry(self, **changes: Any) -> RankGeometry:
        """As it is, or as an instance that lies would have it."""
        port = 0
        if self._role != DECODER_ROLE:
            status, port = self.datadist.listen_port()
            check(status)
        place = self._place
        values: dict[str, Any] = {
            "tp_rank": place.tp_rank,
            "pp_rank": place.pp_rank,
            "tp_size": place.tp_size,
            "pp_size": place.pp_size,
            "cluster_id": self._cluster_id,
            "port": port,
            "block_sizes": (place.block_size,),
            "caches": self.caches.layouts(),
        }
        return pd.make_geometry(**(values | changes))


def _spec(place: Place, memory: KV) -> CacheSpec:
    head_bytes = place.block_size * TOKEN_BYTES
    count = len(place.heads)
    segment = Segment(
        total=HEADS,
        first=place.heads.start,
        count=count,
        shard_stride=head_bytes if count > 1 else 0,
        rows=place.block_size,
        row_stride=TOKEN_BYTES,
        row_bytes=TOKEN_BYTES,
        row_tokens=1,
    )
    layout = CacheLayout(
        group=0,
        num_blocks=BLOCKS,
        block_tokens=place.block_size,
        block_stride=count * head_bytes,
        block_bytes=count * head_bytes,
        segments=(segment,),
        layers=tuple(f"layers.{layer}" for layer in place.layers),
    )
    addrs = tuple(tensor.ctypes.data for tensor in memory)
    return CacheSpec(layout, addrs, addrs)


def copy_tokens(src: KV, src_table: Sequence[int], dst: KV, dst_table: Sequence[int], place: Place, first: int) -> None:
    """The oracle: what a D rank at `place` must hold once the tokens from `first` on have come from P's whole model.

    `dst_table` begins with the block that holds token `first`; whole blocks move, and null blocks (0) do not.
    """
    src_size, dst_size = src.shape[3], place.block_size
    start = first // dst_size * dst_size
    for token in range(start, min(start + len(dst_table) * dst_size, len(src_table) * src_size)):
        to, from_ = dst_table[(token - start) // dst_size], src_table[token // src_size]
        if to:
            heads, layers = slice(place.heads.start, place.heads.stop), slice(place.layers.start, place.layers.stop)
            dst[:, to, :, token % dst_size] = src[layers, from_, heads, token % src_size]
