"""P and D change places while they serve, by the command."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import equality
import pytest
from serving import Program, free_port
from support.client import Request, new_salt, prompt_tokens
from support.metrics import LOCAL_PREFILLS, ROLE, Change, read, wait_metric
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running, spec_of

from vllm_datadist_connector.cli import main

SOON_S = 40.0


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    """Of the side channels: the operator knows them."""
    return free_port(), free_port()


@pytest.fixture(scope="module")
def both(ports: tuple[int, int]) -> Iterator[Pair]:
    def server(name: str, port: int) -> Program:
        config = kv_transfer("both", role_switch=True, side_channel_port=port, claim_s=5)
        return make_server(spec_of(f"role-{name}", "qwen3", config))

    pair = Pair(server("a", ports[0]), server("b", ports[1]))
    with running(*pair.both):
        yield pair


def switch(role: str, port: int) -> int:
    return main(["role", role, f"127.0.0.1:{port}"])


def test_they_change_places(both: Pair, ports: tuple[int, int], reference: Reference) -> None:
    a, b = both.both
    request = Request(prompt_tokens(700, seed=3000), max_tokens=16)

    async def serve(prefill: Program, decode: Program) -> None:
        """Its KV moves: what is checked is the tokens, and the bytes that came."""
        fresh = Request(request.prompt, max_tokens=request.max_tokens, cache_salt=new_salt())
        async with PDProxy(prefill.url, decode.url) as proxy:
            await equality.check_one(proxy.url, Pair(prefill, decode), reference, fresh)

    async def become(of_a: str, of_b: str) -> None:
        """At once: neither can wait for the other."""
        done = await asyncio.gather(
            *(asyncio.to_thread(switch, role, port) for role, port in zip((of_a, of_b), ports, strict=True))
        )
        assert done == [0, 0]

    async def scenario() -> None:
        await become("prefill", "decode")
        await serve(a, b)
        for server, role in ((a, "prefill"), (b, "decode")):
            await wait_metric(server.url, ROLE, lambda value: value == 1.0, role=role)
            assert (await read(server.url)).total(ROLE) == 1.0
        # A router that has not heard of it: b computes the prompt, and a, which took nothing before.
        local = Change(a.url)
        async with PDProxy(b.url, a.url) as proxy:
            fresh = Request(request.prompt, max_tokens=request.max_tokens, cache_salt=new_salt())
            (answer,) = await equality.send(proxy.url, fresh)
        await reference.check(fresh, answer)
        await local.reaches(LOCAL_PREFILLS, 1, reason="switched")
        await become("decode", "prefill")
        await serve(b, a)
        await become("both", "both")
        await serve(a, b)
        await serve(b, a)
        await equality.check_nothing_held(both, SOON_S)

    asyncio.run(scenario())
