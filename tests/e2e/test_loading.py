"""Other ways to load and to use the connector: by module path with plugins off, under either name, and kv_both on both
sides."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import equality
import pytest
from serving import ServerSpec
from support.client import Request, new_salt, prompt_tokens
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running

pytestmark = pytest.mark.usefixtures("nothing_held_afterwards")

OURS = {"kv_connector_module_path": "vllm_datadist_connector.connector"}
AS_ROUTERS_KNOW_IT = {"kv_connector": "NixlConnector", "kv_connector_module_path": "vllm_datadist_connector.nixl"}
NO_PLUGINS = {"VLLM_PLUGINS": "none"}  # an allow-list that names no plugin


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    specs = [
        ServerSpec(name, tiny_model, kv_transfer("both", module), variables=NO_PLUGINS)
        for name, module in (("by-path-one", OURS), ("by-path-two", AS_ROUTERS_KNOW_IT))
    ]
    started = Pair(*(make_server(spec) for spec in specs))
    with running(*started.both):
        yield started


@pytest.mark.parametrize("swapped", [False, True], ids=["one_to_two", "two_to_one"])
def test_both_roles(pair: Pair, reference: Reference, swapped: bool) -> None:
    """Each instance prefills for the other."""
    directed = Pair(pair.decode, pair.prefill) if swapped else pair

    async def scenario() -> None:
        async with PDProxy(directed.prefill.url, directed.decode.url) as proxy:
            for length in (1, 129, 700):
                request = Request(prompt_tokens(length, seed=1 + swapped), cache_salt=new_salt())
                await equality.check_one(proxy.url, directed, reference, request)

    asyncio.run(scenario())


def test_both_directions_at_once(pair: Pair, reference: Reference) -> None:

    async def scenario() -> None:
        forth = PDProxy(pair.prefill.url, pair.decode.url)
        back = PDProxy(pair.decode.url, pair.prefill.url)
        async with forth, back:
            await asyncio.gather(
                equality.check_storm(forth.url, pair, reference, count=12),
                equality.check_storm(back.url, Pair(pair.decode, pair.prefill), reference, count=12),
            )

    asyncio.run(scenario())
