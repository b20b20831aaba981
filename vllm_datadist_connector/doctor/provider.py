"""Whether the implementation of the LLM-DataDist API that the configuration asks for is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_datadist_connector.doctor.finding import Finding

_PATIENCE_S = 120.0
_TOLD = 400
_COMMAND = (sys.executable, "-m", "vllm_datadist_connector.doctor.probe")


class Probed(msgspec.Struct, frozen=True):
    """What probe.py told."""

    error: str = ""
    capabilities: dict[str, int | bool] = {}
    before: list[str] = []
    """Libraries that were loaded before the provider's."""
    after: list[str] = []
    torch_npu: str = ""
    """Why it cannot be imported, if it is there."""


def probe(provider: str, environ: Mapping[str, str], command: tuple[str, ...] = _COMMAND) -> Probed:
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            [*command, provider],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=dict(environ),
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return Probed(error=f"making an endpoint hangs: no answer in {_PATIENCE_S:.0f} s")
    try:
        return msgspec.json.decode(done.stdout, type=Probed)
    except msgspec.MsgspecError:
        said = done.stderr[-_TOLD:].decode(errors="replace").strip()
        return Probed(error=f"the process that makes an endpoint ended with status {done.returncode}: {said}")


def check_provider(provider: str, probed: Probed) -> Finding:
    if probed.error:
        do = "see the library's finding" if provider != "engine" else "reinstall the package"
        return Finding("provider", "wrong", f"{provider}: {probed.error}", do)
    told: dict[str, Any] = {name: value for name, value in probed.capabilities.items() if value}
    return Finding("provider", "ok", f"{provider}: {json.dumps(told)}")
