"""The scheduler thread has every running request behind it: nothing of ours takes the interpreter from it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from support.engine_config import FULL, group_of, vllm_config
from support.pd import BLOCK_SIZE, TO_P, finish, make_request, wait_until
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.scheduler.consumer import COMPARED_AT_ONCE


def make_connector() -> Any:
    groups = SimpleNamespace(kv_cache_groups=[group_of(FULL, "layers.0")])
    return DataDistConnector(vllm_config("kv_both"), KVConnectorRole.SCHEDULER, groups)


def test_no_thread_of_a_scheduler_needs_the_interpreter() -> None:
    """One that held it would cost a hook up to sys.getswitchinterval(): 5 ms."""
    before = set(threading.enumerate())
    p, d = make_connector(), make_connector()
    prompt = list(range(2 * COMPARED_AT_ONCE))
    table = [KVCacheBlock(block) for block in range(1, 1 + len(prompt) // BLOCK_SIZE)]
    at_p = make_request(prompt, dict(TO_P), "p")
    p.on_new_request(at_p)
    assert p.get_num_new_matched_tokens(at_p, 0) == (0, False)
    p.update_state_after_alloc(at_p, KVCacheBlocks((table,)), 0)
    _, params = p.request_finished_all_groups(finish(at_p), ([block.block_id for block in table],))
    at_d = make_request(prompt, params, "d")
    d.on_new_request(at_d)
    wait_until(lambda: bool(d.get_num_new_matched_tokens(at_d, 0)[0]), "the digest of the prompt")
    d.update_state_after_alloc(at_d, KVCacheBlocks((table,)), len(prompt) - 1)
    (pull,) = d.build_connector_meta(SchedulerOutput.make_empty()).pulls
    assert pull.local_blocks == (tuple(range(1, 1 + len(table))),)
    d.update_connector_output(KVConnectorOutput(finished_recving={"d"}))
    wait_until(lambda: p.build_connector_meta(SchedulerOutput.make_empty()).ended_leases == ("p",), "the release")
    assert set(threading.enumerate()) == before
    p.shutdown()
    d.shutdown()
