"""What the benchmarks of served requests measure: each system's instances and router, started and stopped, and one
request to it.

Everything runs on this machine, P in a network namespace of its own where there is a Link.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import Environment  # noqa: E402
from console import progress  # noqa: E402
from link import FAR_DEVICE, NEAR_DEVICE, Link  # noqa: E402
from serving import (  # noqa: E402
    HOST,
    Launch,
    Program,
    ServerSpec,
    ServingError,
    Started,
    free_port,
    members_of,
    overlap_router,
    pd_router,
    read_config,
    spawn,
    stop,
    vllm_server,
)

LOGS = ROOT / "logs" / "bench"
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENT = Environment(Path(sys.prefix))
VOCABULARY = range(3, 512)
OUTPUT_TOKENS = 32
NIXL_PACKAGES = "nixl==1.5.1 nixl-cu12==1.5.1"
NIXL_CONNECTORS = {"nixl": "NixlConnector", "nixl-pinned": "NixlConnector", "nixl-push": "NixlPushConnector"}
MOVERS = {"overlapped": "pull", "pushed": "push"}
"""Of the systems whose legs go to both at once."""
SYSTEMS = ("single", "datadist", *MOVERS, *NIXL_CONNECTORS)


@dataclass(frozen=True)
class Setting:
    """How the servers of a run are started."""

    model: Path
    chunk: int
    """Tokens of a prompt that are computed in one step."""
    link: Link | None = None
    pin: bool = False
    """Each instance on a core of its own."""


def available(systems: Sequence[str]) -> list[str]:
    """Without those whose packages are not installed."""
    if importlib.util.find_spec("nixl") is not None or not any(name in NIXL_CONNECTORS for name in systems):
        return list(systems)
    print(f"NIXL rows are left out: install them with  uv pip install --no-deps {NIXL_PACKAGES}")
    return [name for name in systems if name not in NIXL_CONNECTORS]


@contextmanager
def running(system: str, setting: Setting) -> Iterator[tuple[Program, list[Program]]]:
    """(what requests go to, the instances behind it, D the last)."""
    bin_dir, variables = ENVIRONMENT.directory / "bin", ENVIRONMENT.variables()
    servers = [server_of(spec, core, setting) for core, spec in enumerate(specs(system, setting))]
    routers = []
    if len(servers) == 2:
        prefill, decode = (server.url for server in servers)
        if system in MOVERS:
            routers.append(overlap_router(prefill, decode, bin_dir, LOGS, variables, MOVERS[system]))
        else:
            routers.append(pd_router([prefill], [decode], bin_dir, LOGS, variables))
    with started(system, servers, routers):
        if system in NIXL_CONNECTORS and system != "nixl-pinned":
            unpin(servers, setting.pin)
        yield (*servers, *routers)[-1], servers


def server_of(spec: ServerSpec, core: int, setting: Setting) -> Program:
    """`core`: its own one, where each has one."""
    launch: Launch = setting.link.launch if setting.link is not None and spec.host == setting.link.far else spawn
    if setting.pin:
        launch = on_core(core, launch)
    return vllm_server(spec, ENVIRONMENT.directory / "bin", LOGS, ENVIRONMENT.variables(), launch)


@contextmanager
def started(title: str, servers: Sequence[Program], routers: Sequence[Program] = ()) -> Iterator[None]:
    """Servers side by side, then their routers; all of them end with the block."""
    try:
        with progress(f"start {title}") as shown:
            for programs in (servers, routers):
                for program in programs:
                    program.start()
                for program in programs:
                    program.wait_ready(shown=shown)
        yield
    finally:
        stop(*servers, *routers)


def on_core(core: int, launch: Launch) -> Launch:
    def start(command: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO) -> Started:
        return launch(["taskset", "-c", str(core), *command], env, cwd, output)

    return start


def specs(system: str, setting: Setting) -> list[ServerSpec]:
    """One instance, or P and D."""
    if system == "single":
        return [ServerSpec("bench-single", setting.model, max_num_batched_tokens=setting.chunk)]
    return nixl_specs(system, setting) if system in NIXL_CONNECTORS else datadist_specs(setting)


def datadist_specs(setting: Setting) -> list[ServerSpec]:
    prefill, decode = (read_config(ROOT / "configs" / f"{name}.json") for name in ("prefill", "decode"))
    link = setting.link
    if link is not None:
        prefill["kv_connector_extra_config"] = {"host": link.far, "insecure": True}
        decode["kv_connector_extra_config"] = {"host": link.near, "insecure": True, "allowed_peers": [link.far]}
    hosts = (HOST, HOST) if link is None else (link.far, HOST)
    return [
        ServerSpec(f"bench-{name}", setting.model, config, max_num_batched_tokens=setting.chunk, host=host)
        for name, config, host in zip(("prefill", "decode"), (prefill, decode), hosts, strict=True)
    ]


def nixl_specs(system: str, setting: Setting) -> list[ServerSpec]:
    link = setting.link
    # Of each: role, address of its API, address of its side channel, device.
    sides = [("kv_producer", HOST, HOST, "lo"), ("kv_consumer", HOST, HOST, "lo")]
    if link is not None:
        sides = [("kv_producer", link.far, link.far, FAR_DEVICE), ("kv_consumer", HOST, link.near, NEAR_DEVICE)]
    return [
        ServerSpec(
            f"bench-{system}-{role}",
            setting.model,
            {"kv_connector": NIXL_CONNECTORS[system], "kv_role": role, "kv_buffer_device": "cpu"},
            max_num_batched_tokens=setting.chunk,
            variables={
                "UCX_TLS": "tcp",
                "UCX_NET_DEVICES": device,
                "VLLM_NIXL_SIDE_CHANNEL_HOST": address,
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            },
            host=host,
        )
        for role, host, address, device in sides
    ]


def unpin(servers: Sequence[Program], one_each: bool) -> None:
    """Allows every thread of each server on every core we may use ourselves, or on the server's own one."""
    for core, server in enumerate(servers):
        cores = {core} if one_each else os.sched_getaffinity(0)
        for pid in members_of(server.pid):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cores)


def send(server: Program, prompt: list[int], params: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """One streamed request, with these kv_transfer_params: seconds to the first token and to the end."""
    start = time.monotonic()
    with answered(server, prompt, params, max_tokens=OUTPUT_TOKENS, stream=True) as answer:
        first = 0.0
        for line in answer:
            if line.startswith(b"data:") and not first:
                first = time.monotonic() - start
        if not first:
            raise ServingError("the answer held no token")
        return first, time.monotonic() - start


def prefill(server: Program, prompt: list[int], params: Mapping[str, Any] | None = None) -> tuple[float, Any]:
    """A request for one token: seconds, and the answer's kv_transfer_params."""
    start = time.monotonic()
    with answered(server, prompt, params, max_tokens=1) as answer:
        text = answer.read()
    took = time.monotonic() - start
    return took, json.loads(text).get("kv_transfer_params")


@contextmanager
def answered(
    server: Program, prompt: list[int], params: Mapping[str, Any] | None, **fields: object
) -> Iterator[http.client.HTTPResponse]:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
    if params is not None:
        body["kv_transfer_params"] = params
    connection = http.client.HTTPConnection(server.host, server.port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServingError(f"answered {answer.status}: {answer.read().decode(errors='replace')}")
        yield answer
    finally:
        connection.close()
