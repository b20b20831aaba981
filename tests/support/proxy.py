"""The smallest prefill/decode proxy that speaks the NIXL flavour of kv_transfer_params, with hooks to interfere.

It runs in the test's own event loop:

    async with PDProxy(prefill_url, decode_url) as proxy:
        answer = await complete(session, proxy.url, request)

A client that goes away cancels the leg that is under way, as a careful router does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from support.client import new_session

Params = dict[str, Any]

ASK_PREFILL: Params = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class DropDecodeError(Exception):
    """Raised by a between_legs hook: the decode leg is never sent."""


def keep(params: Params) -> object:
    return params


async def proceed(params: Params) -> None:
    del params


@dataclass(frozen=True)
class Interference:
    """What the proxy does to the requests that pass through it."""

    params: Callable[[Params], object] = keep
    """Makes the decode leg's kv_transfer_params out of what the prefill leg returned."""
    between_legs: Callable[[Params], Awaitable[None]] = proceed
    """Awaited after the prefill leg has answered and before the decode leg is sent."""
    decode_copies: int = 1
    """How often the decode leg is sent, at the same time; the first one's answer goes to the client."""


@dataclass
class RoundRobin:
    """Instances that take turns; `urls` may change at any time."""

    urls: list[str]
    _turn: int = 0

    def next(self) -> str:
        self._turn += 1
        return self.urls[self._turn % len(self.urls)]


def pick(url: str | RoundRobin) -> str:
    return url if isinstance(url, str) else url.next()


def completions(url: str) -> str:
    return f"{url}/v1/completions"


@dataclass
class PDProxy:
    prefill_url: str | RoundRobin
    decode_url: str | RoundRobin
    interference: Interference = field(default_factory=Interference)
    prefilling: Counter[str] = field(default_factory=Counter)
    """Prefill legs under way, by instance."""

    async def __aenter__(self) -> PDProxy:
        self._session = new_session()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", uuid.uuid4().hex)}
        status, prefilled = await self._prefill(body, headers)
        if status != 200:
            return web.json_response(prefilled, status=status)
        params = prefilled.get("kv_transfer_params") or {}
        try:
            await self.interference.between_legs(params)
        except DropDecodeError:
            return web.json_response({"error": "decode leg dropped"}, status=502)
        decode_body = {**body, "kv_transfer_params": self.interference.params(params)}
        copies = [
            asyncio.create_task(self._swallow(decode_body, headers)) for _ in range(self.interference.decode_copies - 1)
        ]
        try:
            return await self._decode(request, decode_body, headers)
        finally:
            await asyncio.gather(*copies)

    async def _prefill(self, body: Params, headers: dict[str, str]) -> tuple[int, Params]:
        # A client that goes on with a conversation brings what the last turn's D returned.
        asked = {**ASK_PREFILL, **(body.get("kv_transfer_params") or {})}
        leg = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": asked}
        leg.pop("stream_options", None)
        url = pick(self.prefill_url)
        self.prefilling[url] += 1
        try:
            async with self._session.post(completions(url), json=leg, headers=headers) as answer:
                return answer.status, await answer.json(content_type=None)
        finally:
            self.prefilling[url] -= 1

    async def _decode(self, request: web.Request, body: Params, headers: dict[str, str]) -> web.StreamResponse:
        async with self._session.post(completions(pick(self.decode_url)), json=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _swallow(self, body: Params, headers: dict[str, str]) -> None:
        try:
            async with self._session.post(completions(pick(self.decode_url)), json=body, headers=headers) as answer:
                await answer.read()
        except aiohttp.ClientError:
            return  # the copy's own fate is not the client's
