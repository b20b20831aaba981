"""Ours beside another connector in vLLM's MultiConnector: each loads what is its own, neither disturbs the other.

The other one is vLLM's ExampleConnector, a store of KV cache files. OffloadingConnector, which people would use,
refuses the CPU platform ("CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"): with it see
integration/test_multi_scheduler.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import equality
import pytest
from support.client import Request, new_salt, prompt_tokens
from support.metrics import BYTES, EXTERNAL_HITS, FAILED, Change
from support.proxy import PDProxy
from support.reference import Reference
from support.servers import Pair, kv_transfer, make_server, running, spec_of


def beside_a_store(config: str, store: Path) -> dict[str, object]:
    ours = kv_transfer(config)
    shared = {"kv_role": ours["kv_role"], "kv_load_failure_policy": "fail"}
    other = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
        **shared,
    }
    children = {"connectors": [{**ours, **shared}, other]}
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": children, **shared}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("prefill", "decode")}


@pytest.fixture(scope="module")
def pair(stores: dict[str, Path]) -> Iterator[Pair]:
    # The store cannot load what was prefilled in chunks.
    whole = {"max_num_batched_tokens": 8192}
    started = Pair(
        *(make_server(spec_of(f"multi-{n}", "qwen3", beside_a_store(n, store), **whole)) for n, store in stores.items())
    )
    with running(*started.both):
        yield started


@pytest.mark.usefixtures("nothing_held_afterwards")
def test_each_child_loads_its_own(pair: Pair, reference: Reference, stores: dict[str, Path]) -> None:
    async def scenario() -> None:
        request = Request(prompt_tokens(700, seed=21), cache_salt=new_salt())
        change = Change(pair.decode.url)
        async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
            await equality.check_one(proxy.url, pair, reference, request)
        assert change.now(FAILED) == 0
        # What P prefilled is in its store: the same prompt again comes from there, and goes to D by us.
        assert any(stores["prefill"].iterdir())
        at_p, at_d = Change(pair.prefill.url), Change(pair.decode.url)
        again = Request(request.prompt, cache_salt=new_salt())
        async with PDProxy(pair.prefill.url, pair.decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, again)
        await reference.check(again, answer)
        await at_p.reaches(EXTERNAL_HITS, 600)
        assert at_p.now(BYTES) == 0
        await at_d.reaches(BYTES, 699 * equality.KV_BYTES_PER_TOKEN)

    asyncio.run(scenario())
