"""The connector over the provider `cann`, with a library that stands in for CANN's: stricter than our engine, it
reports no links, and what a failed pull has begun to write arrives two seconds later.

Every third pull fails so: the answers are right all the same, computed by D, and no block of the failed pull is another
request's before its link is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import equality
import pytest
from pd_trio import BeforeDecode
from serving import Program
from support.client import Request, new_salt, prompt_tokens
from support.metrics import BYTES, FAILED, Change, wait_empty
from support.proxy import Interference, PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running, spec_of
from support.standin import standin_variables

LEASE_S = 8.0


def make_pair(kind: str, tp_size: int = 1, kv_cache_bytes: int = 128 << 20, **rules: int | Path) -> Pair:
    def server(role: str, extra: dict[str, object], **more: int | str) -> Program:
        fields = {"kv_load_failure_policy": "recompute"} if role == "decode" else {}
        config = kv_transfer(role, fields, provider="cann", **extra)
        return make_server(
            spec_of(
                f"cann-{role}-{kind}-tp{tp_size}",
                kind,
                config,
                tensor_parallel=tp_size,
                max_model_len=2048,
                kv_cache_bytes=kv_cache_bytes,
                variables=standin_variables(strict=1, **more),
            )
        )

    hard = {name: str(value) for name, value in rules.items()}
    return Pair(server("prefill", {"lease_s": LEASE_S}), server("decode", {"recv_deadline_s": 20.0}, **hard))


async def check_answers(pair: Pair, reference: Reference, count: int, seed: int) -> None:
    requests = [Request(prompt_tokens(40 + 67 * i, seed + i), cache_salt=new_salt()) for i in range(count)]
    async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
        await reference.check_all(requests, await equality.send(proxy.url, *requests))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cann") / "calls"


@pytest.fixture(scope="module")
def late(trace: Path) -> Iterator[Pair]:
    """Its KV cache is small: what is handed back is used again at once."""
    started = make_pair("qwen3", kv_cache_bytes=40 << 20, late_every=3, trace=trace)
    with running(*started.both):
        yield started


def test_late_writes_reach_nobody(late: Pair, reference: Reference, trace: Path) -> None:
    async def scenario() -> None:
        change = Change(late.decode.url)
        for wave in range(3):
            await check_answers(late, reference, 12, seed=100 * wave)
        await change.reaches(BYTES, 1)

    asyncio.run(scenario())
    asyncio.run(wait_empty(late.decode.url, LEASE_S + 20))
    pulls = [line for line in trace.read_text().splitlines() if " PullKvBlocks" in line]
    assert sum(not line.endswith("0x00000000") for line in pulls) >= 3, pulls[-9:]


def test_p_is_killed(late: Pair, reference: Reference) -> None:
    """Nothing tells D of it but pulls that fail and greetings that nobody answers."""
    requests = [Request(prompt_tokens(300 + i, 2000 + i), cache_salt=new_salt()) for i in range(4)]

    async def scenario() -> None:
        hook = Interference(between_legs=BeforeDecode(len(requests), late.prefill.kill))
        async with PDProxy(late.prefill.url, late.decode.url, hook) as proxy:
            await reference.check_all(requests, await equality.send(proxy.url, *requests))

    asyncio.run(check_answers(late, reference, 6, seed=1000))
    asyncio.run(scenario())
    late.prefill.start()
    late.prefill.wait_ready()
    asyncio.run(check_answers(late, reference, 6, seed=3000))
    asyncio.run(wait_empty(late.decode.url, LEASE_S + 20))


@pytest.mark.parametrize(("kind", "tp_size"), [("deepseek", 2), ("gemma3", 1)])
def test_shapes(kind: str, tp_size: int) -> None:
    """Tensor parallelism, latent and sliding KV caches; D is its own oracle."""
    pair = make_pair(kind, tp_size)
    with running(*pair.both):
        change = Change(pair.decode.url)
        asyncio.run(check_answers(pair, Reference(pair.decode.url), 8, seed=4000))
        asyncio.run(change.reaches(BYTES, 1))
        assert change.now(FAILED) == 0
