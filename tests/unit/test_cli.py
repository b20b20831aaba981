"""`vllm-datadist key`, up to the engine that takes the key; what vLLM itself is told before it starts."""

from __future__ import annotations

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


def test_a_key_file_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth: .* cannot be read"):
        check_before_start({"auth": str(tmp_path / "absent")})


def test_vllm_asks_before_it_starts_a_process() -> None:
    """Where there are CUDA graphs to choose, which is while it makes its configuration."""
    from vllm_datadist_connector.connector import DataDistConnector

    assert DataDistConnector.requires_piecewise_for_cudagraph({}) is False
    with pytest.raises(ConfigError, match="did you mean 'lease_s'"):
        DataDistConnector.requires_piecewise_for_cudagraph({"lease": 5})
