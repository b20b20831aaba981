"""Speculative decoding: the draft model's layers are KV cache like any other, and D without them on P is told so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import NamedTuple

import equality
import pytest
from serving import Program
from support.client import Request, new_salt, prompt_tokens
from support.metrics import EXTERNAL_HITS, FAILED, Change, wait_empty
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, model_of, running, spec_of


class Trio(NamedTuple):
    prefill: Program
    plain_prefill: Program
    decode: Program


@pytest.fixture(scope="module")
def trio(pair: Pair) -> Iterator[Trio]:
    draft = {"method": "draft_model", "model": str(model_of("qwen3")), "num_speculative_tokens": 2}
    speculating = {"arguments": ("--speculative-config", json.dumps(draft)), "kv_cache_bytes": 256 << 20}
    fail = kv_transfer("decode", {"kv_load_failure_policy": "fail"})
    started = Trio(
        make_server(spec_of("draft-prefill", "qwen3", kv_transfer("prefill"), **speculating)),
        pair.prefill,
        make_server(spec_of("draft-decode", "qwen3", fail, **speculating)),
    )
    with running(started.prefill, started.decode):
        yield started


@pytest.fixture(autouse=True)
def nothing_held(trio: Trio) -> Iterator[None]:
    """What the plain P keeps for a D that has refused it ends by expiry: waited for when `pair` is stopped."""
    yield
    for program in (trio.prefill, trio.decode):
        asyncio.run(wait_empty(program.url, 45.0))


@pytest.mark.parametrize("length", [2, 129, 700])
def test_draft_layers_come_along(trio: Trio, reference: Reference, length: int) -> None:
    request = Request(prompt_tokens(length, seed=1), max_tokens=40, cache_salt=new_salt())

    async def scenario() -> None:
        change = Change(trio.decode.url)
        async with PDProxy(trio.prefill.url, trio.decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        await reference.check(request, answer)
        await change.reaches(EXTERNAL_HITS, length - 1)
        # The draft is the model itself: with its KV every proposal is right, without it hardly one would be.
        accepted, proposed = (change.now(f"vllm:spec_decode_num_{name}_tokens") for name in ("accepted", "draft"))
        assert accepted > 0.9 * proposed > 0

    asyncio.run(scenario())


def test_a_p_without_the_draft_layers_is_refused_by_name(trio: Trio) -> None:
    async def scenario() -> None:
        change = Change(trio.decode.url)
        async with PDProxy(trio.plain_prefill.url, trio.decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, Request(prompt_tokens(200, seed=2), cache_salt=new_salt()))
        assert not answer.ok
        await change.reaches(FAILED, 1, reason="handshake")

    asyncio.run(scenario())
    log = trio.decode.log.read_text(encoding="utf-8", errors="replace")
    assert "layer 'draft_model." in log
    assert "P has no such layer (is speculative decoding set up on one side only?)" in log
