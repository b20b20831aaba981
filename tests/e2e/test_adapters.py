"""LoRA adapters, whose KV is theirs alone: pulled where both ends have the same one, computed here where they have not.

P and D have one in common, and under another name each has one of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import equality
import numpy as np
import pytest
from safetensors.numpy import save_file
from serving import Program, ServerSpec
from support.client import MODEL, Request, new_salt, prompt_tokens
from support.metrics import BYTES, LOCAL_PREFILLS, Change
from support.proxy import PDProxy
from support.servers import Pair, kv_transfer, make_server, running

RANK = 4
SHARED, OWN = "shared", "own"


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Random weights, large enough to change most tokens of an answer."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hidden, head = config["hidden_size"], config["head_dim"]
    sizes = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    source, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            begin = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{begin}.lora_A.weight"] = source.normal(0, 1.0, (RANK, hidden)).astype(np.float32)
            tensors[f"{begin}.lora_B.weight"] = source.normal(0, 1.0, (size, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [make_adapter(folder / str(seed), tiny_model, seed) for seed in range(3)]

    def make(name: str, own: Path) -> Program:
        config = kv_transfer(name, {"kv_load_failure_policy": "fail"})
        modules = ("--lora-modules", f"{SHARED}={adapters[0]}", f"{OWN}={own}")
        arguments = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", *modules)
        return make_server(
            ServerSpec(f"{name}-adapted", tiny_model, config, arguments=arguments, kv_cache_bytes=128 << 20)
        )

    pair = Pair(make("prefill", adapters[1]), make("decode", adapters[2]))
    with running(*pair.both):
        yield pair


@pytest.mark.parametrize(("adapter", "is_pulled"), [(MODEL, True), (SHARED, True), (OWN, False)])
def test_an_adapter_is_told_by_its_files(adapted: Pair, adapter: str, is_pulled: bool) -> None:
    """The oracle is D alone."""
    prompt = prompt_tokens(300, seed=41)

    async def scenario() -> None:
        # Not in one batch, in which vLLM's CPU build was seen to give both the answer of one.
        requests = [Request(prompt, cache_salt=new_salt(), model=each) for each in (MODEL, adapter)]
        (base,), (alone,) = [await equality.send(adapted.decode.url, each) for each in requests]
        assert (alone.tokens == base.tokens) == (adapter == MODEL)
        change = Change(adapted.decode.url)
        async with PDProxy(adapted.prefill.url, adapted.decode.url) as proxy:
            (answer,) = await equality.send(proxy.url, Request(prompt, cache_salt=new_salt(), model=adapter))
        assert answer.ok, answer
        assert answer.tokens == alone.tokens
        if is_pulled:
            await change.reaches(BYTES, 299 * equality.KV_BYTES_PER_TOKEN)
        else:
            await change.reaches(LOCAL_PREFILLS, 1, reason="adapter")
        assert (change.now(BYTES) > 0) == is_pulled
        await equality.check_nothing_held(adapted)

    asyncio.run(scenario())
