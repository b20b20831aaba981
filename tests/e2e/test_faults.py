"""What goes wrong with a peer, a client or a request stays with the requests it concerns, and ends in time.

One prefill instance serves two decode instances: one fails a request whose blocks did not arrive, the other recomputes
it; together they also cover a forced `tcp` and the transport chosen by the engine. All have KV caches small enough to
run out.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equality
import pytest
from serving import Program, ServerSpec, free_port
from support.client import Answer, Request, complete, new_salt, new_session, prompt_tokens
from support.metrics import BYTES, FAILED, LEASES_ENDED, PREEMPTIONS, PULLING, Change, wait_empty, wait_metric
from support.proxy import DropDecodeError, Interference, Params, PDProxy
from support.reference import Reference
from support.servers import kv_transfer, make_server, running

LEASE_S = 8.0
RECV_DEADLINE_S = 6.0
# From the end of a pull to the end of its request: computing 16 tokens, or the whole prompt, on a busy machine.
COMPUTE_S = 20.0
DECODE_OPTIONS = {
    "recv_deadline_s": RECV_DEADLINE_S,
    "pull_timeout_s": 4,
    "handshake_timeout_s": 2,
    "link_timeout_s": 2,
    "peer_backoff_s": 0.5,
}
# D takes shorter requests than P: what P has prefilled may be refused by D's API server.
PREFILL_MAX_LEN, DECODE_MAX_LEN = 4096, 2048
# After a fault: the peer's backoff, a new link, and one request on a busy machine.
RECOVERY_S = 20.0
KV_BYTES = 40 << 20  # 40 blocks of 128 tokens


@dataclass(frozen=True)
class Trio:
    prefill: Program
    failing: Program
    recomputing: Program

    def decode(self, policy: str) -> Program:
        return {"fail": self.failing, "recompute": self.recomputing}[policy]

    async def check_nothing_held(self) -> None:
        for server in (self.prefill, self.failing, self.recomputing):
            await wait_empty(server.url, LEASE_S + 20)


@pytest.fixture(scope="module")
def trio(tiny_model: Path) -> Iterator[Trio]:
    def server(name: str, config: dict[str, object], max_model_len: int = DECODE_MAX_LEN) -> Program:
        return make_server(
            ServerSpec(
                name,
                tiny_model,
                config,
                max_model_len=max_model_len,
                max_num_batched_tokens=512,
                kv_cache_bytes=KV_BYTES,
            )
        )

    # Fixed ports: a restarted P is found where the old one was.
    ports: dict[str, Any] = {"side_channel_port": free_port(), "engine_port": free_port()}
    started = Trio(
        server("faults-prefill", kv_transfer("prefill", lease_s=LEASE_S, **ports), PREFILL_MAX_LEN),
        server(
            "faults-fail",
            kv_transfer("decode", {"kv_load_failure_policy": "fail"}, transport="tcp", **DECODE_OPTIONS),
        ),
        server("faults-recompute", kv_transfer("decode", {"kv_load_failure_policy": "recompute"}, **DECODE_OPTIONS)),
    )
    with running(started.prefill, started.failing, started.recomputing):
        yield started


@pytest.fixture(autouse=True)
def nothing_held(trio: Trio) -> Iterator[None]:
    yield
    asyncio.run(trio.check_nothing_held())


def some_requests(count: int, seed: int) -> list[Request]:
    return [Request(prompt_tokens(200 + 17 * i, seed + i), cache_salt=new_salt()) for i in range(count)]


async def check_normal(trio: Trio, decode: Program, reference: Reference, seed: int) -> None:
    """An ordinary request goes all the way: prefilled on P, its bytes pulled, the answer right."""
    request = Request(prompt_tokens(300, seed), cache_salt=new_salt())
    change = Change(decode.url)
    async with PDProxy(trio.prefill.url, decode.url) as proxy:
        (answer,) = await equality.send(proxy.url, request)
    await reference.check(request, answer)
    await change.reaches(BYTES, 299 * equality.KV_BYTES_PER_TOKEN)


async def check_recovers(trio: Trio, decode: Program, reference: Reference) -> None:
    """Requests may fail for as long as D leaves the peer alone (peer_backoff_s); then they are served again."""
    until = time.monotonic() + RECOVERY_S
    change = Change(decode.url)
    async with PDProxy(trio.prefill.url, decode.url) as proxy:
        for seed in itertools.count(5000):
            request = Request(prompt_tokens(300, seed), cache_salt=new_salt())
            (answer,) = await equality.send(proxy.url, request)
            await reference.check_right_or_failed(request, answer)
            if change.now(BYTES) > 0:
                return
            assert time.monotonic() < until, f"no bytes moved within {RECOVERY_S:.0f} s; the last answer: {answer}"


class StopBeforeDecode:
    """A between_legs hook: when all requests are prefilled, P is stopped, and only then are the decode legs sent.

    So no pull can have been confirmed before the fault, and every one of them meets it.
    """

    def __init__(self, prefill: Program, count: int) -> None:
        self._prefill = prefill
        self._missing = count
        self._stopped = asyncio.Event()

    async def __call__(self, params: Params) -> None:
        assert params["remote_block_ids"], "P holds nothing for this request"
        self._missing -= 1
        if self._missing == 0:
            await asyncio.to_thread(self._prefill.pause)
            self._stopped.set()
        await self._stopped.wait()


async def timed(proxy: PDProxy, request: Request) -> tuple[Answer, float]:
    async with new_session() as session:
        start = time.monotonic()
        answer = await complete(session, proxy.url, request)
        return answer, time.monotonic() - start


async def check_outcome(policy: str, reference: Reference, request: Request, answer: Answer) -> None:
    if policy == "recompute":
        await reference.check(request, answer)
    else:
        assert not answer.ok, f"answered without its KV cache: {answer}"


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_prefill_killed_during_transfers(trio: Trio, reference: Reference, policy: str) -> None:
    decode = trio.decode(policy)
    requests = some_requests(6, seed=1000)

    async def scenario() -> None:
        await check_normal(trio, decode, reference, seed=1)
        change = Change(decode.url)
        hook = StopBeforeDecode(trio.prefill, len(requests))
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
    trio.prefill.start()
    trio.prefill.wait_ready()
    asyncio.run(check_normal(trio, decode, reference, seed=2))


async def check_alone(decode: Program, reference: Reference) -> None:
    request = Request(prompt_tokens(150, seed=3), cache_salt=new_salt())
    (answer,) = await equality.send(decode.url, request)
    await reference.check(request, answer)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_prefill_silent_during_transfers(trio: Trio, reference: Reference, policy: str) -> None:
    """P neither answers nor closes anything: only deadlines end the pulls. Resumed, it serves again."""
    decode = trio.decode(policy)
    requests = some_requests(4, seed=2000)

    async def scenario() -> None:
        await check_normal(trio, decode, reference, seed=4)
        change = Change(decode.url)
        hook = StopBeforeDecode(trio.prefill, len(requests))
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
        assert change.now(LEASES_ENDED, reason="expired") == 0
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
        await expired.reaches(LEASES_ENDED, 2, deadline_s=LEASE_S + 15, reason="expired")

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
        assert expired.now(LEASES_ENDED, reason="expired") == 2
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
