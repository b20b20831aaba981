"""The decoder reads rows of the prompt's cache, which it names by cache id and row; the prompt makes no call."""

import numpy as np
from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMRole
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

TENSORS, ROWS, LENGTH = 4, 3, 1024
DESC = CacheDesc(TENSORS, [ROWS, LENGTH], DataType.DT_FLOAT16)


def prompt_tensors() -> list[np.ndarray]:
    values = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    return [(values % 1000 + tensor).astype(np.float16) for tensor in range(TENSORS)]


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, pair.prompt, enable_remote_cache_accessible=True)
    tensors = prompt_tensors()
    cache = datadist.cache_manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    pair.tell(cache.cache_id)
    pair.expect("unlinked")
    datadist.cache_manager.unregister_cache(cache.cache_id)
    datadist.finalize()


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER, enable_remote_cache_accessible=True)
    tensors = [np.zeros((ROWS, LENGTH), np.float16) for _ in range(TENSORS)]
    manager = datadist.cache_manager
    cache = manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    cache_id = int(pair.hear())
    server = cluster_at(PROMPT_CLUSTER, pair.prompt, pair.decoder)
    link(datadist, server)

    pairs = list(zip(tensors, prompt_tensors(), strict=True))
    theirs = [their for _, their in pairs]
    manager.pull_cache(CacheKeyByIdAndIndex(PROMPT_CLUSTER, cache_id, batch_index=1), cache, batch_index=2)
    check("row 1 in row 2", all((ours[2] == their[1]).all() for ours, their in pairs))

    first = CacheKeyByIdAndIndex(PROMPT_CLUSTER, cache_id, batch_index=0)
    manager.pull_cache(first, cache, 0, size=100 * 2)
    check("100 elements of row 0", all((ours[0, :100] == their[0, :100]).all() for ours, their in pairs))
    check("nothing after them", not any(ours[0, 100:].any() for ours in tensors))

    manager.pull_cache(first, cache, 1, src_layer_range=range(1, 2), dst_layer_range=range(1))
    check("layer 1 in layer 0", (tensors[0][1] == theirs[2][0]).all() and (tensors[1][1] == theirs[3][0]).all())
    check("nothing in layer 1", not tensors[2][1].any() and not tensors[3][1].any())

    unlink(datadist, server)
    manager.unregister_cache(cache.cache_id)
    datadist.finalize()
    pair.tell("unlinked")


run(prompt, decoder)
