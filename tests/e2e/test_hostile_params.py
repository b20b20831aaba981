"""kv_transfer_params pass through clients: whatever they say, an answer is right or the request fails.

Each case tampers with what P returned, before D sees it. Then the same prompt is asked for once more, untouched and
sharing D's prefix cache with the tampered request: blocks that a lie has filled must not have stayed there. That
nothing stays held is checked when the pair is stopped: where D cannot tell whom to thank, P's lease ends by expiry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import equality
import pytest
from support.client import Answer, Request, new_salt, prompt_tokens
from support.metrics import BYTES, FAILED, Change
from support.proxy import Interference, Params, PDProxy
from support.reference import Reference
from support.servers import Pair

PROMPT_TOKENS = 300  # three blocks, the last one partly filled
Tamper = Callable[[Params], object]

FIELDS = (
    "do_remote_prefill",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "remote_block_ids",
    "remote_num_tokens",
    "tp_size",
    "pp_size",
    "dcp_size",
    "datadist",
)
TICKET_FIELDS = ("version", "incarnation", "token", "generation", "lease_s", "prompt_digest")
MISSING = object()
BAD_VALUES: Mapping[str, object] = {
    "missing": MISSING,
    "null": None,
    "object": {"a": 1},
    "list": [[["x"]]],
    "text": "\x00ü" * 5000,
    "huge": 10**30,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "true": True,
}


def put(params: Params, path: tuple[str, ...], value: object) -> Params:
    changed = deepcopy(params)
    target = changed
    for key in path[:-1]:
        target = target[key]
    assert path[-1] in target, f"P returns no {path}: the case would change nothing"
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return changed


def setting(path: tuple[str, ...], value: object) -> Tamper:
    return lambda params: put(params, path, value)


def blocks(change: Callable[[list[int]], object]) -> Tamper:
    return lambda params: put(params, ("remote_block_ids",), change(params["remote_block_ids"][0]))


async def ask(pair: Pair, request: Request, tamper: Tamper) -> Answer:
    async with PDProxy(pair.prefill.url, pair.decode.url, Interference(params=tamper)) as proxy:
        (answer,) = await equality.send(proxy.url, request)
    return answer


async def check_tampered(pair: Pair, reference: Reference, seed: int, tamper: Tamper) -> Answer:
    """The tampered request is right or fails; the honest one that follows is right."""
    request = Request(prompt_tokens(PROMPT_TOKENS, seed), max_tokens=8, cache_salt=new_salt())
    answer = await ask(pair, request, tamper)
    await reference.check_right_or_failed(request, answer)
    again = await ask(pair, request, lambda params: params)
    await reference.check(request, again)
    return answer


async def check_fresh(pair: Pair, reference: Reference) -> None:
    request = Request(prompt_tokens(PROMPT_TOKENS, seed=1), cache_salt=new_salt())
    change = Change(pair.decode.url)
    await reference.check(request, await ask(pair, request, lambda params: params))
    await equality.check_moved(change, PROMPT_TOKENS - 1)


PATHS = [(name,) for name in FIELDS] + [("datadist", name) for name in TICKET_FIELDS]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_bad_value(pair: Pair, reference: Reference, path: tuple[str, ...]) -> None:
    async def scenario() -> None:
        tried = [
            check_tampered(pair, reference, 5000 + number, setting(path, value))
            for number, value in enumerate(BAD_VALUES.values())
        ]
        outcomes = await asyncio.gather(*tried, return_exceptions=True)
        wrong = {
            name: outcome
            for name, outcome in zip(BAD_VALUES, outcomes, strict=True)
            if isinstance(outcome, BaseException)
        }
        assert not wrong
        await check_fresh(pair, reference)

    asyncio.run(scenario())


WHOLE: Mapping[str, Tamper] = {
    "empty": lambda _: {},
    "only_the_flag": lambda _: {"do_remote_prefill": True},
    "list": lambda params: [params],
    "text": lambda _: "params",
    "number": lambda _: 7,
    "both_flags": setting(("do_remote_decode",), True),
    "request_for_prefill": lambda _: {"do_remote_decode": True, "do_remote_prefill": False},
    "deep": lambda params: {**params, "datadist": nested(200)},
    "extra_fields": lambda params: {**params, "x": "y" * 100_000, "transfer_mode": "push"},
}


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"token": value}
    return value


@pytest.mark.parametrize("name", WHOLE)
def test_bad_params(pair: Pair, reference: Reference, name: str) -> None:
    async def scenario() -> None:
        await check_tampered(pair, reference, 6000, WHOLE[name])
        await check_fresh(pair, reference)

    asyncio.run(scenario())


BLOCKS: Mapping[str, Tamper] = {
    "none": blocks(lambda _: [[]]),
    "no_groups": blocks(lambda _: []),
    "two_groups": blocks(lambda ids: [ids, ids]),
    "out_of_range": blocks(lambda ids: [[block + 10**6 for block in ids]]),
    "unsigned_minus_one": blocks(lambda ids: [[2**64 - 1 for _ in ids]]),
    "of_others": blocks(lambda ids: [[block + len(ids) for block in ids]]),
    "null_block": blocks(lambda ids: [[0 for _ in ids]]),
    "permuted": blocks(lambda ids: [ids[::-1]]),
    "repeated": blocks(lambda ids: [[ids[0]] * len(ids)]),
    "without_the_first": blocks(lambda ids: [ids[1:]]),
    "more_than_held": blocks(lambda ids: [[*ids, ids[-1] + 1]]),
    "very_many": blocks(lambda ids: [ids * 50_000]),
    "nested": blocks(lambda ids: [[ids]]),
    "text": blocks(lambda ids: [[str(block) + "x" for block in ids]]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_bad_blocks(pair: Pair, reference: Reference, name: str) -> None:
    async def scenario() -> None:
        await check_tampered(pair, reference, 7000, BLOCKS[name])
        await check_fresh(pair, reference)

    asyncio.run(scenario())


LIES: Mapping[str, Tamper] = {
    "more_tokens": setting(("remote_num_tokens",), 100_000),
    "more_ranks": setting(("tp_size",), 2),
    "many_ranks": setting(("tp_size",), 4096),
    "stages": setting(("pp_size",), 3),
    "unknown_token": setting(("datadist", "token"), "0" * 32),
    "other_generation": setting(("datadist", "generation"), 10**9),
    "other_incarnation": setting(("datadist", "incarnation"), "f" * 32),
    "other_digest": setting(("datadist", "prompt_digest"), "a" * 32),
    "other_engine": setting(("remote_engine_id",), "somebody-else"),
    "other_request": setting(("remote_request_id",), "cmpl-somebody-else"),
    "closed_port": setting(("remote_port",), 1),
    "host_by_name": setting(("remote_host",), "localhost"),
    "wildcard_host": setting(("remote_host",), "0.0.0.0"),  # noqa: S104 -- sent as a lie, not bound
    "host_with_port": setting(("remote_host",), "127.0.0.1:80"),
}


@pytest.mark.parametrize("name", LIES)
def test_lie(pair: Pair, reference: Reference, name: str) -> None:
    async def scenario() -> None:
        await check_tampered(pair, reference, 8000, LIES[name])
        await check_fresh(pair, reference)

    asyncio.run(scenario())


def test_lie_about_the_port_reaches_a_stranger(pair: Pair, reference: Reference) -> None:
    """The side channel's port is really an HTTP server's: what it says back is not believed."""

    async def scenario() -> None:
        await check_tampered(pair, reference, 8100, setting(("remote_port",), pair.prefill.port))
        await check_fresh(pair, reference)

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["192.0.2.1", "169.254.169.254", "2001:db8::1"])
def test_foreign_host_is_not_dialled(pair: Pair, reference: Reference, host: str) -> None:
    """A host that is not allowed is no reason to fail: the prompt is prefilled here, and no pull is even tried."""

    async def scenario() -> None:
        change = Change(pair.decode.url)
        request = Request(prompt_tokens(PROMPT_TOKENS, seed=8200), cache_salt=new_salt())
        answer = await ask(pair, request, setting(("remote_host",), host))
        await reference.check(request, answer)
        assert change.now(BYTES) == 0
        assert change.now(FAILED) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [PROMPT_TOKENS, PROMPT_TOKENS - 100, PROMPT_TOKENS + 100])
def test_lease_of_another_prompt(pair: Pair, reference: Reference, length: int) -> None:
    """A valid lease never answers for a prompt that it was not granted for."""
    taken: list[Params] = []

    async def scenario() -> None:
        victim = Request(prompt_tokens(PROMPT_TOKENS, seed=9000), cache_salt=new_salt())
        mine = Request(prompt_tokens(length, seed=9001), cache_salt=new_salt())

        def keep_copy(params: Params) -> object:
            taken.append(deepcopy(params))
            return {}

        await reference.check(victim, await ask(pair, victim, keep_copy))
        answer = await ask(pair, mine, lambda _: taken[0])
        await reference.check_right_or_failed(mine, answer)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "loosely",
    [
        lambda params: {**params, "remote_port": float(params["remote_port"])},
        lambda params: {**params, "remote_port": str(params["remote_port"])},
        blocks(lambda ids: [[float(block) for block in ids]]),
        blocks(lambda ids: ids),
        lambda params: {**params, "unknown": {"to": ["us"]}},
    ],
    ids=["float_port", "text_port", "float_blocks", "flat_blocks", "unknown_field"],
)
def test_loosely_typed_params_work(pair: Pair, reference: Reference, loosely: Tamper) -> None:
    """Routers that pass params through protobuf or text change types, not meanings."""

    async def scenario() -> None:
        request = Request(prompt_tokens(PROMPT_TOKENS, seed=9500), cache_salt=new_salt())
        change = Change(pair.decode.url)
        await reference.check(request, await ask(pair, request, loosely))
        await equality.check_moved(change, PROMPT_TOKENS - 1)

    asyncio.run(scenario())
