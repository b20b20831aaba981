"""The prompt sends each layer as soon as it is computed, in the background, while it computes the next one."""

from __future__ import annotations

import threading

import numpy as np
from llm_datadist import (
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

LAYERS, ROWS, LENGTH = 4, 2, 512
DESC = CacheDesc(2 * LAYERS, [ROWS, LENGTH], DataType.DT_INT32)


def computed(layer: int, which: int) -> np.ndarray:
    return np.arange(LENGTH, dtype=np.int32) * (10 * layer + which + 1)


class Computation(LayerSynchronizer):
    """Stands for events of a device: one per layer, set when the layer is computed."""

    def __init__(self) -> None:
        self.events = [threading.Event() for _ in range(LAYERS)]

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self.events[layer_index].wait(60 if timeout_in_millis is None else timeout_in_millis / 1000)


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, enable_remote_cache_accessible=True)
    tensors = [np.zeros((ROWS, LENGTH), np.int32) for _ in range(2 * LAYERS)]
    manager = datadist.cache_manager
    cache = manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    cache_id = int(pair.hear())
    server = cluster_at(DECODER_CLUSTER, pair.decoder, pair.prompt)
    link(datadist, server)

    key = CacheKeyByIdAndIndex(DECODER_CLUSTER, cache_id, batch_index=0)
    layers = TransferWithCacheKeyConfig(key, range(LAYERS), range(LAYERS), src_batch_index=1)
    computation = Computation()
    task = manager.transfer_cache_async(cache, computation, [layers])
    for layer, event in enumerate(computation.events):
        for which in range(2):
            tensors[2 * layer + which][1] = computed(layer, which)
        event.set()
    check("transfer", task.synchronize(timeout_in_millis=60_000) == LLMStatusCode.LLM_SUCCESS)
    unlink(datadist, server)
    datadist.finalize()
    pair.tell("sent")


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER, pair.decoder, enable_remote_cache_accessible=True)
    tensors = [np.zeros((ROWS, LENGTH), np.int32) for _ in range(2 * LAYERS)]
    cache = datadist.cache_manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    pair.tell(cache.cache_id)
    pair.expect("sent")
    right = [(tensors[2 * layer + k][0] == computed(layer, k)).all() for layer in range(LAYERS) for k in range(2)]
    check("every layer", all(right))
    check("the other row", not any(tensor[1].any() for tensor in tensors))
    datadist.finalize()


run(prompt, decoder)
