"""Instances whose KV cache is full of blocks that are kept, for somebody or not: nothing waits for a lease to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import equality
import pytest
from serving import Program
from support.client import MODEL, Request, new_salt, new_session, prompt_tokens
from support.metrics import BYTES, LEASES_ENDED, Change, wait_empty
from support.proxy import ASK_PREFILL, PDProxy
from support.reference import Reference
from support.servers import kv_transfer, make_server, running, spec_of

BLOCKS = 24
"""One of which is vLLM's own."""

SOON_S = 20.0
"""On a busy machine. A lease lasts 30 s, one that a waiter keeps alive 600."""


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def make_small(name: str, config: str, **more: Any) -> Program:
    arguments = ("--num-gpu-blocks-override", str(BLOCKS), "--chat-template", TEMPLATE)
    # As shipped for an instance that is both: a peer that is stuck may give up what we are about to read.
    policy = {} if config == "both" else {"kv_load_failure_policy": "fail"}
    small: dict[str, Any] = {"block_size": 32, "max_model_len": 700, "arguments": arguments}
    return make_server(spec_of(name, "qwen3", kv_transfer(config, policy), **small, **more))


@pytest.fixture(scope="module")
def instances() -> Iterator[tuple[Program, Program, Program]]:
    """(P and D, another, P alone)"""
    # Requests then have the names that a client gives them, and those of a list differ only in a number.
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
    prefill = make_small("full-prefill", "prefill", variables=variables)
    started = make_small("full-both", "both"), make_small("full-other", "both"), prefill
    with running(*started):
        yield started


def new_requests(count: int, seed: int) -> list[Request]:
    return [Request(prompt_tokens(100, seed + index), cache_salt=new_salt()) for index in range(count)]


class Warnings:
    """What a server's log warns of from here on."""

    def __init__(self, server: Program) -> None:
        self._log = server.log
        self._start = self._log.stat().st_size

    def lines(self) -> list[str]:
        new = self._log.read_bytes()[self._start :].decode(errors="replace")
        return [line for line in new.splitlines() if "WARNING" in line or "ERROR" in line]


