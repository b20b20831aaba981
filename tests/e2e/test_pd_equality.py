"""Prefill on one instance and decode on another answer what one instance answers, token for token."""

from __future__ import annotations

import asyncio

import equality
import pytest
from serving import Program
from support.client import Request, new_salt, prompt_tokens
from support.huge_pages import needs_huge_pages
from support.metrics import BYTES, EXTERNAL_HITS, Change
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

pytestmark = pytest.mark.usefixtures("nothing_held_afterwards")


@pytest.mark.parametrize("length", equality.PROMPT_LENGTHS)
def test_length_through_proxy(pair: Pair, reference: Reference, length: int) -> None:
    asyncio.run(equality.check_length(pair, reference, length))


@pytest.mark.parametrize("length", equality.PROMPT_LENGTHS)
def test_length_through_router(pair: Pair, router: Program, reference: Reference, length: int) -> None:
    request = Request(prompt_tokens(length, seed=2), cache_salt=new_salt())
    asyncio.run(equality.check_one(router.url, pair, reference, request))


@pytest.mark.parametrize("length", [1, 129, 2000])
def test_stream_through_proxy(pair: Pair, reference: Reference, length: int) -> None:
    asyncio.run(equality.check_length(pair, reference, length, stream=True))


def test_stream_through_router(pair: Pair, router: Program, reference: Reference) -> None:
    request = Request(prompt_tokens(700, seed=3), cache_salt=new_salt(), stream=True)
    asyncio.run(equality.check_one(router.url, pair, reference, request))


def test_fifty_at_once_through_proxy(pair: Pair, reference: Reference) -> None:
    async def scenario() -> None:
        async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
            await equality.check_storm(proxy.url, pair, reference, count=50)

    asyncio.run(scenario())


def test_fifty_at_once_through_router(pair: Pair, router: Program, reference: Reference) -> None:
    asyncio.run(equality.check_storm(router.url, pair, reference, count=50))


def test_repeated_prompt_moves_only_what_is_missing(pair: Pair, router: Program, reference: Reference) -> None:
    asyncio.run(equality.check_repeat(router.url, pair, reference))


def test_long_answer(pair: Pair, reference: Reference) -> None:
    """The decode phase crosses block borders in blocks that came from outside."""
    request = Request(prompt_tokens(120, seed=4), max_tokens=150, cache_salt=new_salt())

    async def scenario() -> None:
        async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
            await equality.check_one(proxy.url, pair, reference, request)

    asyncio.run(scenario())


def test_two_choices(pair: Pair, reference: Reference) -> None:
    """With n=2 both children carry the same params, and neither is answered from blocks that are not its own.

    Again and again: the first may be done with the lease that they share before the second has come.
    """

    async def scenario() -> None:
        async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
            for _ in range(20):
                request = Request(prompt_tokens(300, seed=5), n=2, cache_salt=new_salt())
                (answer,) = await equality.send(proxy.url, request)
                await reference.check(request, answer)
                assert len(answer.tokens) == 2

    asyncio.run(scenario())


def test_direct_request_needs_no_transfer(pair: Pair, reference: Reference) -> None:
    """A request without params is served by each instance alone."""

    async def scenario() -> None:
        for server in pair.both:
            change = Change(server.url)
            request = Request(prompt_tokens(200, seed=6), cache_salt=new_salt())
            (answer,) = await equality.send(server.url, request)
            await reference.check(request, answer)
            assert change.now(EXTERNAL_HITS) == 0
            assert change.now(BYTES) == 0

    asyncio.run(scenario())


@needs_huge_pages
@pytest.mark.skipif(
    not hasattr(KVConnectorBase_V1, "get_mem_pool_context"), reason="this vLLM asks no connector before it allocates"
)
def test_vllm_allocates_the_kv_cache_in_huge_pages(pair: Pair) -> None:
    for server in pair.both:
        assert "huge pages were asked for before 0.50 GiB were zeroed" in server.log.read_text(encoding="utf-8")
