"""What every prefill/decode pair has to hold, whatever its parallelism: run by the tests of each pair."""

from __future__ import annotations

import asyncio

from support.client import Answer, Request, complete, new_salt, new_session, prompt_tokens
from support.metrics import BYTES, EXTERNAL_HITS, Change, wait_empty
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair

PROMPT_LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 500, 2000, 5000)
# float32, 4 layers, 4 KV heads of 64, K and V: what the tiny model keeps per token over all ranks.
KV_BYTES_PER_TOKEN = 4 * 4 * 64 * 2 * 4
LEASE_S = 30.0


async def send(url: str, *requests: Request) -> list[Answer]:
    """All at once."""
    async with new_session() as session:
        return list(await asyncio.gather(*(complete(session, url, request) for request in requests)))


async def check_moved(change: Change, tokens: int) -> None:
    """The last token of a prompt is always computed by D: it yields the first logits."""
    if tokens > 0:
        await change.reaches(EXTERNAL_HITS, tokens)
        await change.reaches(BYTES, tokens * KV_BYTES_PER_TOKEN)


async def check_one(url: str, pair: Pair, reference: Reference, request: Request) -> None:
    """The answer is the reference's, and all of the prompt but its last token came from P."""
    change = Change(pair.decode.url)
    (answer,) = await send(url, request)
    await reference.check(request, answer)
    await check_moved(change, len(request.prompt) - 1)


async def check_length(pair: Pair, reference: Reference, length: int, stream: bool = False) -> None:
    request = Request(prompt_tokens(length, seed=1), cache_salt=new_salt(), stream=stream)
    async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
        await check_one(proxy.url, pair, reference, request)


async def check_storm(url: str, pair: Pair, reference: Reference, count: int) -> None:
    """`count` requests of mixed lengths at once, streamed and not."""
    requests = [
        Request(prompt_tokens(1 + (index * 37) % 700, seed=100 + index), cache_salt=new_salt(), stream=index % 2 == 1)
        for index in range(count)
    ]
    change = Change(pair.decode.url)
    answers = await send(url, *requests)
    await reference.check_all(requests, answers)
    await check_moved(change, sum(len(request.prompt) - 1 for request in requests))


async def check_repeat(url: str, pair: Pair, reference: Reference) -> None:
    """A prompt that D has seen moves only what D's prefix cache lacks: less than the first time, but not nothing."""
    salt = new_salt()
    short = Request(prompt_tokens(500, seed=7), cache_salt=salt)
    longer = Request([*short.prompt, *prompt_tokens(200, seed=8)], cache_salt=salt)
    moved: list[float] = []
    for request in (short, short, longer):
        change = Change(pair.decode.url)
        (answer,) = await send(url, request)
        await reference.check(request, answer)
        cached = 0 if not moved else 384  # three whole blocks of 128
        await check_moved(change, len(request.prompt) - 1 - cached)
        moved.append(change.now(BYTES))
    first, again, extended = moved
    if not (again < first and extended < len(longer.prompt) * KV_BYTES_PER_TOKEN):
        raise AssertionError(f"bytes moved: first {first}, again {again}, extended {extended}")


async def check_nothing_held(pair: Pair, deadline_s: float = 60.0) -> None:
    for server in pair.both:
        await wait_empty(server.url, deadline_s)
