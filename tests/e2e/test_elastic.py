"""Instances come and go under load: two P and two D, a third P joins, one P leaves. No answer is lost or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import equality
import pytest
from serving import Program
from support.client import Answer, Request, new_salt, prompt_tokens
from support.metrics import (
    EXTERNAL_HITS,
    FAILED,
    HELD_LEASES,
    LEASES_ENDED,
    LINKED_PEERS,
    Change,
    wait_empty,
    wait_for,
    wait_metric,
)
from support.proxy import PDProxy, RoundRobin
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_router, make_server, running, spec_of

AT_ONCE = 6


@dataclass(frozen=True)
class Service:
    prefill: list[Program]
    decode: list[Program]


@pytest.fixture(scope="module")
def service(pair: Pair) -> Iterator[Service]:
    """The one that stays is the session's P."""

    def server(name: str, config: str) -> Program:
        return make_server(spec_of(f"elastic-{name}", "qwen3", kv_transfer(config), kv_cache_bytes=128 << 20))

    leaver, joiner = server("leaver", "prefill"), server("joiner", "prefill")
    decode = [server("d0", "decode"), server("d1", "decode")]
    with running(leaver, joiner, *decode):
        yield Service([leaver, pair.prefill, joiner], decode)


async def load(url: str, reference: Reference, stop: asyncio.Event, seed: int) -> int:
    """One client after another until told to stop; returns how many were answered, all of them rightly."""
    answered = 0
    while not stop.is_set():
        request = Request(prompt_tokens(100 + (answered * 37) % 500, seed + answered % 8), cache_salt=new_salt())
        (answer,) = await equality.send(url, request)
        await reference.check(request, answer)
        answered += 1
    return answered


async def served_by(program: Program, count: int) -> Change:
    """Waits until `count` more of its prefills have been taken by some D."""
    change = Change(program.url)
    await change.reaches(LEASES_ENDED, count, deadline_s=60.0, reason="released")
    return change


def test_two_and_two_behind_the_router(service: Service, reference: Reference) -> None:
    """vllm-router as it comes, with a list of instances on either side."""
    requests = [Request(prompt_tokens(50 + 31 * i, seed=400 + i), cache_salt=new_salt()) for i in range(16)]
    router = make_router(service.prefill[:2], service.decode)

    async def scenario() -> None:
        changes = [Change(program.url) for program in (*service.prefill[:2], *service.decode)]
        answers = await equality.send(router.url, *requests)
        await reference.check_all(requests, answers)
        # Every instance had its share.
        for change, name in zip(changes, (LEASES_ENDED, LEASES_ENDED, EXTERNAL_HITS, EXTERNAL_HITS), strict=True):
            await change.reaches(name, 1)

    with running(router):
        asyncio.run(scenario())


def test_one_joins_and_one_leaves(service: Service, reference: Reference) -> None:
    leaver, stayer, joiner = service.prefill
    prefill = RoundRobin([leaver.url, stayer.url])
    decode = RoundRobin([program.url for program in service.decode])

    async def scenario() -> None:
        stop = asyncio.Event()
        async with PDProxy(prefill, decode) as proxy:
            clients = [asyncio.create_task(load(proxy.url, reference, stop, 1000 * i)) for i in range(AT_ONCE)]
            await asyncio.gather(served_by(leaver, 4), served_by(stayer, 4))
            prefill.urls.append(joiner.url)
            await served_by(joiner, 4)
            prefill.urls.remove(leaver.url)
            # What it has prefilled, and D is pulling from it at that moment, is computed on D; a prefill would be lost.
            await wait_for("the last prefill", lambda: proxy.prefilling[leaver.url], lambda legs: legs == 0, 60.0)
            await asyncio.to_thread(leaver.kill)
            await asyncio.gather(served_by(stayer, 4), served_by(joiner, 4))
            stop.set()
            answered = await asyncio.gather(*clients)
        assert min(answered) > 0
        for program in service.decode:
            await wait_metric(program.url, LINKED_PEERS, lambda linked: linked == 2)
        for program in (stayer, joiner, *service.decode):
            await wait_empty(program.url, 40.0)

    asyncio.run(scenario())


def test_it_comes_back_as_somebody_else(service: Service, reference: Reference) -> None:
    """The one that left is started again: another life with other ports, met like any newcomer."""
    leaver, _, _ = service.prefill
    if not leaver.alive:
        leaver.start()
    leaver.wait_ready()

    async def scenario() -> None:
        changes = [Change(program.url) for program in service.decode]
        requests = [Request(prompt_tokens(200 + i, seed=50 + i), cache_salt=new_salt()) for i in range(4)]
        answers: list[Answer] = []
        async with PDProxy(leaver.url, RoundRobin([program.url for program in service.decode])) as proxy:
            answers += await equality.send(proxy.url, *requests)
        await reference.check_all(requests, answers)
        assert all(change.now(FAILED) == 0 for change in changes)

    asyncio.run(scenario())


def test_a_drained_one_leaves_unnoticed(service: Service, reference: Reference) -> None:
    """Scaled down as the README says: no more legs, then no more leases, then SIGTERM. Nothing is computed twice."""
    _, stayer, drained = service.prefill
    prefill = RoundRobin([drained.url, stayer.url])
    decode = RoundRobin([program.url for program in service.decode])

    async def scenario() -> None:
        stop = asyncio.Event()
        changes = [Change(program.url) for program in service.decode]
        async with PDProxy(prefill, decode) as proxy:
            clients = [asyncio.create_task(load(proxy.url, reference, stop, 3000 * i)) for i in range(AT_ONCE)]
            await served_by(drained, 4)
            prefill.urls.remove(drained.url)
            await wait_for("the last prefill", lambda: proxy.prefilling[drained.url], lambda legs: legs == 0, 60.0)
            await wait_metric(drained.url, HELD_LEASES, lambda held: held == 0)
            await asyncio.to_thread(drained.stop)
            await served_by(stayer, 4)
            stop.set()
            answered = await asyncio.gather(*clients)
        assert min(answered) > 0
        assert [change.now(FAILED) for change in changes] == [0, 0]

    asyncio.run(scenario())
