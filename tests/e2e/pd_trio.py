"""One prefill instance serves two decode instances: one fails a request whose blocks did not arrive, the other
recomputes it; together they also cover a forced `tcp` and the transport chosen by the engine. All have KV caches small
enough to run out.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equality
from serving import Program, ServerSpec
from support.client import Answer, Request, complete, new_salt, new_session, prompt_tokens
from support.metrics import BYTES, FAILED, LEASES_ENDED, LOCAL_PREFILLS, Change, wait_empty, wait_for
from support.proxy import Interference, Params, PDProxy, proceed
from support.reference import Reference
from support.servers import kv_transfer, make_server
from support.wire import LOOPBACK, Wire

LEASE_S = 8.0
RECV_DEADLINE_S = 6.0
# From the end of a pull to the end of its request: computing 16 tokens, or the whole prompt, on a busy machine.
COMPUTE_S = 60.0
DECODE_OPTIONS = {
    "recv_deadline_s": RECV_DEADLINE_S,
    "pull_timeout_s": 4,
    "handshake_timeout_s": 2,
    "link_timeout_s": 2,
    "peer_backoff_s": 0.5,
}
# D takes shorter requests than P: what P has prefilled may be refused by D's API server.
PREFILL_MAX_LEN, DECODE_MAX_LEN = 4096, 2048
# After a fault: the pause before the next try, a new link, and one request on a busy machine.
RECOVERY_S = 60.0
KV_BYTES = 40 << 20  # 40 blocks of 128 tokens


@dataclass(frozen=True)
class Trio:
    side_channel_port: int
    """P's."""
    prefill: Program
    failing: Program
    recomputing: Program

    def decode(self, policy: str) -> Program:
        return {"fail": self.failing, "recompute": self.recomputing}[policy]

    def restart_prefill(self) -> None:
        self.prefill.kill()
        self.prefill.start()
        self.prefill.wait_ready()

    async def check_nothing_held(self) -> None:
        for server in (self.prefill, self.failing, self.recomputing):
            await wait_empty(server.url, LEASE_S + 60)


def make_trio(model: Path, side_channel_port: int, engine_port: int) -> Trio:
    """Not started. P's ports are fixed: restarted, it is found where it was."""

    def server(name: str, config: dict[str, object], max_model_len: int = DECODE_MAX_LEN) -> Program:
        return make_server(
            ServerSpec(
                name,
                model,
                config,
                max_model_len=max_model_len,
                max_num_batched_tokens=512,
                kv_cache_bytes=KV_BYTES,
            )
        )

    ports: dict[str, Any] = {"side_channel_port": side_channel_port, "engine_port": engine_port}
    # What reaches P through a wire of the tests comes over TCP. Whatever a fault does, wrong bytes are to be noticed.
    options: dict[str, Any] = {"insecure": True, "verify": "fail"}
    failing = kv_transfer("decode", {"kv_load_failure_policy": "fail"}, transport="tcp", **DECODE_OPTIONS, **options)
    recomputing = kv_transfer("decode", {"kv_load_failure_policy": "recompute"}, **DECODE_OPTIONS, **options)
    return Trio(
        side_channel_port,
        server("faults-prefill", kv_transfer("prefill", lease_s=LEASE_S, **ports, **options), PREFILL_MAX_LEN),
        server("faults-fail", failing),
        server("faults-recompute", recomputing),
    )


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


async def check_recovers(
    trio: Trio, decode: Program, reference: Reference, interference: Interference | None = None
) -> None:
    """Requests may fail while P is not there; then they are served again."""
    until = time.monotonic() + RECOVERY_S
    change = Change(decode.url)
    async with PDProxy(trio.prefill.url, decode.url, interference or Interference()) as proxy:
        for seed in itertools.count(5000):
            request = Request(prompt_tokens(300, seed), cache_salt=new_salt())
            (answer,) = await equality.send(proxy.url, request)
            await reference.check_right_or_failed(request, answer)
            if change.now(BYTES) > 0:
                return
            assert time.monotonic() < until, f"no bytes moved within {RECOVERY_S:.0f} s; the last answer: {answer}"


