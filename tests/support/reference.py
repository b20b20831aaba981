"""What one plain instance answers: the oracle of every end-to-end comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from support.client import Answer, Request, complete_one, new_salt


class Reference:
    """Answers of the plain instance, each computed once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._known: dict[object, Answer] = {}

    async def answer(self, request: Request) -> Answer:
        key = (tuple(request.prompt), request.max_tokens, request.n, request.ignore_eos, tuple(request.stop_token_ids))
        if key not in self._known:
            plain = replace(request, stream=False, kv_transfer_params=None, cache_salt=new_salt())
            answer = await complete_one(self._url, plain)
            if not answer.ok:
                raise AssertionError(f"the reference failed: {answer}")
            self._known[key] = answer
        return self._known[key]

    async def check(self, request: Request, answer: Answer) -> None:
        """AssertionError unless `answer` is complete and equal, token for token, choice for choice."""
        if not answer.ok:
            raise AssertionError(f"{len(request.prompt)} tokens: no answer but {answer}")
        expected = await self.answer(request)
        if answer.tokens != expected.tokens:
            raise AssertionError(f"{len(request.prompt)} tokens: {answer.tokens} instead of {expected.tokens}")

    async def check_all(self, requests: Iterable[Request], answers: Iterable[Answer]) -> None:
        """check() of each; the plain instance computes what it does not know yet at once."""
        await asyncio.gather(*(self.check(*each) for each in zip(requests, answers, strict=True)))

    async def check_right_or_failed(self, request: Request, answer: Answer) -> None:
        """For a request that was interfered with: it may fail, but a wrong answer is never right."""
        if answer.ok:
            await self.check(request, answer)