async def post(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[float, dict[str, Any]]:
    """(seconds, answer)"""
    began = time.monotonic()
    async with new_session() as session, session.post(url + path, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return time.monotonic() - began, answer


def test_an_instance_that_waits_for_itself(instances: tuple[Program, Program, Program], reference: Reference) -> None:
    async def scenario() -> None:
        both = instances[0]
        requests = new_requests(16, seed=1000)
        began = time.monotonic()
        async with PDProxy(both.url, both.url) as proxy:
            answers = await equality.send(proxy.url, *requests)
        assert time.monotonic() - began < SOON_S
        await reference.check_all(requests, answers)
        await wait_empty(both.url, SOON_S)

    asyncio.run(scenario())


def test_instances_that_wait_for_each_other(instances: tuple[Program, Program, Program], reference: Reference) -> None:
    async def scenario() -> None:
        one, other, _ = instances
        requests = new_requests(20, seed=2000)
        began = time.monotonic()
        async with PDProxy(one.url, other.url) as there, PDProxy(other.url, one.url) as back:
            both_ways = equality.send(there.url, *requests[::2]), equality.send(back.url, *requests[1::2])
            answers = [each for pair in zip(*await asyncio.gather(*both_ways), strict=True) for each in pair]
        assert time.monotonic() - began < SOON_S
        await reference.check_all(requests, answers)
        for each in (one, other):
            await wait_empty(each.url, SOON_S)

    asyncio.run(scenario())


def test_conversations_of_a_batch(instances: tuple[Program, Program, Program]) -> None:
    """Their answer has no params: nobody ever asks for their blocks."""

    async def scenario() -> None:
        prefill = instances[2]
        talks = [[{"role": "user", "content": f"{index} " * 40}] for index in range(40)]
        body = {"model": MODEL, "messages": talks, "max_tokens": 1, "kv_transfer_params": ASK_PREFILL}
        seconds, answer = await post(prefill.url, "/v1/chat/completions/batch", body)
        assert len(answer["choices"]) == 40
        assert seconds < SOON_S
        await wait_empty(prefill.url, SOON_S)

    asyncio.run(scenario())


def test_answers_that_carry_no_params_hold_nothing_for_long(instances: tuple[Program, Program, Program]) -> None:
    """A stream, all but one of a list of prompts, all but one of the children of n > 1."""

    async def scenario() -> None:
        prefill = instances[2]
        change, warned = Change(prefill.url), Warnings(prefill)
        legs: dict[str, Any] = {"max_tokens": 1, "kv_transfer_params": ASK_PREFILL}
        stream, several = (Request(prompt_tokens(60, 4000 + n), n=n, stream=n == 1, **legs) for n in (1, 3))
        prompts = [prompt_tokens(60, 4010 + index) for index in range(3)]
        answers, (_, of_list) = await asyncio.gather(
            equality.send(prefill.url, stream, several),
            post(prefill.url, "/v1/completions", {"model": MODEL, "prompt": prompts, **legs}),
        )
        assert all(answer.ok for answer in answers)
        assert [len(answer.tokens) for answer in answers] == [1, 3]
        assert len(of_list["choices"]) == 3
        await change.reaches(LEASES_ENDED, 7, deadline_s=SOON_S, reason="unclaimed")
        await wait_empty(prefill.url, SOON_S)
        assert warned.lines() == []

    asyncio.run(scenario())


def test_choices_are_decoded_from_one_lease(instances: tuple[Program, Program, Program], reference: Reference) -> None:
    """P has prefilled as many children as D decodes, and D comes for the blocks of one."""

    async def scenario() -> None:
        _, decode, prefill = instances
        moved, warned = Change(decode.url), [Warnings(server) for server in (prefill, decode)]
        request = Request(prompt_tokens(100, 4100), n=3, cache_salt=new_salt())
        async with PDProxy(prefill.url, decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, request)
        await reference.check(request, answer)
        assert len(answer.tokens) == 3
        await moved.reaches(BYTES, 99 * equality.KV_BYTES_PER_TOKEN)
        for server in (prefill, decode):
            await wait_empty(server.url, SOON_S)
        assert [each.lines() for each in warned] == [[], []]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("pause", "go_on"),
    [
        ("/pause?mode=abort", "/resume"),
        ("/pause?mode=wait", "/resume"),
        ("/pause?mode=keep", "/resume"),
        ("/sleep?level=0&mode=keep", "/wake_up"),
        ("/sleep?level=1&mode=wait", "/wake_up"),
    ],
)
def test_a_pause_does_not_wait_for_a_lease(instances: tuple[Program, Program, Program], pause: str, go_on: str) -> None:
    """vLLM's CPU worker keeps its memory when it sleeps; the pause before it is that of any platform."""

    async def scenario() -> None:
        prefill = instances[2]
        change = Change(prefill.url)
        request = Request(prompt_tokens(100, 3000), max_tokens=1, kv_transfer_params=ASK_PREFILL)
        (orphan,) = await equality.send(prefill.url, request)
        assert orphan.kv_transfer_params is not None
        assert orphan.kv_transfer_params["datadist"]
        seconds, _ = await post(prefill.url, pause)
        assert seconds < SOON_S
        await post(prefill.url, go_on)
        (again,) = await equality.send(prefill.url, Request(request.prompt, max_tokens=1))
        assert again.ok
        await change.reaches(LEASES_ENDED, 1, reason="revoked")
        await wait_empty(prefill.url, SOON_S)

    asyncio.run(scenario())


def test_a_responses_request_is_held_whatever_its_name(instances: tuple[Program, Program, Program]) -> None:
    async def scenario() -> None:
        prefill = instances[2]
        body = {"model": MODEL, "input": "1 2 3 " * 20, "max_output_tokens": 1, "kv_transfer_params": ASK_PREFILL}
        change = Change(prefill.url)
        for name in ({"request_id": "5_abc"}, {}):
            await post(prefill.url, "/v1/responses", body | name)
        await change.reaches(LEASES_ENDED, 2, reason="unclaimed")

    asyncio.run(scenario())
