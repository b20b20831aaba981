"""What is to be started: the connector's configuration, and what matters of `vllm serve`'s other arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec.structs

from vllm_datadist_connector.config import ConfigError, ConnectorConfig, parse_config
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.duties import Duties, duties_of
from vllm_datadist_connector.plugin import NAME
from vllm_datadist_connector.side_channel.endpoint import Trust

ROLES = ("kv_producer", "kv_consumer", "kv_both")
_NIXL_MODULE = "vllm_datadist_connector.nixl"
_SWITCHES = frozenset({"enable-sleep-mode", "enable-return-routed-experts"})
_SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size",
}


@dataclass(frozen=True, slots=True)
class Serve:
    """Arguments of `vllm serve`, by their long names with dashes."""

    model: str = ""
    flags: dict[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.flags

    def count(self, name: str) -> int:
        """A number of ranks; 1 where it is not given or none: vLLM itself refuses it."""
        text = self.flags.get(name, "1")
        return int(text) if text.isdecimal() and int(text) else 1

    @property
    def ranks(self) -> int:
        """Worker ranks of the instance, each with a port of its own."""
        sizes = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
        product = 1
        for name in sizes:
            product *= self.count(name)
        return product


def parse_serve(command: Sequence[str]) -> Serve:
    """Of `vllm serve MODEL ...`, or its arguments alone; what is not known is passed over."""
    rest = list(command)
    if "serve" in rest[:2]:
        rest = rest[rest.index("serve") + 1 :]
    model = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    flags: dict[str, str] = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name.lstrip("-").replace("_", "-"))
        if not equals and name not in _SWITCHES and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        flags[name] = value
    return Serve(model or flags.get("model", ""), flags)


@dataclass(frozen=True, slots=True)
class Deployment:
    serve: Serve
    config: ConnectorConfig
    """The defaults where none was given, or it is wrong."""
    role: str
    """Empty if not known."""
    is_given: bool
    given: frozenset[str] = frozenset()
    """Keys of the configuration that are not left to their defaults."""

    @property
    def trust(self) -> Trust:
        return Trust(self.config.auth, self.config.insecure)

    @property
    def duties(self) -> Duties:
        """All where the role is not known."""
        return duties_of(self.role or "kv_both", self.config)

    @property
    def pulls(self) -> bool:
        return self.duties.takes


def understand(config: str | None, serve: Serve) -> tuple[Deployment, Finding]:
    """
    Args:
        config: vLLM's --kv-transfer-config, or the path of a file with it; else it is looked for in `serve`.
    """
    name = "configuration"
    text = config if config is not None else serve.flags.get("kv-transfer-config")
    try:
        whole = _load(text) if text is not None else {"kv_connector": NAME}
        ours = _ours(whole)
        parsed = parse_config(ours.get("kv_connector_extra_config"))
    except (ConfigError, TypeError) as error:
        do = "correct it: vLLM would not start, or start without the connector"
        return Deployment(serve, ConnectorConfig(), "", text is not None), Finding(name, "wrong", str(error), do)
    if text is None:
        nothing = "none was given: what follows is of the defaults"
        do = "give it by --config, or put `vllm-datadist doctor --` before the whole command of `vllm serve`"
        return Deployment(serve, parsed, "", False), Finding(name, "not_applicable", nothing, do)
    given = frozenset(ours.get("kv_connector_extra_config") or ())
    role = str(ours.get("kv_role", whole.get("kv_role")))
    if role not in ROLES:
        found = f"kv_role: {role!r}, allowed: {', '.join(ROLES)}"
        return Deployment(serve, parsed, "", True, given), Finding(name, "wrong", found, "give one of them")
    try:
        duties_of(role, parsed)
    except ConfigError as error:
        parsed = msgspec.structs.replace(parsed, role_switch=False)
        do = "correct it: vLLM would not start"
        return Deployment(serve, parsed, role, True, given), Finding(name, "wrong", str(error), do)
    return Deployment(serve, parsed, role, True, given), Finding(name, "ok", f"{role}, host {parsed.host}")


def _load(text: str) -> dict[str, Any]:
    if not text.strip():
        # What a shell makes of $(cat FILE) for a file that is not there: vLLM then starts without a connector.
        raise ConfigError("--kv-transfer-config is empty")
    if not text.lstrip().startswith(("{", "[")):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"neither JSON nor a file that can be read: {error}") from None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--kv-transfer-config: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("--kv-transfer-config: not a JSON object")
    return config


def _ours(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of our connector: itself, or one that MultiConnector has."""
    extra = config.get("kv_connector_extra_config")
    inner = extra.get("connectors") if isinstance(extra, dict) else None
    for each in (config, *(inner if isinstance(inner, list) else ())):
        if isinstance(each, dict) and (
            each.get("kv_connector") == NAME or each.get("kv_connector_module_path") == _NIXL_MODULE
        ):
            return each
    raise ConfigError(f"kv_connector: {config.get('kv_connector')!r}, not {NAME!r}")


def check_serve(serve: Serve) -> list[Finding]:
    """Options of vLLM's that exclude the connector."""
    name = "options of vllm serve"
    if not serve.flags:
        return [Finding(name, "not_applicable", "not known", "put `vllm-datadist doctor --` before the command")]
    findings = [
        Finding(name, "wrong", f"--{flag} {serve.count(flag)}", "leave it out: it is not supported")
        for flag in ("decode-context-parallel-size", "prefill-context-parallel-size")
        if serve.count(flag) > 1
    ]
    if serve.has("enable-sleep-mode"):
        found = "--enable-sleep-mode unmaps the KV cache, which peers read by its addresses"
        findings.append(Finding(name, "wrong", found, "leave it out"))
    if serve.has("enable-return-routed-experts"):
        found = "--enable-return-routed-experts: a prompt's experts do not come with its KV cache"
        findings.append(Finding(name, "wrong", found, "leave it out"))
    if serve.has("config"):
        found = f"--config {serve.flags['config']} is not read here"
        findings.append(Finding(name, "warning", found, "give its settings as arguments to have them checked"))
    return findings or [Finding(name, "ok", "none that excludes the connector")]
