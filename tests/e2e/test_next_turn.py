"""Conversations: what D keeps of one turn, P pulls for the next, and computes only what is new.

Each turn has a cache_salt of its own, so that neither side finds the earlier turn in its prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import equality
import pytest
from support.client import Answer, Request, new_salt, prompt_tokens
from support.metrics import BYTES, EXTERNAL_HITS, LEASES_ENDED, Change
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running, spec_of

DECODER_LEASE_S = 15.0
"""Of an answer, until the next turn: as long as its check may take on a busy machine."""
THRESHOLD = 64
ANSWER = 16


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    options = {"bidirectional": True, "decoder_lease_s": DECODER_LEASE_S, "recompute_threshold": THRESHOLD}
    fail = {"kv_load_failure_policy": "fail"}
    started = Pair(*(make_server(spec_of(f"turns-{n}", "qwen3", kv_transfer(n, fail, **options))) for n in SIDES))
    with running(*started.both):
        yield started


SIDES = ("prefill", "decode")


@pytest.fixture(scope="module", autouse=True)
def nothing_held(pair: Pair) -> Iterator[None]:
    """D's last answers are kept for turns that never come, until their leases are over: waited for once."""
    yield
    asyncio.run(equality.check_nothing_held(pair, DECODER_LEASE_S + 60))


async def turn(pair: Pair, reference: Reference, prompt: Sequence[int], params: object = None) -> Answer:
    request = Request(prompt, max_tokens=ANSWER, cache_salt=new_salt(), kv_transfer_params=params)
    async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
        (answer,) = await equality.send(proxy.url, request)
    await reference.check(replace(request, kv_transfer_params=None), answer)
    return answer


def test_three_turns(pair: Pair, reference: Reference) -> None:
    async def scenario() -> None:
        prompt, params, held = prompt_tokens(500, seed=1), None, 0
        for number in range(3):
            at_p, at_d = Change(pair.prefill.url), Change(pair.decode.url)
            answer = await turn(pair, reference, prompt, params)
            if held:
                await at_p.reaches(EXTERNAL_HITS, held)
                await at_p.reaches(BYTES, held * equality.KV_BYTES_PER_TOKEN)
                await at_d.reaches(LEASES_ENDED, 1, reason="released")
            await equality.check_moved(at_d, len(prompt) - 1)
            params = answer.kv_transfer_params
            assert params is not None
            assert (params["do_remote_decode"], params["do_remote_prefill"]) == (True, False)
            # All that D has fed to the model: the answer's last token was never fed.
            held = params["remote_num_tokens"]
            assert held == len(prompt) + ANSWER - 1
            prompt = [*prompt, *answer.tokens[0], *prompt_tokens(120, seed=10 + number)]

    asyncio.run(scenario())


def test_what_is_not_worth_a_pull_is_computed_again(pair: Pair, reference: Reference) -> None:
    async def scenario() -> None:
        prompt = prompt_tokens(THRESHOLD - ANSWER, seed=2)
        answer = await turn(pair, reference, prompt)
        at_p, at_d = Change(pair.prefill.url), Change(pair.decode.url)
        await turn(pair, reference, [*prompt, *answer.tokens[0], *prompt_tokens(50, seed=3)], answer.kv_transfer_params)
        # D need not wait for the lease to run out.
        await at_d.reaches(LEASES_ENDED, 1, reason="released")
        assert at_p.now(EXTERNAL_HITS) == 0

    asyncio.run(scenario())


def test_a_prompt_that_does_not_go_on_with_the_turn_is_prefilled(pair: Pair, reference: Reference) -> None:
    """A client that names another conversation's blocks gets nothing of it."""

    async def scenario() -> None:
        answer = await turn(pair, reference, prompt_tokens(300, seed=4))
        at_p = Change(pair.prefill.url)
        await turn(pair, reference, prompt_tokens(500, seed=5), answer.kv_transfer_params)
        assert at_p.now(EXTERNAL_HITS) == 0

    asyncio.run(scenario())
