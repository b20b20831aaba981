"""Models whose KV cache is not one tensor of heads per layer: latent, sliding, mixed and recurrent, across unequal TP.

D is its own oracle: without params it is a plain instance. Every request has a cache_salt of its own, so that nothing
it answers comes from its prefix cache, and the tests count the tokens that came from outside.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import equality
import pytest
from serving import stop
from support.client import Request, new_salt, prompt_tokens
from support.metrics import BYTES, EARLY_BYTES, EXTERNAL_HITS, FAILED, PUSHED_BYTES, Change
from support.overlap import OverlapProxy
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, spec_of

LENGTHS = (1, 2, 33, 129, 257, 700, 1500)


@dataclass(frozen=True)
class Case:
    kind: str
    p_tp: int = 1
    d_tp: int = 1
    caches_prefixes: bool = True

    def __str__(self) -> str:
        return f"{self.kind}-tp{self.p_tp}-to-tp{self.d_tp}"


CASES = [
    Case("deepseek", p_tp=2, caches_prefixes=False),
    Case("gemma3"),
    Case("gemma4", d_tp=2),
    Case("gpt-oss"),
    Case("granite-hybrid", p_tp=2, caches_prefixes=False),
    Case("falcon-h1", d_tp=2, caches_prefixes=False),
]


class Served(NamedTuple):
    case: Case
    pair: Pair
    reference: Reference


class Relay:
    """One pair after another: the next one starts while this one is tested, and the last one ends."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self._coming = deque((case, make_pair(case)) for case in cases)
        self._leaving: Pair | None = None

    def start_next(self) -> None:
        if self._coming:
            for program in self._coming[0][1].both:
                program.start()

    def take(self, case: Case) -> Pair:
        wanted, pair = self._coming.popleft()
        assert wanted == case
        for program in pair.both:
            program.wait_ready()
        self.start_next()
        return pair

    def retire(self, pair: Pair) -> None:
        for program in pair.both:
            program.ask_to_end()
        self._see_off()
        self._leaving = pair

    def _see_off(self) -> None:
        if self._leaving is not None:
            stop(*self._leaving.both)

    def close(self) -> None:
        self._see_off()
        for _, pair in self._coming:
            stop(*pair.both)


def make_pair(case: Case) -> Pair:
    fail = kv_transfer("decode", {"kv_load_failure_policy": "fail"})
    return Pair(
        make_server(spec_of(f"{case}-p", case.kind, kv_transfer("prefill"), tensor_parallel=case.p_tp)),
        make_server(spec_of(f"{case}-d", case.kind, fail, tensor_parallel=case.d_tp)),
    )


@pytest.fixture(scope="module")
def relay(request: pytest.FixtureRequest) -> Iterator[Relay]:
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    relay = Relay(dict.fromkeys(spec.params["served"] for spec in specs if spec and "served" in spec.params))
    try:
        relay.start_next()
        yield relay
    finally:
        relay.close()


@pytest.fixture(scope="module", params=CASES, ids=str)
def served(request: pytest.FixtureRequest, relay: Relay) -> Iterator[Served]:
    pair = relay.take(request.param)
    try:
        yield Served(request.param, pair, Reference(pair.decode.url))
    finally:
        relay.retire(pair)


@pytest.fixture(autouse=True)
def nothing_held(served: Served) -> Iterator[None]:
    yield
    asyncio.run(equality.check_nothing_held(served.pair))


async def check(served: Served, *requests: Request) -> Change:
    """Right answers, all of whose prompts came from P. Returns what D's counters grew by."""
    await asyncio.gather(*map(served.reference.answer, requests))
    change = Change(served.pair.decode.url)
    async with PDProxy(served.pair.prefill.url, served.pair.decode.url) as proxy:
        answers = await equality.send(proxy.url, *requests)
    await served.reference.check_all(requests, answers)
    return change


def new_request(length: int, seed: int, stream: bool = False) -> Request:
    return Request(prompt_tokens(length, seed), cache_salt=new_salt(), stream=stream)


@pytest.mark.parametrize("length", LENGTHS)
def test_length(served: Served, length: int) -> None:
    async def scenario() -> None:
        change = await check(served, new_request(length, seed=1))
        if length > 1:
            await change.reaches(EXTERNAL_HITS, length - 1)
            await change.reaches(BYTES, 1)
        assert change.now(FAILED) == 0

    asyncio.run(scenario())


def test_sixteen_at_once(served: Served) -> None:
    requests = [new_request(2 + (i * 97) % 900, seed=50 + i, stream=i % 2 == 1) for i in range(16)]

    async def scenario() -> None:
        change = await check(served, *requests)
        await change.reaches(EXTERNAL_HITS, sum(len(request.prompt) - 1 for request in requests))
        assert change.now(FAILED) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_moved_while_p_computes(served: Served, mode: str) -> None:
    """Both legs at once: windows move while P's own window moves on, states when the last chunk is done."""
    requests = [new_request(40 + (i * 211) % 1400, seed=90 + i, stream=i % 2 == 1) for i in range(8)]

    async def scenario() -> None:
        await asyncio.gather(*map(served.reference.answer, requests))
        async with OverlapProxy(served.pair.prefill.url, served.pair.decode.url, mode) as proxy:
            change = Change(served.pair.decode.url)
            answers = await equality.send(proxy.url, *requests)
        await served.reference.check_all(requests, answers)
        await change.reaches(EXTERNAL_HITS, sum(len(request.prompt) - 1 for request in requests))
        await change.reaches(EARLY_BYTES, 1)
        assert change.now(FAILED) == 0
        assert (change.now(PUSHED_BYTES) > 0) == (mode == "push")

    asyncio.run(scenario())


def test_what_the_prefix_cache_has_is_not_moved(served: Served) -> None:
    """A longer prompt that begins like one that D has seen: windows and block sizes of each group, at any offset."""
    salt = new_salt()
    prompt = prompt_tokens(1300, seed=7)
    requests = [Request(prompt[:length], cache_salt=salt) for length in (600, 600, 1300)]

    async def scenario() -> list[float]:
        moved = []
        for request in requests:
            change = await check(served, request)
            await change.reaches(BYTES, 1)
            moved.append(change.now(BYTES))
        return moved

    first, again, longer = asyncio.run(scenario())
    if served.case.caches_prefixes:
        assert again < first
        assert longer < 2 * first
    else:
        assert again == first