class BeforeDecode:
    """A between_legs hook: when all requests are prefilled, `act` runs, and only then are the decode legs sent.

    So no pull can have been confirmed before the fault, and every one of them meets it.
    """

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self._missing = count
        self._act = act
        self._done = asyncio.Event()

    async def __call__(self, params: Params) -> None:
        assert params["remote_block_ids"], "P holds nothing for this request"
        self._missing -= 1
        if self._missing == 0:
            await asyncio.to_thread(self._act)
            self._done.set()
        await self._done.wait()


async def timed(proxy: PDProxy, request: Request) -> tuple[Answer, float]:
    async with new_session() as session:
        start = time.monotonic()
        answer = await complete(session, proxy.url, request)
        return answer, time.monotonic() - start


async def check_outcome(
    policy: str, reference: Reference, request: Request, answer: Answer, told_gone: bool = False
) -> None:
    """
    Args:
        told_gone: D may have heard from P in time that the lease is gone, and prefills it itself.
    """
    if policy == "recompute" or (answer.ok and told_gone):
        await reference.check(request, answer)
    else:
        assert not answer.ok, f"answered without its KV cache: {answer}"


async def check_alone(decode: Program, reference: Reference) -> None:
    request = Request(prompt_tokens(150, seed=3), cache_salt=new_salt())
    (answer,) = await equality.send(decode.url, request)
    await reference.check(request, answer)


async def send_to_both(trio: Trio, requests: dict[Program, list[Request]], interference: Interference) -> list[Answer]:
    """Decoded by each, after one prefill; (its answers, D by D)."""
    answers: list[Answer] = []
    async with AsyncExitStack() as stack:
        proxies = {
            decode: await stack.enter_async_context(PDProxy(trio.prefill.url, decode.url, interference))
            for decode in requests
        }
        sent = [equality.send(proxies[decode].url, *some) for decode, some in requests.items()]
        for part in await asyncio.gather(*sent):
            answers += part
    return answers


async def check_both(
    trio: Trio,
    requests: dict[Program, list[Request]],
    answers: list[Answer],
    ref: Reference,
    before: Change | None = None,
) -> None:
    """What did not arrive is recomputed here, and an error there.

    Args:
        before: of the failing D, where P lives to say that leases are gone: whoever hears it before a pull has begun is
            prefilled there, and counted.
    """
    wanted = [
        ("fail" if decode is trio.failing else "recompute", each) for decode in requests for each in requests[decode]
    ]
    failing = len(requests[trio.failing])
    answered = sum(answer.ok for answer in answers[:failing])
    if before is not None and answered:
        await before.reaches(LOCAL_PREFILLS, answered, reason="lease_gone")
    for (policy, request), answer in zip(wanted, answers, strict=True):
        await check_outcome(policy, ref, request, answer, told_gone=before is not None)


def for_both(trio: Trio, count: int, seed: int) -> dict[Program, list[Request]]:
    return {
        decode: some_requests(count, seed + 100 * index)
        for index, decode in enumerate((trio.failing, trio.recomputing))
    }


def run_out(change: Change) -> float:
    """Leases that nobody ended, whether a D had asked for them or not."""
    return sum(change.now(LEASES_ENDED, reason=reason) for reason in ("expired", "unclaimed"))


async def leases_run_out(change: Change, least: int) -> None:
    await wait_for("leases that ran out", lambda: run_out(change), lambda count: count >= least, LEASE_S + 60)


def too_late(change: Change) -> float:
    """Requests whose lease was gone before or during their pull."""
    return change.now(FAILED) + change.now(LOCAL_PREFILLS, reason="lease_gone")


def side_channel_wire(trio: Trio) -> Wire:
    """Between every D and P, for requests that through() sends that way."""
    listener = socket.create_server((LOOPBACK, 0))
    return Wire(listener, lambda: socket.create_connection((LOOPBACK, trio.side_channel_port)))


def through(wire: Wire, hook: Callable[[Params], Awaitable[None]] = proceed) -> Interference:
    return Interference(lambda params: {**params, "remote_port": wire.address[1]}, hook)
