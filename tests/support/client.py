"""Completion requests as the tests send them: token ids in, token ids out."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MODEL = "tiny"
# The tiny model's vocabulary without its three special tokens.
FIRST_TOKEN, VOCABULARY = 3, 512
REQUEST_DEADLINE_S = 120.0


def prompt_tokens(length: int, seed: int) -> list[int]:
    """A prompt that no other (length, seed) shares a first token with, but for chance."""
    source = random.Random(f"{length}/{seed}")
    return [source.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)]


def new_salt() -> str:
    """A cache_salt of its own keeps a request from hitting blocks that an earlier one left in a prefix cache."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Request:
    """One completion; greedy, so that two servers can be compared token for token."""

    prompt: Sequence[int]
    max_tokens: int = 16
    n: int = 1
    stream: bool = False
    ignore_eos: bool = True
    cache_salt: str | None = None
    stop_token_ids: Sequence[int] = ()
    seed: int = 0
    kv_transfer_params: object = None
    model: str = MODEL
    """Or an adapter of it."""

    def body(self) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": self.seed,
            "n": self.n,
            "stream": self.stream,
            "ignore_eos": self.ignore_eos,
            "return_token_ids": True,
        }
        if self.n > 1:
            # vLLM refuses n > 1 for greedy requests; the one most likely token is the same choice.
            body |= {"temperature": 1.0, "top_k": 1}
        if self.cache_salt is not None:
            body["cache_salt"] = self.cache_salt
        if self.stop_token_ids:
            body["stop_token_ids"] = list(self.stop_token_ids)
        if self.kv_transfer_params is not None:
            body["kv_transfer_params"] = self.kv_transfer_params
        return body


@dataclass
class Answer:
    """What came back: token ids and end of each choice, or the error's text."""

    status: int
    tokens: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    kv_transfer_params: dict[str, Any] | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error and "error" not in self.finish_reasons

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Takes in a whole answer or one event of a stream."""
        if "error" in chunk:
            self.error = json.dumps(chunk["error"])
            return
        for choice in chunk.get("choices", []):
            index = choice["index"]
            while len(self.tokens) <= index:
                self.tokens.append([])
                self.finish_reasons.append(None)
            self.tokens[index].extend(choice.get("token_ids") or [])
            self.finish_reasons[index] = choice.get("finish_reason") or self.finish_reasons[index]
        if chunk.get("kv_transfer_params") is not None:
            self.kv_transfer_params = chunk["kv_transfer_params"]


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    request: Request,
    headers: Mapping[str, str] | None = None,
    deadline_s: float = REQUEST_DEADLINE_S,
) -> Answer:
    """Sends one completion and reads its answer to the end; an HTTP error is an answer too."""
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    target = f"{url}/v1/completions"
    async with session.post(target, json=request.body(), headers=headers, timeout=timeout) as response:
        answer = Answer(status=response.status)
        if response.status != 200:
            answer.error = await response.text()
        elif request.stream:
            async for line in response.content:
                payload = line.decode().strip().removeprefix("data: ")
                if payload and payload != "[DONE]":
                    answer.add(json.loads(payload))
        else:
            answer.add(await response.json())
        return answer


async def complete_one(url: str, request: Request, deadline_s: float = REQUEST_DEADLINE_S) -> Answer:
    async with new_session() as session:
        return await complete(session, url, request, deadline_s=deadline_s)


def new_session() -> aiohttp.ClientSession:
    """A session without aiohttp's limit of 100 connections, which would queue a storm on the client's side.

    Each request has a connection of its own: a server closes an idle one after some seconds, and a request that is
    written to it at that moment fails without having been served.
    """
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
