"""Servers under test: `vllm serve` with the shipped kv-transfer configurations, started together, always ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootstrap import Environment
from serving import SERVER_VARIABLES, Launch, Program, ServerSpec, pd_router, read_config, stop, vllm_server
from tiny_kinds import KINDS

from support.fork_client import ForkServer
from support.standin import STANDIN_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
CHUNK_TOKENS = 512
MODELS = ROOT / "models"
LOGS = ROOT / "logs" / "e2e"
ENVIRONMENT = Environment(Path(sys.prefix))
VARIABLES = ENVIRONMENT.variables()

# Of each kind of process that a server has: what it imports before it knows a model.
IMPORTED = (
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    str(Path(__file__).with_name("forked_vllm.py")),
)
# Not read before a server has its configuration, but for how the developers' mode logs errors.
LATE_VARIABLES = (
    "VLLM_CPU_CI_ENV",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    "VLLM_PLUGINS",
    "VLLM_SERVER_DEV_MODE",
    *STANDIN_VARIABLES,
)
fork = ForkServer(
    ENVIRONMENT.python,
    "vllm.entrypoints.cli.main:main",
    IMPORTED,
    {**VARIABLES, **SERVER_VARIABLES},
    LOGS / "fork-server.log",
    LATE_VARIABLES,
)
"""Starts `vllm serve` in two seconds. The same code runs as in a spawned server, but for its imports and for what
forked_vllm.py names."""


def kv_transfer(config: str, fields: Mapping[str, object] | None = None, **extra: object) -> dict[str, object]:
    """A shipped configuration with changes: `fields` of vLLM's, `extra` of ours (kv_connector_extra_config)."""
    merged = {**read_config(CONFIGS / f"{config}.json"), **(fields or {})}
    ours = merged.get("kv_connector_extra_config")
    merged["kv_connector_extra_config"] = {**(ours if isinstance(ours, dict) else {}), **extra}
    return merged


def make_server(spec: ServerSpec, launch: Launch = fork) -> Program:
    program = vllm_server(spec, ENVIRONMENT.directory / "bin", LOGS, VARIABLES, launch)
    program.log.unlink(missing_ok=True)
    return program


def make_router(prefill: Sequence[Program], decode: Sequence[Program]) -> Program:
    program = pd_router(
        [server.url for server in prefill],
        [server.url for server in decode],
        ENVIRONMENT.directory / "bin",
        LOGS,
        VARIABLES,
    )
    program.log.unlink(missing_ok=True)
    return program


def model_of(kind: str) -> Path:
    """The directory of a tiny model, made on this machine if no run before has made it: all kinds at once, because most
    of the time goes into imports."""
    directory = MODELS / f"tiny-{kind}"
    if not (directory / "origin.json").is_file():
        command = [str(ENVIRONMENT.python), str(ROOT / "tools" / "tiny_model.py"), str(MODELS), "--kind", "all"]
        subprocess.run(command, check=True, env=VARIABLES)
    return directory


def spec_of(name: str, kind: str, config: Mapping[str, object] | None, **settings: Any) -> ServerSpec:
    """A server of a tiny model, told what that kind of model needs."""
    model = KINDS[kind]
    arguments = (*model.arguments, *settings.pop("arguments", ()))
    # Small enough that the long prompts are prefilled in chunks, where the platform lets them.
    chunk = {"max_num_batched_tokens": CHUNK_TOKENS, **settings}
    return ServerSpec(name, model_of(kind), config, dtype=model.dtype, arguments=arguments, **chunk)


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
        stop(*programs)


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode instance that serve together."""

    prefill: Program
    decode: Program

    @property
    def both(self) -> tuple[Program, Program]:
        return self.prefill, self.decode
