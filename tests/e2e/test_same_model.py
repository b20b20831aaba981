"""P and D that are not of one model: refused with what differs, or let differ by a D that is told to.

One D differs in both ways, other weights and another rope base: each is compared, and named, by itself.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import equality
import pytest
from serving import Program, ServerSpec
from support.client import Request, new_salt, prompt_tokens
from support.metrics import BYTES, FAILED, Change
from support.proxy import PDProxy
from support.servers import Pair, kv_transfer, make_server, running

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same configuration with other weights of the same kind: each file's values the other way round."""
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, other)
    for path in other.glob("*.safetensors"):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        values = memoryview(content)[begin:].cast("f")
        path.write_bytes(content[:begin] + bytes(values[::-1]))
    return other


@pytest.fixture(scope="module")
def strangers(other_model: Path, pair: Pair) -> Iterator[tuple[Program, Program]]:
    """(a D of the other model, one that is told that this is meant)."""
    del pair

    def make(name: str, **extra: object) -> Program:
        config = kv_transfer("decode", {"kv_load_failure_policy": "fail"}, **extra)
        overrides = ("--hf-overrides", json.dumps(ROPE))
        return make_server(ServerSpec(name, other_model, config, arguments=overrides, kv_cache_bytes=128 << 20))

    pair_of = make("stranger"), make("trusting", may_differ=["weights", "rope_parameters"])
    with running(*pair_of):
        yield pair_of


async def sent_through(prefill: Program, decode: Program) -> tuple[int, float, float]:
    """(HTTP status, failed handshakes, bytes moved)"""
    change = Change(decode.url)
    async with PDProxy(prefill.url, decode.url) as proxy:
        (answer,) = await equality.send(proxy.url, Request(prompt_tokens(300, seed=31), cache_salt=new_salt()))
    if answer.ok:
        await change.reaches(BYTES, 1)
    else:
        await change.reaches(FAILED, 1, reason="handshake")
    return answer.status, change.now(FAILED, reason="handshake"), change.now(BYTES)


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_other_weights_and_rope_are_refused_by_name(pair: Pair, strangers: tuple[Program, Program]) -> None:
    stranger, _ = strangers
    status, refused, moved = asyncio.run(sent_through(pair.prefill, stranger))
    assert (status, refused, moved) == (500, 1, 0)
    log = stranger.log.read_text(encoding="utf-8")
    assert "rope_parameters.rope_theta: ours 500000, theirs 10000" in log
    assert "weights: ours tensors:" in log


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_a_d_may_be_told_that_they_may_differ(pair: Pair, strangers: tuple[Program, Program]) -> None:
    _, trusting = strangers
    status, refused, moved = asyncio.run(sent_through(pair.prefill, trusting))
    assert (status, refused) == (200, 0)
    assert moved >= 256 * equality.KV_BYTES_PER_TOKEN
