"""Two processes change roles: the client becomes the server and the server the client, and data flows on."""

import numpy as np
from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMRole
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

LENGTH = 2048
DESC = CacheDesc(2, [2, LENGTH], DataType.DT_UINT8)


def tensors_of(cluster_id: int) -> list[np.ndarray]:
    return [np.full((2, LENGTH), 10 * cluster_id + i, np.uint8) for i in range(2)]


def check_row(tensors: list[np.ndarray], cluster_id: int) -> None:
    check(f"row 1 is cluster {cluster_id}'s", all((t[1] == 10 * cluster_id + i).all() for i, t in enumerate(tensors)))


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, pair.prompt, enable_remote_cache_accessible=True)
    tensors = tensors_of(PROMPT_CLUSTER)
    cache = datadist.cache_manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    pair.tell(cache.cache_id)
    other_cache = int(pair.hear())

    pair.expect("unlinked")
    datadist.switch_role(LLMRole.DECODER)  # without an address: it no longer listens
    pair.expect("listening")
    server = cluster_at(DECODER_CLUSTER, pair.decoder, pair.prompt)
    link(datadist, server)
    datadist.cache_manager.pull_cache(CacheKeyByIdAndIndex(DECODER_CLUSTER, other_cache), cache, batch_index=1)
    check_row(tensors, DECODER_CLUSTER)
    unlink(datadist, server)
    datadist.finalize()
    pair.tell("over")


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER, enable_remote_cache_accessible=True)
    tensors = tensors_of(DECODER_CLUSTER)
    cache = datadist.cache_manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    other_cache = int(pair.hear())
    pair.tell(cache.cache_id)

    server = cluster_at(PROMPT_CLUSTER, pair.prompt, pair.decoder)
    link(datadist, server)
    datadist.cache_manager.pull_cache(CacheKeyByIdAndIndex(PROMPT_CLUSTER, other_cache), cache, batch_index=1)
    check_row(tensors, PROMPT_CLUSTER)
    unlink(datadist, server)
    pair.tell("unlinked")
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": str(pair.decoder)})
    pair.tell("listening")
    pair.expect("over")
    datadist.finalize()


run(prompt, decoder)
