"""Values that P and D exchange, well-formed unless a test changes them, and vLLM requests that carry them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_datadist_connector.protocol.contract import LayoutContract
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.handshake import (
    PLAIN,
    CacheLayout,
    RankGeometry,
    Segment,
    View,
)
from vllm_datadist_connector.protocol.params import BlockIds, LeaseTicket, build_params
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION

BLOCK_SIZE = 16
LOOPBACK = "127.0.0.1"
TOKEN = "0123456789abcdef" * 2
OTHER_TOKEN = "f" * 32
TO_P = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
"""What a router sends with a request to P."""

WAIT_S = 30.0
"""Longest wait of a test for what another thread or process does."""


def make_ticket(**changes: Any) -> LeaseTicket:
    values: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "incarnation": TOKEN,
        "token": TOKEN,
        "generation": 1,
        "lease_s": 30.0,
        "prompt_digest": prompt_digest(()),
        "adapter": "",
        "block_sizes": (BLOCK_SIZE,),
    }
    return LeaseTicket(**(values | changes))


def make_params(block_ids: BlockIds = ((3, 1, 2),), **changes: Any) -> dict[str, Any]:
    """What P returns; `changes` override what build_params() is given."""
    values: dict[str, Any] = {
        "engine_id": "engine-p",
        "request_id": "cmpl-p-0-00000000",
        "host": LOOPBACK,
        "port": 40000,
        "block_ids": block_ids,
        "num_tokens": max(map(len, block_ids), default=0) * BLOCK_SIZE,
        "tp_size": 1,
        "pp_size": 1,
        "dcp_size": 1,
        "ticket": make_ticket(),
    }
    return build_params(**(values | changes))


def make_request(
    prompt: Sequence[int], params: dict[str, Any] | None = None, request_id: str = "cmpl-x-0-00000001", **more: Any
) -> Request:
    sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params} if params is not None else None)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=sampling,
        pooling_params=None,
        **more,
    )


def finish(request: Request, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> Request:
    """The request as vLLM leaves it after its prefill."""
    request.status = status
    request.num_computed_tokens = request.num_prompt_tokens
    return request


def decode(
    request: Request, output: Sequence[int], status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED
) -> Request:
    """The request as vLLM leaves it after its last token: that one was not fed back."""
    request.append_output_token_ids(list(output))
    request.status = status
    request.num_computed_tokens = request.num_tokens - 1
    return request


def make_contract(**changes: Any) -> LayoutContract:
    values: dict[str, Any] = {
        "model": "TinyForCausalLM",
        "kv_cache_dtype": "torch.bfloat16",
        "kv_packing": PLAIN,
        "software": "vllm 1, transformers 1",
        "settings": {"hidden_size": "64", "rope_parameters.rope_theta": "10000"},
        "weights": "tensors:11",
    }
    return LayoutContract(**(values | changes))


def make_segment(**changes: Any) -> Segment:
    """One head of blocks of BLOCK_SIZE tokens, 4 bytes each."""
    values: dict[str, Any] = {"rows": BLOCK_SIZE, "row_stride": 4, "row_bytes": 4, "row_tokens": 1}
    return Segment(**(values | changes))


def make_cache(**changes: Any) -> CacheLayout:
    values: dict[str, Any] = {
        "group": 0,
        "num_blocks": 8,
        "block_tokens": BLOCK_SIZE,
        "block_stride": 64,
        "block_bytes": 64,
        "segments": (make_segment(),),
        "layers": ("layers.0", "layers.1"),
        "views": (View(granule=64, cache_id=1),),
    }
    return CacheLayout(**(values | changes))


def make_geometry(**changes: Any) -> RankGeometry:
    values: dict[str, Any] = {
        "tp_rank": 0,
        "pp_rank": 0,
        "tp_size": 1,
        "pp_size": 1,
        "cluster_id": 7,
        "host": LOOPBACK,
        "port": 50000,
        "contract": make_contract(),
        "block_sizes": (BLOCK_SIZE,),
        "caches": (make_cache(),),
    }
    return RankGeometry(**(values | changes))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For effects of other threads that cannot be waited for otherwise."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {WAIT_S:g} s")
        time.sleep(0.002)
