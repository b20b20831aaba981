"""What a model is to its peers: which settings tell two apart, and where weights have an identity."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import make, write
from support.pd import make_contract
from transformers import PretrainedConfig

from vllm_datadist_connector.protocol.contract import MAX_SETTINGS, find_mismatches
from vllm_datadist_connector.worker.model_identity import identify_weights, settings_of, software

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "layer_types": ["full_attention"] * 40,
    "text": {"head_dim": 16},
}


def model_config(config: dict[str, Any], **vllms: Any) -> Any:
    hf_config = PretrainedConfig(**config)
    values: dict[str, Any] = {
        "hf_config": hf_config,
        "hf_text_config": hf_config,
        "dtype": "torch.bfloat16",
        "quantization": None,
        "disable_sliding_window": False,
        "max_model_len": 8192,
    }
    return SimpleNamespace(**(values | vllms))


def differing(config: dict[str, Any], **vllms: Any) -> list[str]:
    ours, theirs = (
        make_contract(settings=settings_of(each)) for each in (model_config(BASE), model_config(config, **vllms))
    )
    return find_mismatches(ours, theirs)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 32}, "hidden_size: ours 64, theirs 32"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: ours 1e-06, theirs 1e-05"),
        ({"sliding_window": 128}, "sliding_window: ours null, theirs 128"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
            "rope_parameters.rope_theta: ours 10000, theirs 500000",
        ),
        (
            {"rope_parameters": {**BASE["rope_parameters"], "factor": 4.0}},
            "rope_parameters.factor: ours not listed, theirs 4",
        ),
        ({"text": {"head_dim": 32}}, "text.head_dim: ours 16, theirs 32"),
    ],
)
def test_a_setting_is_named_with_both_values(change: dict[str, Any], told: str) -> None:
    assert differing({**BASE, **change}) == [told]


def test_long_values_are_told_apart() -> None:
    types = ["full_attention"] * 39 + ["sliding_attention"]
    (line,) = differing({**BASE, "layer_types": types})
    assert line.startswith("layer_types: ours #")


@pytest.mark.parametrize(
    ("vllms", "told"),
    [
        ({"dtype": "torch.float16"}, "vllm.dtype: ours torch.bfloat16, theirs torch.float16"),
        ({"quantization": "fp8"}, "vllm.quantization: ours None, theirs fp8"),
        ({"disable_sliding_window": True}, "vllm.disable_sliding_window: ours False, theirs True"),
    ],
)
def test_what_vllm_decides(vllms: dict[str, Any], told: str) -> None:
    assert differing(BASE, **vllms) == [told]


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "/elsewhere", "transformers_version": "4.0", "architectures": ["X"]},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"eos_token_id": 7, "use_cache": False, "initializer_range": 0.5},
        {"text": {"head_dim": 16, "dtype": "float32"}},
    ],
    ids=["names", "whole number", "after the cache", "nested"],
)
def test_what_cannot_matter_may_differ(change: dict[str, Any]) -> None:
    assert differing({**BASE, **change}) == []


def test_longest_prompt_matters_only_where_it_chooses_the_rope() -> None:
    assert differing(BASE, max_model_len=4096) == []
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **factors}
    long = {"rope_parameters": rope, "hidden_size": 64, "num_attention_heads": 4}
    settings = [settings_of(model_config(long, max_model_len=length)) for length in (4096, 4097, 9000)]
    assert settings[0] != settings[1] == settings[2]


def test_any_number_of_settings_fits() -> None:
    many = {f"s{index}": index for index in range(MAX_SETTINGS * 2)}
    first, second = (settings_of(model_config({**many, "s999": last})) for last in (1, 2))
    assert len(first) == len(second) == MAX_SETTINGS
    assert first != second


def test_software_is_that_of_every_build_of_a_release() -> None:
    assert "+" not in software()


def vllm_config(model: Path | str, load_format: str = "auto", **changes: Any) -> Any:
    model_config = SimpleNamespace(model=str(model), revision=None, model_weights="")
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**vars(model_config), **changes}),
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
    )


@pytest.mark.parametrize(
    ("files", "load_format", "scheme"),
    [
        (["model.safetensors"], "auto", "tensors"),
        (["model.safetensors"], "runai_streamer", "tensors"),
        (["consolidated.safetensors"], "auto", "consolidated"),
        (["consolidated.safetensors", "model.safetensors"], "auto", "tensors"),
        (["consolidated.safetensors", "model.safetensors"], "mistral", "consolidated"),
        (["pytorch_model.bin"], "auto", "files"),
        (["model.pt"], "pt", "files"),
        (["model.safetensors"], "dummy", "dummy"),
        ([], "auto", ""),
        (["model.safetensors"], "tensorizer", ""),
        (["model.safetensors"], "sharded_state", ""),
    ],
)
def test_identity_of_weights(tmp_path: Path, files: list[str], load_format: str, scheme: str) -> None:
    for name in files:
        write(tmp_path / name, make())
    assert identify_weights(vllm_config(tmp_path, load_format), "").partition(":")[0] == scheme


def test_files_that_the_index_does_not_name_are_copies(tmp_path: Path) -> None:
    write(tmp_path / "model-1.safetensors", make())
    before = identify_weights(vllm_config(tmp_path), "")
    write(tmp_path / "old.safetensors", make(seed=2))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert identify_weights(vllm_config(tmp_path), "") == before


def test_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" * 100)
    assert identify_weights(vllm_config(path, "gguf"), "").startswith("file:")


@pytest.mark.parametrize(
    ("model", "changes"),
    [("no/such-model", {}), ("/nowhere/at/all", {}), (".", {"model_weights": "s3://bucket/model"})],
)
def test_unknown_weights_cost_a_word_and_no_start(
    caplog: pytest.LogCaptureFixture, model: str, changes: dict[str, Any]
) -> None:
    assert identify_weights(vllm_config(model, **changes), "") == ""
    assert "give 'weights_id'" in caplog.text


def test_the_operator_has_the_last_word() -> None:
    assert identify_weights(vllm_config("no/such-model"), "release 7") == "given:release 7"
