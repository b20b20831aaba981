"""The same with tensor parallelism 2 on both sides: every rank pulls its own heads from its own peer.

These servers are spawned as users start theirs, each process of theirs imports vLLM and our plugin afresh; so are the
data parallel ranks of test_topologies.py. All other tests fork theirs from a process that has imported vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import equality
import pytest
from serving import Program, ServerSpec, spawn
from support.client import Request, new_salt, prompt_tokens
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_router, make_server, running

pytestmark = pytest.mark.usefixtures("nothing_held_afterwards")


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    specs = [
        ServerSpec(
            f"{name}-tp2",
            tiny_model,
            kv_transfer(name),
            tensor_parallel=2,
            max_num_batched_tokens=512,
        )
        for name in ("prefill", "decode")
    ]
    started = Pair(*(make_server(spec, spawn) for spec in specs))
    with running(*started.both):
        yield started


@pytest.fixture(scope="module")
def router(pair: Pair) -> Iterator[Program]:
    program = make_router([pair.prefill], [pair.decode])
    with running(program):
        yield program


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 2000])
def test_length_through_proxy(pair: Pair, reference: Reference, length: int) -> None:
    asyncio.run(equality.check_length(pair, reference, length))


def test_stream_through_router(pair: Pair, router: Program, reference: Reference) -> None:
    request = Request(prompt_tokens(700, seed=3), cache_salt=new_salt(), stream=True)
    asyncio.run(equality.check_one(router.url, pair, reference, request))


def test_twenty_at_once_through_router(pair: Pair, router: Program, reference: Reference) -> None:
    asyncio.run(equality.check_storm(router.url, pair, reference, count=20))


def test_repeated_prompt_moves_only_what_is_missing(pair: Pair, router: Program, reference: Reference) -> None:
    asyncio.run(equality.check_repeat(router.url, pair, reference))
