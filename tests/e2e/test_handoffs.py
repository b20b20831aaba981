"""Both legs of a request at once: D pulls, or P pushes, while P computes, whatever becomes of either."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import equality
import pytest
from support.client import Answer, Request, complete, new_salt, new_session, prompt_tokens
from support.metrics import (
    EARLY_BYTES,
    FAILED,
    KV_USAGE,
    LOCAL_PREFILLS,
    PREEMPTIONS,
    PULLING,
    PUSHED_BYTES,
    Change,
    wait_metric,
)
from support.overlap import OverlapProxy
from support.proxy import ASK_PREFILL, PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running, spec_of

SOON_S = 40.0
CHUNK = 128


@pytest.fixture(scope="module")
def small() -> Iterator[Pair]:
    """P computes in small chunks and has few blocks; D computes what fails again."""
    config = {"block_size": 32, "max_model_len": 1500}
    prefill = spec_of(
        "handoff-prefill",
        "qwen3",
        kv_transfer("prefill", lease_s=5),
        max_num_batched_tokens=CHUNK,
        # Lets prompts in that will not fit: what preempts a prefill.
        arguments=("--num-gpu-blocks-override", "64", "--no-scheduler-reserve-full-isl"),
        **config,
    )
    decode = spec_of("handoff-decode", "qwen3", kv_transfer("decode", recv_deadline_s=30, handoff_wait_s=10), **config)
    started = Pair(make_server(prefill), make_server(decode))
    with running(*started.both):
        yield started


@pytest.fixture
def nothing_held(small: Pair) -> Iterator[None]:
    yield
    asyncio.run(equality.check_nothing_held(small, SOON_S))


@pytest.fixture(params=["pull", "push"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def new_request(length: int, seed: int, **more: object) -> Request:
    return replace(Request(prompt_tokens(length, seed), cache_salt=new_salt()), **more)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_held_afterwards")
@pytest.mark.parametrize("length", [1, 2, 129, 2000])
def test_the_answer_is_the_same(pair: Pair, reference: Reference, mode: str, length: int) -> None:
    async def scenario() -> None:
        request = new_request(length, seed=1)
        async with OverlapProxy(pair.prefill.url, pair.decode.url, mode) as proxy:
            change = Change(pair.decode.url)
            await equality.check_one(proxy.url, pair, reference, request)
        if length > 1000:
            # How much is a matter of the machine's speed.
            await change.reaches(EARLY_BYTES, 1)
            assert (change.now(PUSHED_BYTES) > 0) == (mode == "push")

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_a_storm(pair: Pair, reference: Reference, mode: str) -> None:
    async def scenario() -> None:
        async with OverlapProxy(pair.prefill.url, pair.decode.url, mode) as proxy:
            await equality.check_storm(proxy.url, pair, reference, 48)

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_prefix_hits_on_either_side(pair: Pair, reference: Reference, mode: str) -> None:
    """What P has of it is final with the first layer of its step, what D has is not moved."""

    async def scenario() -> None:
        salt = new_salt()
        short = Request(prompt_tokens(600, seed=2000), cache_salt=salt)
        longer = Request([*short.prompt, *prompt_tokens(900, seed=2001)], cache_salt=salt)
        async with OverlapProxy(pair.prefill.url, pair.decode.url, mode) as proxy:
            for request in (short, short, longer):
                (answer,) = await equality.send(proxy.url, request)
                await reference.check(request, answer)
            # At once: the one's blocks are in P's prefix cache before they are computed.
            change = Change(pair.decode.url)
            twins = [Request(prompt_tokens(900, seed=2002), cache_salt="twins", max_tokens=8) for _ in range(4)]
            await reference.check_all(twins, await equality.send(proxy.url, *twins))
        assert change.now(FAILED) == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_children_share_one_hand_off(pair: Pair, reference: Reference, mode: str) -> None:
    async def scenario() -> None:
        request = new_request(700, seed=2100, n=3)
        async with OverlapProxy(pair.prefill.url, pair.decode.url, mode) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        await reference.check(request, answer)
        assert len(answer.tokens) == 3

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held")
def test_p_preempts_what_d_waits_for(small: Pair, reference: Reference, mode: str) -> None:
    """P has room for the first chunks of a prompt, and not for all of it before others are done."""

    async def scenario() -> None:
        others = [new_request(850, seed=2200 + index, max_tokens=100) for index in range(2)]
        request = new_request(500, seed=2210)
        preempted, change = Change(small.prefill.url), Change(small.decode.url)
        async with OverlapProxy(small.prefill.url, small.decode.url, mode) as proxy:
            decoding = asyncio.create_task(equality.send(small.prefill.url, *others))
            await wait_metric(small.prefill.url, KV_USAGE, lambda usage: usage > 0.8, SOON_S)
            (answer,) = await equality.send(proxy.url, request)
            await decoding
        await reference.check(request, answer)
        await preempted.reaches(PREEMPTIONS, 1)
        await change.reaches(EARLY_BYTES, 1)
        assert change.now(FAILED) == change.now(LOCAL_PREFILLS) == 0
        assert (change.now(PUSHED_BYTES) > 0) == (mode == "push")

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held")
def test_clients_that_go_away(small: Pair, reference: Reference, mode: str) -> None:
    """At any moment, in numbers: nothing is held, and whoever stays is served right."""
    random.seed(7)

    async def go_away(url: str, request: Request) -> None:
        async with new_session() as session:
            task = asyncio.create_task(complete(session, url, request))
            await asyncio.wait((task,), timeout=random.random() * 1.5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def scenario() -> None:
        async with OverlapProxy(small.prefill.url, small.decode.url, mode) as proxy:
            leaving = [go_away(proxy.url, new_request(700, seed=2300 + index)) for index in range(24)]
            staying = [new_request(500, seed=2400 + index) for index in range(4)]
            sent = asyncio.create_task(equality.send(proxy.url, *staying))
            await asyncio.gather(*leaving)
            answers = await sent
        await reference.check_all(staying, answers)

    asyncio.run(scenario())


@pytest.mark.usefixtures("nothing_held")
def test_a_leg_without_the_other(small: Pair, reference: Reference) -> None:
    """P's alone: its lease is claimed by nobody. D's alone: it prefills after a while."""

    async def scenario() -> None:
        async with PDProxy(small.prefill.url, small.decode.url) as proxy:
            (first,) = await equality.send(small.prefill.url, new_request(40, 2500, kv_transfer_params=ASK_PREFILL))
            await equality.send(proxy.url, new_request(40, 2501))
        params = first.kv_transfer_params or {}
        address = {name: params[name] for name in ("remote_host", "remote_port")}
        handoff = {"datadist": {"handoff": "c" * 32}}
        to_p = new_request(300, 2502, max_tokens=1, kv_transfer_params={**ASK_PREFILL, **handoff})
        alone = {"do_remote_prefill": True, **address, "datadist": {"handoff": "d" * 32}}
        to_d = new_request(300, 2503, kv_transfer_params=alone)
        change = Change(small.decode.url)
        (of_p,), (of_d,) = await asyncio.gather(
            equality.send(small.prefill.url, to_p), equality.send(small.decode.url, to_d)
        )
        assert of_p.ok
        assert (of_p.kv_transfer_params or {})["datadist"]["token"] == "c" * 32
        await reference.check(replace(to_d, kv_transfer_params=None), of_d)
        await change.reaches(LOCAL_PREFILLS, 1, reason="no_prefill")

    asyncio.run(scenario())


def test_p_dies_while_d_waits(small: Pair, reference: Reference) -> None:
    """Last in this file: P is gone then."""

    async def scenario() -> list[Answer]:
        requests = [new_request(1300, seed=2600 + index) for index in range(4)]
        urls = small.prefill.url, small.decode.url
        async with OverlapProxy(*urls, "pull") as pulled, OverlapProxy(*urls, "push") as pushed:
            to_either = [equality.send(pulled.url, *requests[::2]), equality.send(pushed.url, *requests[1::2])]
            sent = asyncio.gather(*to_either)
            await wait_metric(small.decode.url, PULLING, lambda count: count >= 1, SOON_S)
            small.prefill.kill()
            first, second = await asyncio.wait_for(sent, SOON_S * 3)
        await reference.check_all([*requests[::2], *requests[1::2]], [*first, *second])
        return [*first, *second]

    asyncio.run(scenario())
    asyncio.run(wait_metric(small.decode.url, KV_USAGE, lambda usage: usage == 0.0, SOON_S))
