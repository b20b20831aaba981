"""Two-sided mode: rows of memory from a pool, named by request; a pull uses the name up and frees the memory."""

import ctypes
import json

import numpy as np
from llm_datadist import CacheDesc, CacheKey, DataType, LLMException, LLMRole, LLMStatusCode
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

TENSORS, ROWS, LENGTH = 2, 2, 8192
DESC = CacheDesc(TENSORS, [ROWS, LENGTH], DataType.DT_UINT8)
# Both tensors fill the pool: a second cache fits only once the first one is free.
POOL = json.dumps({"memory_size": TENSORS * ROWS * LENGTH, "page_shift": 14})


def memory_at(address: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * (ROWS * LENGTH)).from_address(address), np.uint8).reshape(ROWS, LENGTH)


def failure(call, *args) -> LLMStatusCode:
    try:
        call(*args)
    except LLMException as error:
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, pair.prompt, mem_pool_cfg=POOL)
    manager = datadist.cache_manager
    requests = [CacheKey(PROMPT_CLUSTER, req_id=100), CacheKey(PROMPT_CLUSTER, req_id=101)]
    cache = manager.allocate_cache(DESC, requests)
    for number, address in enumerate(cache.tensor_addrs):
        memory_at(address)[:] = [[10 * number + 1], [10 * number + 2]]
    manager.deallocate_cache(cache)  # the names still hold the memory
    pair.tell("allocated")

    pair.expect("100 pulled")
    check("the pool is full", failure(manager.allocate_cache, DESC) == LLMStatusCode.LLM_OUT_OF_MEMORY)
    pair.tell("go on")
    pair.expect("101 pulled")
    manager.remove_cache_key(requests[1])  # used up already: nothing happens
    check("the pool is free", manager.allocate_cache(DESC).tensor_addrs)
    pair.expect("unlinked")
    datadist.finalize()


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER)
    tensors = [np.zeros((ROWS, LENGTH), np.uint8) for _ in range(TENSORS)]
    manager = datadist.cache_manager
    cache = manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    pair.expect("allocated")
    server = cluster_at(PROMPT_CLUSTER, pair.prompt, pair.decoder)
    link(datadist, server)

    first, second = CacheKey(PROMPT_CLUSTER, req_id=100), CacheKey(PROMPT_CLUSTER, req_id=101)
    manager.pull_cache(first, cache, batch_index=1)
    check("request 100", all((tensor[1] == 10 * i + 1).all() for i, tensor in enumerate(tensors)))
    check("is used up", failure(manager.pull_cache, first, cache) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)
    pair.tell("100 pulled")
    pair.expect("go on")
    manager.pull_cache(second, cache, batch_index=0)
    check("request 101", all((tensor[0] == 10 * i + 2).all() for i, tensor in enumerate(tensors)))
    pair.tell("101 pulled")

    unlink(datadist, server)
    datadist.finalize()
    pair.tell("unlinked")


run(prompt, decoder)
