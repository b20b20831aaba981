"""Pure block mapping: (D geometry, P geometry, block ids) -> PullKvBlocks calls. No sockets, no state."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.params import BlockIds


class PlanError(ValueError):
    """Block ids that do not fit the geometries; says which."""


@dataclass(frozen=True, slots=True)
class BlockPull:
    """One PullKvBlocks call: remote block src_blocks[i] into local block dst_blocks[i], all tensors of the cache."""

    src_cache_id: int
    dst_cache_id: int
    src_blocks: tuple[int, ...]
    dst_blocks: tuple[int, ...]
    num_bytes: int


def plan_pull(ours: RankGeometry, theirs: RankGeometry, remote: BlockIds, local: BlockIds) -> list[BlockPull]:
    """Calls that move `remote[g][i]` into `local[g][i]` for every cache of every group.

    The geometries have been found compatible (handshake.find_mismatches): caches correspond by position.

    Raises:
        PlanError: groups or counts differ, or a block id lies outside its cache.
    """
    if len(remote) != len(local):
        raise PlanError(f"{len(remote)} remote KV cache groups for {len(local)} local ones")
    pulls = []
    for our, their in zip(ours.caches, theirs.caches, strict=True):
        src, dst = remote[our.group], local[our.group]
        if len(src) != len(dst):
            raise PlanError(f"group {our.group}: {len(src)} remote blocks for {len(dst)} local ones")
        if not src:
            continue
        if max(src) >= their.num_blocks or min(src) < 0:
            raise PlanError(f"group {our.group}: remote block ids {min(src)}..{max(src)}, P has {their.num_blocks}")
        if max(dst) >= our.num_blocks or min(dst) < 0:
            raise PlanError(f"group {our.group}: local block ids {min(dst)}..{max(dst)}, we have {our.num_blocks}")
        num_bytes = len(src) * our.block_bytes * len(our.layers)
        pulls.append(BlockPull(their.cache_id, our.cache_id, src, dst, num_bytes))
    return pulls
