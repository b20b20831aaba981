"""Whether the implementation of the LLM-DataDist API that the configuration asks for is there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_datadist_connector.config import ConfigError
from vllm_datadist_connector.doctor.deployment import Deployment
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
        do = "do what it says" if provider != "engine" else "reinstall the package"
        return Finding("provider", "wrong", f"{provider}: {probed.error}", do)
    told: dict[str, Any] = {name: value for name, value in probed.capabilities.items() if value}
    return Finding("provider", "ok", f"{provider}: {json.dumps(told)}")


def adapt(deployment: Deployment, probed: Probed, environ: Mapping[str, str]) -> tuple[Deployment, list[Finding]]:
    """The deployment with the time limits that a worker will have, and what the provider cannot follow."""
    if probed.error:
        return deployment, []
    from vllm_datadist_connector._native import Capabilities
    from vllm_datadist_connector.worker.options import adapt_config

    name = "options of the provider"
    try:
        told: Any = probed.capabilities
        is_both = bool(deployment.role) and deployment.duties.both
        config = adapt_config(deployment.config, deployment.given, Capabilities(**told), environ, is_both)
    except ConfigError as error:
        return deployment, [Finding(name, "wrong", str(error), "correct it: vLLM would not start")]
    limits = f"link_timeout_s {config.link_timeout_s:g}, pull_timeout_s {config.pull_timeout_s:g}"
    return dataclasses.replace(deployment, config=config), [Finding(name, "ok", f"all can be followed; {limits}")]
