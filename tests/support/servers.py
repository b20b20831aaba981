"""Servers under test: `vllm serve` with the shipped kv-transfer configurations, started together, always ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bootstrap import Environment
from serving import Program, ServerSpec, pd_router, read_config, vllm_server

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
LOGS = ROOT / "logs" / "e2e"
ENVIRONMENT = Environment(Path(sys.prefix))


def kv_transfer(config: str, fields: Mapping[str, object] | None = None, **extra: object) -> dict[str, object]:
    """A shipped configuration with changes: `fields` of vLLM's, `extra` of ours (kv_connector_extra_config)."""
    merged = {**read_config(CONFIGS / f"{config}.json"), **(fields or {})}
    ours = merged.get("kv_connector_extra_config")
    merged["kv_connector_extra_config"] = {**(ours if isinstance(ours, dict) else {}), **extra}
    return merged


def make_server(spec: ServerSpec) -> Program:
    program = vllm_server(spec, ENVIRONMENT.directory / "bin", LOGS, ENVIRONMENT.variables())
    program.log.unlink(missing_ok=True)
    return program


def make_router(prefill: Sequence[Program], decode: Sequence[Program]) -> Program:
    program = pd_router(
        [server.url for server in prefill],
        [server.url for server in decode],
        ENVIRONMENT.directory / "bin",
        LOGS,
        ENVIRONMENT.variables(),
    )
    program.log.unlink(missing_ok=True)
    return program


@contextmanager
def running(*programs: Program) -> Iterator[None]:
    """Starts all at once, waits for each, and ends them whatever happens."""
    try:
        for program in programs:
            program.start()
        for program in programs:
            program.wait_ready()
        yield
    finally:
        for program in programs:
            program.stop()


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode instance that serve together."""

    prefill: Program
    decode: Program

    @property
    def both(self) -> tuple[Program, Program]:
        return self.prefill, self.decode
