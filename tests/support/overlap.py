"""The overlapping router of tools/ in the test's own event loop, once it knows where P's side channel is."""

from __future__ import annotations

from types import TracebackType

from aiohttp import web
from overlap_router import OverlapRouter

from support.client import Request, complete, new_salt, new_session, prompt_tokens


class OverlapProxy:
    """async with OverlapProxy(prefill_url, decode_url) as proxy: requests to proxy.url go to both at once."""

    def __init__(self, prefill_url: str, decode_url: str, mode: str | None = None) -> None:
        self._router = OverlapRouter([prefill_url], [decode_url], mode)

    async def __aenter__(self) -> OverlapProxy:
        self._runner = web.AppRunner(self._router.application(), handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        async with new_session() as session:
            # The first prompt goes to one after the other.
            first = await complete(session, self.url, Request(prompt_tokens(2, 0), 1, cache_salt=new_salt()))
        if not first.ok:
            raise RuntimeError(f"the first request failed: {first}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
