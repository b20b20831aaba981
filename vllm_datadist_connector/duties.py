"""Duties: what an instance does for others. Everything that asks for vLLM's kv_role asks here."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_datadist_connector.config import ConfigError, ConnectorConfig


@dataclass(frozen=True, slots=True)
class Duties:
    gives: bool
    """It keeps blocks for others to read."""
    takes: bool
    """It reads those of others."""

    @property
    def both(self) -> bool:
        return self.gives and self.takes


def duties_of(kv_role: str | None, config: ConnectorConfig) -> Duties:
    """Those that the instance may ever have; with role_switch it may have fewer at a time.

    Raises:
        ConfigError: the role excludes what the configuration asks for.
    """
    if config.role_switch and kv_role != "kv_both":
        raise ConfigError(
            f"role_switch: true, kv_role is {kv_role!r}; allowed: kv_both, from which `vllm-datadist role` makes either"
        )
    return Duties(
        gives=kv_role in ("kv_producer", "kv_both") or config.bidirectional,
        takes=kv_role in ("kv_consumer", "kv_both") or config.bidirectional,
    )
