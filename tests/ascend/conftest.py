"""Tests inside vllm-ascend: tests/ascend_vllm.py runs them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.standin import standin_variables

if TYPE_CHECKING:
    from instance import Instance

HAS_VLLM_ASCEND = importlib.util.find_spec("vllm_ascend") is not None
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}

if HAS_VLLM_ASCEND:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A plain `pytest` in an environment without vllm-ascend finds nothing here."""
    del collection_path
    return None if HAS_VLLM_ASCEND else True


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


@pytest.fixture
def make_instance(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Instance]]:
    """Instance(...) over the library that stands in for CANN's, at its strictest; closed after the test."""
    from instance import Instance
    from shapes import dense

    for name, value in standin_variables(strict=1).items():
        monkeypatch.setenv(name, value)
    made: list[Instance] = []

    def make(role: str, layout: Any = None, **settings: Any) -> Instance:
        made.append(Instance(model, layout or dense(), role, **settings))
        return made[-1]

    yield make
    for instance in reversed(made):
        instance.close()
