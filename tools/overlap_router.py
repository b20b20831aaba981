#!/usr/bin/env python3
"""A router that sends each prompt to a prefill and a decode instance at once: the transfer hides in the prefill.

    .venv/bin/python tools/overlap_router.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

Both legs name one hand-off, a random token, and D's leg where to ask for it: P's side channel, whose address is learnt
from P's answers. The first prompt of a P, and one whose P has another address now, therefore goes to one after the
other, as with any router. D's answer is the client's. If P refuses its leg, so is the client; if P cannot be reached, D
prefills the prompt itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

MAX_BODY = 64 << 20
PATHS = ("/v1/completions", "/v1/chat/completions")


Params = dict[str, Any]


class Address(NamedTuple):
    """Of P's side channel."""

    host: str
    port: int


class RefusedError(Exception):
    """P does not take the request: what it answered."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.body = body


def prefill_leg(body: dict[str, Any], handoff: str) -> dict[str, Any]:
    """One token of the same prompt, whose KV cache is kept for whoever names the hand-off."""
    length = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    params = {"do_remote_decode": True, "do_remote_prefill": False, "datadist": {"handoff": handoff}}
    # What P samples is thrown away. vLLM's CPU build dies of a seeded request that is prefilled in chunks.
    leg = {**body, length: 1, "stream": False, "n": 1, "temperature": 0, "kv_transfer_params": params}
    for name in ("stream_options", "min_tokens", "best_of", "seed"):
        leg.pop(name, None)
    return leg


def decode_leg(body: dict[str, Any], handoff: str, address: Address, mode: str | None) -> dict[str, Any]:
    params: Params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": address.host,
        "remote_port": address.port,
        "datadist": {"handoff": handoff},
    }
    if mode is not None:
        params["transfer_mode"] = mode
    return {**body, "kv_transfer_params": params}


class OverlapRouter:
    """Handlers of an aiohttp application."""

    def __init__(self, prefills: Sequence[str], decodes: Sequence[str], mode: str | None = None) -> None:
        self._mode = mode
        self._prefills = itertools.cycle(prefills)
        self._decodes = itertools.cycle(decodes)
        self._addresses: dict[str, Address] = {}
        self._session: aiohttp.ClientSession | None = None

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.cleanup_ctx.append(self._with_session)
        app.router.add_get("/health", self._health)
        for path in PATHS:
            app.router.add_post(path, self._handle)
        return app

    async def _with_session(self, app: web.Application) -> Any:
        del app
        timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            yield

    async def _health(self, request: web.Request) -> web.Response:
        del request
        return web.Response()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return web.json_response({"error": "the body is no JSON object"}, status=400)
        prefill, decode = next(self._prefills), next(self._decodes)
        headers = {name: request.headers[name] for name in ("Authorization", "X-Request-Id") if name in request.headers}
        try:
            return await self._answer(request, body, headers, prefill, decode)
        except RefusedError as refusal:
            return web.Response(body=refusal.body, status=refusal.status, content_type="application/json")
        except aiohttp.ClientConnectorError as error:
            return web.json_response({"error": f"decode leg: {error}"}, status=502)

    async def _answer(
        self, request: web.Request, body: dict[str, Any], headers: dict[str, str], prefill: str, decode: str
    ) -> web.StreamResponse:
        handoff, address = secrets.token_hex(16), self._addresses.get(prefill)
        to_p = asyncio.create_task(self._prefill(prefill, request.path, prefill_leg(body, handoff), headers))
        legs: set[asyncio.Task[Any]] = {to_p}
        try:
            if address is not None:
                leg = decode_leg(body, handoff, address, self._mode)
                to_d = asyncio.create_task(self._decode(request, decode, leg, headers))
                legs.add(to_d)
                await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
                if to_d.done():
                    return await to_d
                # Whether P refuses is known now, and where it is.
                await to_p
                if self._addresses.get(prefill) == address:
                    return await to_d
                to_d.cancel()
                with suppress(asyncio.CancelledError):
                    return await to_d
            params = await to_p
            return await self._decode(request, decode, {**body, "kv_transfer_params": params}, headers)
        finally:
            # A client that goes away ends both legs.
            for each in legs:
                each.cancel()

    async def _prefill(self, url: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> Params | None:
        """What P says of the blocks that it holds; None if it cannot be reached, or fails.

        Raises:
            RefusedError: the request is at fault.
        """
        try:
            async with self._get_session().post(url + path, json=body, headers=headers) as answer:
                data = await answer.read()
        except aiohttp.ClientError as error:
            print(f"prefill leg: {url}: {error}; D prefills", file=sys.stderr, flush=True)
            return None
        if 400 <= answer.status < 500:
            raise RefusedError(answer.status, data)
        params = json.loads(data).get("kv_transfer_params") if answer.status == 200 else None
        if not isinstance(params, dict):
            return None
        self._addresses[url] = Address(str(params.get("remote_host")), int(params.get("remote_port", 0)))
        return params

    async def _decode(
        self, request: web.Request, url: str, body: dict[str, Any], headers: dict[str, str]
    ) -> web.StreamResponse:
        async with self._get_session().post(url + request.path, json=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the application has not started")
        return self._session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument("--decode", action="append", required=True, metavar="URL")
    parser.add_argument(
        "--transfer-mode",
        choices=("pull", "push"),
        help="who moves the KV cache: D, or P into blocks that D offers; as D's configuration says unless given",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    router = OverlapRouter(arguments.prefill, arguments.decode, arguments.transfer_mode)
    web.run_app(router.application(), host=arguments.host, port=arguments.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
