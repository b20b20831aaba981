"""What goes wrong with a peer, a client or a request stays with the requests it concerns, and ends in time."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import equality
import pytest
from pd_trio import (
    COMPUTE_S,
    DECODE_MAX_LEN,
    RECV_DEADLINE_S,
    BeforeDecode,
    Trio,
    check_alone,
    check_both,
    check_normal,
    check_outcome,
    check_recovers,
    for_both,
    leases_run_out,
    make_trio,
    run_out,
    send_to_both,
    side_channel_wire,
    some_requests,
    through,
    timed,
    too_late,
)
from serving import Program, free_port
from support.client import Answer, Request, complete, new_salt, new_session, prompt_tokens
from support.metrics import (
    BYTES,
    FAILED,
    LEASES_ENDED,
    PREEMPTIONS,
    PULLING,
    Change,
    wait_for,
    wait_metric,
)
from support.proxy import DropDecodeError, Interference, Params, PDProxy
from support.reference import Reference
from support.servers import running
from support.wire import Mode, Wire

WIRE_FAULTS: tuple[Mode, ...] = ("swallow both", "drip", "reset")


@pytest.fixture(scope="module")
def trio(tiny_model: Path) -> Iterator[Trio]:
    started = make_trio(tiny_model, free_port(), free_port())
    with running(started.prefill, started.failing, started.recomputing):
        yield started


@pytest.fixture(autouse=True)
def nothing_held(trio: Trio) -> Iterator[None]:
    yield
    asyncio.run(trio.check_nothing_held())


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_prefill_killed_during_transfers(trio: Trio, reference: Reference, policy: str) -> None:
    decode = trio.decode(policy)
    requests = some_requests(6, seed=1000)

    async def scenario() -> None:
        await check_normal(trio, decode, reference, seed=1)
        change = Change(decode.url)
        hook = BeforeDecode(len(requests), trio.prefill.pause)
        async with PDProxy(trio.prefill.url, decode.url, Interference(between_legs=hook)) as proxy:
            sent = [asyncio.create_task(timed(proxy, request)) for request in requests]
            await wait_metric(decode.url, PULLING, lambda count: count > 0)
            killed = time.monotonic()
            await asyncio.to_thread(trio.prefill.kill)
            outcomes = await asyncio.gather(*sent)
        assert time.monotonic() - killed < RECV_DEADLINE_S + COMPUTE_S
        for request, (answer, _) in zip(requests, outcomes, strict=True):
            await check_outcome(policy, reference, request, answer)
        await change.reaches(FAILED, 1)
        await check_alone(decode, reference)

    asyncio.run(scenario())
    trio.restart_prefill()
    asyncio.run(check_normal(trio, decode, reference, seed=2))


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_prefill_silent_during_transfers(trio: Trio, reference: Reference, policy: str) -> None:
    """P neither answers nor closes anything: only deadlines end the pulls. Resumed, it serves again."""
    decode = trio.decode(policy)
    requests = some_requests(4, seed=2000)

    async def scenario() -> None:
        await check_normal(trio, decode, reference, seed=4)
        change = Change(decode.url)
        hook = BeforeDecode(len(requests), trio.prefill.pause)
        try:
            async with PDProxy(trio.prefill.url, decode.url, Interference(between_legs=hook)) as proxy:
                outcomes = await asyncio.gather(*(timed(proxy, request) for request in requests))
        finally:
            trio.prefill.resume()
        for request, (answer, seconds) in zip(requests, outcomes, strict=True):
            assert seconds < RECV_DEADLINE_S + COMPUTE_S
            await check_outcome(policy, reference, request, answer)
        await change.reaches(FAILED, 1)
        await check_recovers(trio, decode, reference)

    asyncio.run(scenario())


def test_cancel_storm(trio: Trio, reference: Reference) -> None:
    """Clients go away at random moments of either leg; nothing stays held and the rest is answered right."""
    source = random.Random(7)
    requests = [
        Request(prompt_tokens(20 + 13 * i, seed=3000 + i), cache_salt=new_salt(), max_tokens=32, stream=i % 2 == 0)
        for i in range(40)
    ]

    async def impatient(url: str, request: Request, patience_s: float) -> Answer | None:
        async with new_session() as session:
            try:
                return await asyncio.wait_for(complete(session, url, request), patience_s)
            except asyncio.TimeoutError:
                return None

    async def scenario() -> None:
        async with PDProxy(trio.prefill.url, trio.recomputing.url) as proxy:
            patience = [source.choice([source.uniform(0.01, 3.0), 120.0]) for _ in requests]
            answers = await asyncio.gather(*map(impatient, [proxy.url] * len(requests), requests, patience))
        gone = sum(answer is None for answer in answers)
        assert 0 < gone < len(requests), f"{gone} of {len(requests)} clients went away: this was no storm"
        served = [(request, answer) for request, answer in zip(requests, answers, strict=True) if answer is not None]
        await asyncio.gather(*(reference.check(*each) for each in served))
        await trio.check_nothing_held()
        await check_normal(trio, trio.recomputing, reference, seed=6)

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_rejected_by_decode(trio: Trio, reference: Reference, policy: str) -> None:
    """D's API server refuses the request: P hears of it, rather than waiting for the lease to expire."""
    decode = trio.decode(policy)
    request = Request(prompt_tokens(DECODE_MAX_LEN + 300, seed=8), cache_salt=new_salt())

    async def scenario() -> None:
        change = Change(trio.prefill.url)
        async with PDProxy(trio.prefill.url, decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        assert answer.status == 400, answer
        await change.reaches(LEASES_ENDED, 1, reason="released")
        assert run_out(change) == 0
        await check_normal(trio, decode, reference, seed=9)

    asyncio.run(scenario())


def test_leases_expire(trio: Trio, reference: Reference) -> None:
    """One client is gone between the legs: nobody comes for the blocks, and P has them back. Another's decode leg comes
    after the lease has expired: its blocks may be another request's, and are not used."""
    expired = Change(trio.prefill.url)

    async def drop(params: Params) -> None:
        raise DropDecodeError(params["remote_request_id"])

    async def until_both_expired(params: Params) -> None:
        assert params["remote_block_ids"]
        await leases_run_out(expired, 2)

    async def send(decode: Program, request: Request, hook: Callable[[Params], Awaitable[None]]) -> Answer:
        async with PDProxy(trio.prefill.url, decode.url, Interference(between_legs=hook)) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        return answer

    async def scenario() -> None:
        abandoned = Request(prompt_tokens(500, seed=10), cache_salt=new_salt())
        late = Request(prompt_tokens(400, seed=12), cache_salt=new_salt())
        gone, answer = await asyncio.gather(
            send(trio.failing, abandoned, drop), send(trio.recomputing, late, until_both_expired)
        )
        assert gone.status == 502
        await reference.check(late, answer)
        assert run_out(expired) == 2
        await trio.check_nothing_held()
        await check_normal(trio, trio.failing, reference, seed=11)

    asyncio.run(scenario())


def test_decode_leg_sent_twice(trio: Trio, reference: Reference) -> None:
    """A router that repeats itself: both legs carry one lease, and the answer is right whichever gets it."""

    async def scenario() -> None:
        for seed in range(13, 17):
            request = Request(prompt_tokens(400, seed), cache_salt=new_salt())
            async with PDProxy(trio.prefill.url, trio.recomputing.url, Interference(decode_copies=2)) as proxy:
                (answer,) = await equality.send(proxy.url, request)
            await reference.check(request, answer)

    asyncio.run(scenario())


def test_stop_on_the_first_token(trio: Trio, reference: Reference) -> None:
    """P's only token is a stop token: the request is finished there for another reason than its length."""

    async def scenario() -> None:
        plain = Request(prompt_tokens(300, seed=17), cache_salt=new_salt())
        first = (await reference.answer(plain)).tokens[0][0]
        request = Request(plain.prompt, cache_salt=new_salt(), stop_token_ids=[first])
        change = Change(trio.failing.url)
        async with PDProxy(trio.prefill.url, trio.failing.url) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        await reference.check(request, answer)
        assert answer.finish_reasons == ["stop"]
        await change.reaches(BYTES, 1)

    asyncio.run(scenario())


def test_preempted_on_decode(trio: Trio, reference: Reference) -> None:
    """D runs out of blocks while answers grow: preempted requests come back right, though their KV was pulled."""
    requests = [
        Request(prompt_tokens(370 + i, seed=4000 + i), max_tokens=200, cache_salt=new_salt()) for i in range(14)
    ]

    async def scenario() -> None:
        change = Change(trio.recomputing.url)
        async with PDProxy(trio.prefill.url, trio.recomputing.url) as proxy:
            answers = await equality.send(proxy.url, *requests)
        await reference.check_all(requests, answers)
        await change.reaches(PREEMPTIONS, 1)
        await change.reaches(BYTES, 1)

    asyncio.run(scenario())


def test_decode_killed_during_transfers(trio: Trio, reference: Reference) -> None:
    """What it had asked for is P's again once the leases are over, and its next life is served."""
    requests = some_requests(4, seed=6000)

    async def scenario() -> None:
        expired = Change(trio.prefill.url)
        hook = BeforeDecode(len(requests), trio.prefill.pause)
        async with PDProxy(trio.prefill.url, trio.recomputing.url, Interference(between_legs=hook)) as proxy:
            sent = asyncio.create_task(equality.send(proxy.url, *requests))
            await wait_metric(trio.recomputing.url, PULLING, lambda count: count > 0)
            await asyncio.to_thread(trio.recomputing.kill)
            trio.prefill.resume()
            assert not any(answer.ok for answer in await sent)
        trio.recomputing.start()
        await leases_run_out(expired, len(requests))

    asyncio.run(scenario())
    trio.recomputing.wait_ready()
    asyncio.run(check_normal(trio, trio.recomputing, reference, seed=20))


def test_decode_silent_until_its_leases_are_over(trio: Trio, reference: Reference) -> None:
    """P gives the blocks to others meanwhile; D, when it goes on, must not take their bytes for its own."""
    requests = for_both(trio, 3, seed=6500)
    others = some_requests(4, seed=6900)

    async def scenario() -> None:
        expired, before = Change(trio.prefill.url), Change(trio.failing.url)
        hook = BeforeDecode(6, trio.prefill.pause)
        sent = asyncio.create_task(send_to_both(trio, requests, Interference(between_legs=hook)))
        for decode in requests:
            await wait_metric(decode.url, PULLING, lambda count: count > 0)
            await asyncio.to_thread(decode.pause)
        trio.prefill.resume()
        await leases_run_out(expired, 6)
        await reference.check_all(others, await equality.send(trio.prefill.url, *others))
        for decode in requests:
            decode.resume()
        await check_both(trio, requests, await sent, reference, before)
        for decode in requests:
            await check_recovers(trio, decode, reference)

    asyncio.run(scenario())


def test_prefill_restarted_between_the_legs(trio: Trio, reference: Reference) -> None:
    """Another life at the same address holds nothing of what its predecessor promised."""
    requests = for_both(trio, 2, seed=7000)

    async def scenario() -> None:
        before = Change(trio.failing.url)
        answers = await send_to_both(trio, requests, Interference(between_legs=BeforeDecode(4, trio.restart_prefill)))
        await check_both(trio, requests, answers, reference, before)
        for decode in requests:
            await check_recovers(trio, decode, reference)

    asyncio.run(scenario())


def test_prefill_stops_and_goes_on_all_the_time(trio: Trio, reference: Reference) -> None:
    """As slow as that it may be too slow for a deadline, and never wrong."""
    requests = for_both(trio, 6, seed=7500)

    async def scenario() -> None:
        sent = asyncio.create_task(send_to_both(trio, requests, Interference()))
        pauses = 0
        try:
            while not sent.done():
                await asyncio.to_thread(trio.prefill.pause)
                pauses += 1
                await asyncio.wait([sent], timeout=0.2)
                trio.prefill.resume()
                await asyncio.wait([sent], timeout=0.1)
        finally:
            trio.prefill.resume()
        assert pauses > 1
        for request, answer in zip([each for some in requests.values() for each in some], await sent, strict=True):
            await reference.check_right_or_failed(request, answer)
        await check_recovers(trio, trio.failing, reference)

    asyncio.run(scenario())


def test_the_side_channel_fails_in_the_handshake(trio: Trio, reference: Reference) -> None:
    """Silent, slow or cut: each wire has requests of its own."""

    async def meet_fault(mode: Mode, wire: Wire, seed: int) -> None:
        requests = for_both(trio, 1, seed)
        answers = await send_to_both(trio, requests, through(wire, BeforeDecode(2, lambda: wire.release(mode))))
        await check_both(trio, requests, answers, reference)
        assert wire.swallowed or wire.dripped or wire.resets, mode

    async def scenario() -> None:
        with ExitStack() as stack:
            wires = {mode: stack.enter_context(side_channel_wire(trio)) for mode in WIRE_FAULTS}
            await asyncio.gather(*(meet_fault(*each, 8000 + 200 * i) for i, each in enumerate(wires.items())))
        for decode in (trio.failing, trio.recomputing):
            await check_recovers(trio, decode, reference)

    asyncio.run(scenario())


def test_the_side_channel_fails_before_the_confirmation(trio: Trio, reference: Reference) -> None:
    """P and D have met; the bytes come over the engine's link, and nobody can say whether they count."""

    async def meet_fault(mode: Mode, wire: Wire, seed: int) -> None:
        for decode in (trio.failing, trio.recomputing):
            await check_recovers(trio, decode, reference, through(wire))
        before = (wire.swallowed, wire.dripped, wire.resets)
        requests = for_both(trio, 1, seed)
        answers = await send_to_both(trio, requests, through(wire, BeforeDecode(2, lambda: wire.release(mode))))
        if mode == "drip":  # it may come in time
            for (request,), answer in zip(requests.values(), answers, strict=True):
                await reference.check_right_or_failed(request, answer)
        else:
            await check_both(trio, requests, answers, reference)
        assert (wire.swallowed, wire.dripped, wire.resets) > before, mode
        wire.heal()

    async def scenario() -> None:
        with side_channel_wire(trio) as wire:
            for index, mode in enumerate(WIRE_FAULTS):
                await meet_fault(mode, wire, 8600 + 200 * index)

    # A life of P's is known at one address: that of the wire, and the next one at its own again.
    trio.restart_prefill()
    asyncio.run(scenario())
    trio.restart_prefill()
    for decode in (trio.failing, trio.recomputing):
        asyncio.run(check_recovers(trio, decode, reference))


LEASE_WAVES = int(os.environ.get("DATADIST_LEASE_WAVES", "1"))
"""Of 18 rounds each; more for who starts this by hand: 28 waves take some five minutes."""


@pytest.mark.parametrize("wave", range(LEASE_WAVES))
def test_leases_end_while_their_blocks_are_read(trio: Trio, reference: Reference, wave: int) -> None:
    """All decode legs are sent when the first lease has expired and the others are about to, with P busy: what D reads
    is another request's at any moment from then on."""
    requests = for_both(trio, 9, seed=9000 + 1000 * wave)
    others = some_requests(12, seed=9500 + 1000 * wave)

    async def scenario() -> None:
        expired = Change(trio.prefill.url)

        async def until_one_expired(params: Params) -> None:
            assert params["remote_block_ids"]
            await leases_run_out(expired, 1)

        changes = [Change(decode.url) for decode in requests]
        sent = asyncio.create_task(send_to_both(trio, requests, Interference(between_legs=until_one_expired)))
        await leases_run_out(expired, 1)
        used_again, answers = await asyncio.gather(equality.send(trio.prefill.url, *others), sent)
        await reference.check_all(others, used_again)
        for request, answer in zip([each for some in requests.values() for each in some], answers, strict=True):
            await reference.check_right_or_failed(request, answer)
        assert all(answer.ok for answer in answers[len(requests[trio.failing]) :])
        await wait_for("leases that came too late", lambda: sum(map(too_late, changes)), bool, 60.0)

    asyncio.run(scenario())
