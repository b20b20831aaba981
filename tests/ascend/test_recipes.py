"""What vllm-ascend's documents and examples tell people to write works with us, or says why not."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ascend_vllm import SOURCES
from instance import Instance, make_config
from steps import prefill_all, prompt, run

from vllm_datadist_connector.config import parse_config
from vllm_datadist_connector.labels import Reason

MakeInstance = Callable[..., Instance]


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """Where, and the extra configuration of a P or a D; what a shell has to complete is left out."""
    for file in sorted(SOURCES.rglob("*")):
        if file.suffix not in (".md", ".sh", ".yaml", ".py", ".json"):
            continue
        text = file.read_text(errors="replace").replace("\\\n", "\n")
        for match in re.finditer(r'"kv_connector_extra_config"\s*:\s*(?=\{)', text):
            try:
                extra, _ = json.JSONDecoder().raw_decode(text, match.end())
            except ValueError:
                continue
            if "prefill" in extra:
                yield str(file.relative_to(SOURCES)), extra


def params_of(file: Path) -> Iterator[dict[str, Any]]:
    """What an example writes into a request as its kv_transfer_params."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        for target in node.targets:
            if isinstance(target, ast.Subscript) and ast.unparse(target.slice) == "'kv_transfer_params'":
                pairs = zip(node.value.keys, node.value.values, strict=True)
                yield {
                    ast.literal_eval(key): value.value if isinstance(value, ast.Constant) else "http://127.0.0.1:1/"
                    for key, value in pairs
                    if key is not None
                }


PARAMS = {
    f"{file.stem}-{index}": params
    for file in sorted((SOURCES / "examples").rglob("*.py"))
    for index, params in enumerate(params_of(file))
}
TO_P = {name: params for name, params in PARAMS.items() if params["do_remote_decode"]}
TO_D = {name: params for name, params in PARAMS.items() if params["do_remote_prefill"]}


def test_keys_of_recipes_are_taken() -> None:
    found = {}
    for where, extra in recipes():
        config = parse_config(extra)
        assert config.prefill is not None, where
        found[tuple(sorted(extra))] = where
    keys = {"prefill", "decode", "use_ascend_direct", "ascend_local_comm_res_path"}
    assert {key for each in found for key in each} == keys, "a recipe has a key that has not been looked at"


def test_sizes_of_a_recipe_that_are_not_ours(model: Path, make_instance: MakeInstance) -> None:
    """vllm-ascend checks them first, of the side that the instance is."""
    sizes = {"prefill": {"tp_size": 2, "dp_size": 1}, "decode": {"tp_size": 1, "dp_size": 1}}
    with pytest.raises(ValueError, match="KV transfer 'prefill' config has a conflicting tensor parallel size"):
        make_config(model, "kv_producer", extra=sizes)
    make_instance("kv_consumer", extra=sizes | {"use_ascend_direct": True})


def test_all_examples_have_been_looked_at() -> None:
    assert sorted(TO_P) == ["disagg_epd_proxy-0", "load_balance_proxy_server_example-0"]
    assert sorted(TO_D) == [
        "epd_load_balance_proxy_layerwise_server_example-0",
        "load_balance_proxy_layerwise_server_example-0",
    ]


@pytest.mark.parametrize("params", TO_P.values(), ids=TO_P)
def test_proxies_that_ask_p_first(make_instance: MakeInstance, params: dict[str, Any]) -> None:
    """They hand P's answer on as it is, by JSON."""
    p, d = make_instance("kv_producer"), make_instance("kv_consumer")
    (answer,) = prefill_all(p, {"r": prompt(0)}, params).values()
    d.add("r", prompt(0), json.loads(json.dumps(answer)), max_tokens=2)
    assert run(d)["r"][0].prefill_stats.num_computed_tokens == 1


@pytest.mark.parametrize("params", TO_D.values(), ids=TO_D)
def test_proxies_that_ask_d_first(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    """Theirs is another protocol, D calls the proxy for a P: ours computes the prompt itself, and says so."""
    d = make_instance("kv_consumer")
    said: list[Reason] = []
    monkeypatch.setattr(d.connector._scheduler._local, "note", lambda _, reason, __: said.append(reason))
    d.add("r", prompt(0), params, max_tokens=2)
    outputs = run(d)["r"]
    assert str(outputs[-1].finish_reason) == "length"
    assert outputs[0].prefill_stats.num_cached_tokens == 0
    assert said == [Reason.PARAMS]
