"""A prompt's and a decoder's node in legacy mode, with memory pools."""

from __future__ import annotations

import json
import time
from typing import Any

from support.datadist_cluster import Cluster
from support.datadist_peer import Gate, Peer, RemoteCache
from vllm_datadist_connector.llm_datadist import LLMException, LLMStatusCode, TransferConfig

PROMPT, DECODER = 1, 2
"""Their cluster ids."""
POOL_BYTES = 64 << 10
_DEADLINE_S = 30
LEGACY: dict[str, Any] = {
    "enable_cache_manager": False,
    "enable_remote_cache_accessible": False,
    "mem_pool_cfg": json.dumps({"memory_size": POOL_BYTES, "page_shift": 12}),
}
SHAPE = {"tensors": 4, "rows": 4, "row_bytes": 40}
BLOCKS = {**SHAPE, "layout": "blocks"}
TWO_DEVICES = {"tensors": 8, "rows": 4, "row_bytes": 40, "devices": 2}

Ends = tuple[Peer, Peer]
"""Prompt, decoder."""


def open_ends(cluster: Cluster, decoder_id: int = DECODER, **settings: Any) -> Ends:
    """Not linked yet: the decoder, which does not listen, links with the prompt."""
    prompt = cluster.open(PROMPT, role="PROMPT", **LEGACY, **settings)
    decoder = cluster.open(decoder_id, role="DECODER", listen="", **LEGACY, **settings)
    return prompt, decoder


def is_empty(node: Peer, devices: int = 1) -> bool:
    """Whether nothing of its pool is in use: only then is there room for a cache as large as the pool."""
    try:
        deallocate(node.allocate("whole", tensors=16, rows=1, row_bytes=POOL_BYTES // 16, devices=devices))
    except LLMException as error:
        if error.status_code != LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY:
            raise
        return False
    return True


def await_empty(node: Peer, devices: int = 1) -> None:
    """Memory is free once nobody reads it: the owner lets go just after the puller has its last byte."""
    deadline = time.monotonic() + _DEADLINE_S
    while not is_empty(node, devices):
        assert time.monotonic() < deadline, f"the pool of cluster {node.cluster_id} is still in use"


def deallocate(cache: RemoteCache) -> None:
    cache.peer.manager.deallocate_cache(cache)
    del cache.peer.caches[cache.name]  # nothing to read any more


def transfer(prompt: Peer, src: RemoteCache, configs: list[TransferConfig], *blocks: Any) -> list[LLMStatusCode]:
    """The results of a transfer_cache_async whose layers are all ready."""
    task = prompt.manager.transfer_cache_async(src, Gate(prompt, 99), configs, *blocks)
    results: list[LLMStatusCode] = prompt.object(task).get_results(60_000)
    return results


def of_layer(src_layer: int, dst_layer: int) -> list[tuple[int, int]]:
    """(source tensor, destination tensor) of a layer on both devices of TWO_DEVICES."""
    return [(4 * device + 2 * src_layer + k, 4 * device + 2 * dst_layer + k) for device in range(2) for k in range(2)]
