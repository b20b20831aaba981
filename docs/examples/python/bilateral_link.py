"""Both processes call link() with the same rank table, and each then reads the other's cache."""

import json
import time

import numpy as np
from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMDataDist, LLMRole, RegisterMemStatus
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, run, start

ROWS, LENGTH = 2, 4096
DESC = CacheDesc(2, [ROWS, LENGTH], DataType.DT_UINT8)


def rank_table(pair: Pair) -> str:
    devices = [
        {"device_id": "0", "device_ip": address.ip, "device_port": str(address.port), "rank_id": str(rank)}
        for rank, address in enumerate((pair.prompt, pair.decoder))
    ]
    servers = [{"server_id": device["device_ip"], "device": [device]} for device in devices]
    return json.dumps({"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers})


def wait_until_linked(datadist: LLMDataDist, comm_id: int) -> None:
    status = datadist.query_register_mem_status(comm_id)
    while status == RegisterMemStatus.PREPARING:  # ends after link_total_time
        time.sleep(0.01)
        status = datadist.query_register_mem_status(comm_id)
    check("linked", status == RegisterMemStatus.OK)


def member(pair: Pair, role: LLMRole, cluster_id: int, other: int) -> None:
    datadist = start(role, cluster_id, enable_remote_cache_accessible=True, link_total_time=60)
    tensors = [np.full((ROWS, LENGTH), 10 * cluster_id + i, np.uint8) for i in range(2)]
    manager = datadist.cache_manager
    cache = manager.register_cache(DESC, [tensor.ctypes.data for tensor in tensors])
    comm_id = datadist.link("prompt_and_decoder", {PROMPT_CLUSTER: 0, DECODER_CLUSTER: 1}, rank_table(pair))
    wait_until_linked(datadist, comm_id)
    pair.tell(cache.cache_id)

    manager.pull_cache(CacheKeyByIdAndIndex(other, int(pair.hear()), batch_index=0), cache, batch_index=1)
    check("the other's row", all((tensor[1] == 10 * other + i).all() for i, tensor in enumerate(tensors)))
    check("our own row", all((tensor[0] == 10 * cluster_id + i).all() for i, tensor in enumerate(tensors)))
    pair.tell("pulled")
    pair.expect("pulled")
    datadist.unlink(comm_id)
    datadist.finalize()


run(
    lambda pair: member(pair, LLMRole.PROMPT, PROMPT_CLUSTER, DECODER_CLUSTER),
    lambda pair: member(pair, LLMRole.DECODER, DECODER_CLUSTER, PROMPT_CLUSTER),
)
