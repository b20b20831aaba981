"""`vllm-datadist key`, up to the engine that takes the key; `check`, and what vLLM itself is told before it starts."""

from __future__ import annotations

import importlib.util
import json
import stat
from pathlib import Path

import pytest

from vllm_datadist_connector import _native
from vllm_datadist_connector.cli import main
from vllm_datadist_connector.config import ConfigError, check_before_start


def test_a_new_key_is_one_that_the_engine_takes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert main(["key", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    datadist = _native.LlmDataDist(1, 1)
    options = {"llm.DeviceId": "0", "llm.ListenIpInfo": "0.0.0.0:0", "datadist.AuthKeyFile": str(path)}
    assert datadist.initialize(options) == 0, _native.last_error()
    datadist.finalize()


def test_keys_differ(tmp_path: Path) -> None:
    for name in "ab":
        main(["key", str(tmp_path / name)])
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()


def test_a_key_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"
    path.write_text("in use")
    assert main(["key", str(path)]) == 1
    assert path.read_text() == "in use"
    assert "File exists" in capsys.readouterr().err


GOOD = {"kv_connector": "DataDistConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize("arguments", [[], [json.dumps(GOOD)]])
def test_nothing_to_say(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["check", *arguments]) == 0


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("", "--kv-transfer-config is empty"),
        ("{", "--kv-transfer-config: "),
        ("[]", "--kv-transfer-config: not a JSON object"),
        (
            json.dumps(GOOD | {"kv_connector": "NixlConnector"}),
            "kv_connector: 'NixlConnector', not 'DataDistConnector'",
        ),
        (json.dumps(GOOD | {"kv_role": "both"}), "kv_role: 'both', allowed: kv_producer, kv_consumer, kv_both"),
        (
            json.dumps(GOOD | {"kv_connector_extra_config": {"lease": 5}}),
            "unknown key 'lease'; did you mean 'lease_s'?",
        ),
    ],
)
def test_what_is_wrong_is_told(config: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", config]) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("allowed", ["", "none", "datadist2,other", "other, datadist"])
def test_vllm_plugins_is_named(
    allowed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert main(["check"]) == 1
    assert f"VLLM_PLUGINS is {allowed!r}" in capsys.readouterr().out
    monkeypatch.setenv("VLLM_PLUGINS", "other,datadist")
    assert main(["check"]) == 0


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("vllm_datadist_connector.cli.entry_points", lambda **_: ())
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["check", json.dumps(GOOD)]) == 1
    vllm, plugin, native = capsys.readouterr().out.splitlines()
    assert vllm.startswith("vllm is not installed in")
    assert "is no plugin of vLLM here" in plugin
    assert "without its native library" in native


def test_a_key_file_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth: .* cannot be read"):
        check_before_start({"auth": str(tmp_path / "absent")})


def test_vllm_asks_before_it_starts_a_process() -> None:
    """Where there are CUDA graphs to choose, which is while it makes its configuration."""
    from vllm_datadist_connector.connector import DataDistConnector

    assert DataDistConnector.requires_piecewise_for_cudagraph({}) is False
    with pytest.raises(ConfigError, match="did you mean 'lease_s'"):
        DataDistConnector.requires_piecewise_for_cudagraph({"lease": 5})
