"""Instances of unequal shape, in every direction between them: tensor, pipeline and data parallelism, block sizes.

Every instance is kv_both: prefill for one request, decode for the next, and both for its own. Nobody is told about
anybody: what an instance is like, the others learn when they first meet it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import equality
import pytest
from serving import Program
from support.client import Request, new_salt, prompt_tokens
from support.metrics import BYTES, EXTERNAL_HITS, FAILED, Change, wait_empty
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import kv_transfer, make_server, running, spec_of

SHAPES: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    # By default vLLM starts as many API servers as ranks and lets each report on either rank: the one that is behind
    # has the last word, and a gauge stays at an old value until the next step.
    "dp2": {"data_parallel": 2, "arguments": ("--api-server-count", "1")},
    "blocks32": {"block_size": 32},
}
PAIRS = [
    ("tp1", "tp1"),  # an instance and itself
    ("tp1", "tp2"),
    ("tp2", "tp1"),
    ("tp1", "pp2"),
    ("pp2", "tp1"),
    ("tp2", "pp2"),
    ("pp2", "tp2"),
    ("pp2", "pp2"),
    ("tp1", "dp2"),
    ("dp2", "tp1"),
    ("dp2", "tp2"),
    ("tp1", "blocks32"),
    ("blocks32", "tp1"),
    ("tp2", "blocks32"),
    ("blocks32", "pp2"),
]
LENGTHS = (2, 33, 129, 700, 1500)

Fleet = dict[str, Program]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    both = kv_transfer("both", {"kv_load_failure_policy": "fail"})
    programs = {
        name: make_server(spec_of(f"fleet-{name}", "qwen3", both, kv_cache_bytes=256 << 20, **shape))
        for name, shape in SHAPES.items()
    }
    with running(*programs.values()):
        yield programs


@pytest.fixture(autouse=True)
def nothing_held(fleet: Fleet) -> Iterator[None]:
    yield
    for program in fleet.values():
        asyncio.run(wait_empty(program.url, 60.0))


def new_request(length: int, seed: int, stream: bool = False) -> Request:
    return Request(prompt_tokens(length, seed), cache_salt=new_salt(), stream=stream)


async def check(prefill: Program, decode: Program, reference: Reference, *requests: Request) -> None:
    change = Change(decode.url)
    async with PDProxy(prefill.url, decode.url) as proxy:
        answers = await equality.send(proxy.url, *requests)
    await reference.check_all(requests, answers)
    tokens = [len(request.prompt) - 1 for request in requests]
    if prefill is decode:
        # What it has prefilled itself is in its prefix cache, in whole blocks: the rest is not worth a second copy.
        tokens = []
    await equality.check_moved(change, sum(tokens))
    assert change.now(FAILED) == 0


@pytest.mark.parametrize(("p", "d"), PAIRS, ids=[f"{p}-to-{d}" for p, d in PAIRS])
def test_pair(fleet: Fleet, reference: Reference, p: str, d: str) -> None:
    async def scenario() -> None:
        for length in LENGTHS:
            await check(fleet[p], fleet[d], reference, new_request(length, seed=11))
        storm = [new_request(2 + (i * 61) % 600, seed=70 + i, stream=i % 2 == 1) for i in range(12)]
        await check(fleet[p], fleet[d], reference, *storm)

    asyncio.run(scenario())


def test_everybody_with_everybody_at_once(fleet: Fleet, reference: Reference) -> None:
    """Links in both directions between the same instances, and requests that cross each other."""

    async def scenario() -> None:
        changes = {name: Change(program.url) for name, program in fleet.items()}
        sent = []
        for index, (p, d) in enumerate(itertools.permutations(fleet, 2)):
            request = new_request(100 + 13 * index, seed=200 + index)
            sent.append((request, answer_through(fleet[p].url, fleet[d].url, request)))
        answers = await asyncio.gather(*(answer for _, answer in sent))
        await reference.check_all([request for request, _ in sent], answers)
        for change in changes.values():
            await change.reaches(EXTERNAL_HITS, 1)
            assert change.now(FAILED) == 0

    asyncio.run(scenario())


async def answer_through(prefill: str, decode: str, request: Request) -> Any:
    async with PDProxy(prefill, decode) as proxy:
        (answer,) = await equality.send(proxy.url, request)
        return answer


def test_each_data_parallel_rank_is_found(fleet: Fleet, reference: Reference) -> None:
    """Enough requests that both ranks prefill and both decode: each has a side channel and links of its own."""

    async def scenario() -> None:
        change = Change(fleet["dp2"].url)
        requests = [new_request(200 + i, seed=300 + i) for i in range(12)]
        await asyncio.gather(
            *(check_answer(fleet["dp2"].url, fleet["tp1"].url, reference, each) for each in requests[:6]),
            *(check_answer(fleet["tp1"].url, fleet["dp2"].url, reference, each) for each in requests[6:]),
        )
        for rank in range(2):
            await change.reaches("vllm:request_success", 1, engine=str(rank))
            await change.reaches(BYTES, 1, engine=str(rank))

    asyncio.run(scenario())


async def check_answer(prefill: str, decode: str, reference: Reference, request: Request) -> None:
    await reference.check(request, await answer_through(prefill, decode, request))
