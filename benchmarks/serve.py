#!/usr/bin/env python3
"""Time to first token and latency of prefill/decode beside a single instance and vLLM's NixlConnector.

    .venv/bin/python benchmarks/serve.py [--lengths 128,1024,4096] [--requests 20] [--rounds 2] [--link-rate 1gbit]

Everything runs on this machine, with one tiny model, in one run: each round starts each system afresh, in rotating
order, so that none profits from a warmer or quieter machine. Requests go one at a time, through vllm-router where
there are two instances, each with a prompt of its own. Results: a table, and JSON and PNG in benchmarks/results.

"datadist" is one leg after the other, through vllm-router; "overlapped" both legs at once, through
tools/overlap_router.py: of it the table also says which share of the KV cache came while P was still computing.
`--link-rate` puts P into a network namespace of its own, behind a link of that rate (as tc writes it): it takes root,
and NIXL is left out.

NixlConnector pins the worker's threads to the last core on CPU, which starves a machine of two cores; "nixl" is the
same server with every thread allowed on every core again, "nixl-pinned" (--systems) the server as it comes.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import Environment  # noqa: E402
from console import progress  # noqa: E402
from link import Link, throttled  # noqa: E402
from scrape import Metrics, scrape  # noqa: E402
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
OUTPUT_TOKENS = 32
WARM_UP_REQUESTS = 3
VOCABULARY = range(3, 512)
NIXL_PACKAGES = "nixl==1.5.1 nixl-cu12==1.5.1"
NIXL_VARIABLES = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST}
SYSTEMS = ("single", "datadist", "overlapped", "nixl", "nixl-pinned")


@dataclass(frozen=True)
class Timing:
    """One request."""

    system: str
    prompt_tokens: int
    first_token_s: float
    latency_s: float
    early_share: float
    """Of all requests of that length, in one round."""


@dataclass(frozen=True)
class Row:
    """All requests of one system and length."""

    system: str
    prompt_tokens: int
    requests: int
    first_token_p50_ms: float
    first_token_p90_ms: float
    latency_p50_ms: float
    latency_p90_ms: float
    early_share: float
    """Of the bytes that D pulled, how much came before P's prefill was done."""


def main() -> int:
    arguments = parse_arguments()
    systems = list(arguments.systems)
    if any(name.startswith("nixl") for name in systems) and importlib.util.find_spec("nixl") is None:
        print(f"NIXL rows are left out: install them with  uv pip install --no-deps {NIXL_PACKAGES}")
        systems = [name for name in systems if not name.startswith("nixl")]
    if arguments.link_rate:
        systems = [name for name in systems if not name.startswith("nixl")]
    timings: list[Timing] = []
    source = random.Random(1)
    with throttled(arguments.link_rate) if arguments.link_rate else nullcontext() as link:
        for number in range(arguments.rounds):
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                print(f"round {number + 1} of {arguments.rounds}: {system}", flush=True)
                timings += measure_system(system, arguments, source, link)
    rows = summarize(timings)
    print_table(rows)
    save(rows, timings)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-qwen3")
    parser.add_argument("--lengths", type=numbers, default=[128, 1024, 4096], help="prompt lengths in tokens")
    parser.add_argument("--requests", type=int, default=20, help="requests per length, round and system")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt that are computed in one step")
    parser.add_argument("--link-rate", default="", help="of the link between P and D, such as 1gbit")
    parser.add_argument("--pin", action="store_true", help="P on one core and D on another, as if on two machines")
    parser.add_argument("--systems", type=names, default=["single", "datadist", "overlapped", "nixl"])
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model: {arguments.model} is not there; tools/demo.py makes the default one")
    return arguments


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    wanted = text.split(",")
    unknown = set(wanted) - set(SYSTEMS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; there are {', '.join(SYSTEMS)}")
    return wanted


def measure_system(
    system: str, arguments: argparse.Namespace, source: random.Random, link: Link | None
) -> list[Timing]:
    with running(system, arguments.model.resolve(), arguments.chunk, link, arguments.pin) as (entry, servers):
        if system == "nixl":
            unpin(servers)
        return measure(system, entry, servers[-1], arguments, source)


@contextmanager
def running(
    system: str, model: Path, chunk: int, link: Link | None, pin: bool
) -> Iterator[tuple[Program, list[Program]]]:
    """(what requests go to, the instances behind it, D the last)."""
    bin_dir, variables = ENVIRONMENT.directory / "bin", ENVIRONMENT.variables()
    servers = []
    for core, spec in enumerate(specs(system, model, chunk, link)):
        launch = link.launch if link is not None and spec.host == link.far else spawn
        servers.append(vllm_server(spec, bin_dir, LOGS, variables, on_core(core, launch) if pin else launch))
    programs = list(servers)
    if system == "overlapped":
        programs.append(overlap_router(servers[0].url, servers[1].url, bin_dir, LOGS, variables))
    elif len(servers) == 2:
        programs.append(pd_router([servers[0].url], [servers[1].url], bin_dir, LOGS, variables))
    try:
        with progress(f"start {system}") as shown:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready(shown=shown)
            for program in programs[len(servers) :]:
                program.start()
                program.wait_ready(shown=shown)
        yield programs[-1], servers
    finally:
        stop(*programs)


def on_core(core: int, launch: Launch) -> Launch:
    def start(command: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO) -> Started:
        return launch(["taskset", "-c", str(core), *command], env, cwd, output)

    return start


def specs(system: str, model: Path, chunk: int, link: Link | None) -> list[ServerSpec]:
    if system == "single":
        return [ServerSpec("bench-single", model, max_num_batched_tokens=chunk)]
    if system in ("datadist", "overlapped"):
        prefill, decode = (read_config(ROOT / "configs" / f"{name}.json") for name in ("prefill", "decode"))
        hosts = (HOST, HOST) if link is None else (link.far, HOST)
        if link is not None:
            prefill["kv_connector_extra_config"] = {"host": link.far, "insecure": True}
            decode["kv_connector_extra_config"] = {
                "host": link.near,
                "insecure": True,
                "allowed_peers": [link.far],
            }
        return [
            ServerSpec(f"bench-{name}", model, config, max_num_batched_tokens=chunk, host=host)
            for name, config, host in zip(("prefill", "decode"), (prefill, decode), hosts, strict=True)
        ]
    config = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}
    return [
        ServerSpec(
            f"bench-nixl-{role}",
            model,
            {**config, "kv_role": role},
            max_num_batched_tokens=chunk,
            variables={**NIXL_VARIABLES, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
        )
        for role in ("kv_producer", "kv_consumer")
    ]


def unpin(servers: list[Program]) -> None:
    """Allows every thread of the servers on every core we may use ourselves."""
    cores = os.sched_getaffinity(0)
    for server in servers:
        for pid in members_of(server.pid):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), cores)


def measure(
    system: str, entry: Program, decode: Program, arguments: argparse.Namespace, source: random.Random
) -> list[Timing]:
    timings = []
    with progress(f"measure {system}") as shown:
        for length in arguments.lengths:
            times, before = [], scrape(decode.url)
            for number in range(WARM_UP_REQUESTS + arguments.requests):
                prompt = source.choices(VOCABULARY, k=length)
                took = send(entry.port, prompt)
                if number >= WARM_UP_REQUESTS:
                    times.append(took)
                shown.tick()
            early = early_share(before, scrape(decode.url))
            timings += [Timing(system, length, first, whole, early) for first, whole in times]
    return timings


def early_share(before: Metrics, after: Metrics) -> float:
    early, moved = (
        after.total(name) - before.total(name)
        for name in ("vllm:datadist_early_bytes", "vllm:datadist_bytes_transferred_sum")
    )
    return early / moved if moved else 0.0


def send(port: int, prompt: list[int]) -> tuple[float, float]:
    """One streamed request: seconds to the first token and to the end."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    try:
        start = time.monotonic()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServingError(f"answered {answer.status}: {answer.read().decode(errors='replace')}")
        first = 0.0
        for line in answer:
            if line.startswith(b"data:") and not first:
                first = time.monotonic() - start
        if not first:
            raise ServingError("the answer held no token")
        return first, time.monotonic() - start
    finally:
        connection.close()


def summarize(timings: list[Timing]) -> list[Row]:
    groups: dict[tuple[int, str], list[Timing]] = {}
    for timing in timings:
        groups.setdefault((timing.prompt_tokens, timing.system), []).append(timing)
    rows = []
    for (length, system), group in sorted(groups.items()):
        first = sorted(timing.first_token_s * 1e3 for timing in group)
        whole = sorted(timing.latency_s * 1e3 for timing in group)
        p90 = (len(group) * 9 - 1) // 10
        rows.append(
            Row(
                system,
                length,
                len(group),
                statistics.median(first),
                first[p90],
                statistics.median(whole),
                whole[p90],
                statistics.fmean(timing.early_share for timing in group),
            )
        )
    return rows


def print_table(rows: list[Row]) -> None:
    print(f"\n{'':8}{'':18}{'time to first token':>24}{'latency':>24}")
    print(
        f"{'tokens':>8}  {'system':<16}{'p50 ms':>12}{'p90 ms':>12}{'p50 ms':>12}{'p90 ms':>12}{'requests':>10}"
        f"{'early':>8}"
    )
    for row in rows:
        print(
            f"{row.prompt_tokens:>8}  {row.system:<16}{row.first_token_p50_ms:>12.1f}{row.first_token_p90_ms:>12.1f}"
            f"{row.latency_p50_ms:>12.1f}{row.latency_p90_ms:>12.1f}{row.requests:>10}{row.early_share:>8.0%}"
        )


def save(rows: list[Row], timings: list[Timing]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    data = {
        "output_tokens": OUTPUT_TOKENS,
        "cores": len(os.sched_getaffinity(0)),
        "rows": [asdict(row) for row in rows],
        "timings": [asdict(timing) for timing in timings],
    }
    target = RESULTS / "serve.json"
    target.write_text(json.dumps(data, indent=1), encoding="utf-8")
    print(f"\nsaved {target.relative_to(ROOT)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: install it with  uv pip install matplotlib")
        return
    plot(rows, target.with_suffix(".png"))
    print(f"saved {target.with_suffix('.png').relative_to(ROOT)}")


def plot(rows: list[Row], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, field, title in (
        (axes[0], "first_token_p50_ms", "time to first token, p50"),
        (axes[1], "latency_p50_ms", f"latency of {OUTPUT_TOKENS} tokens, p50"),
    ):
        for system in dict.fromkeys(row.system for row in rows):
            points = [(row.prompt_tokens, getattr(row, field)) for row in rows if row.system == system]
            axis.plot(*zip(*points, strict=True), marker="o", label=system)
        axis.set(title=title, xlabel="prompt tokens", ylabel="ms", xscale="log", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServingError as error:
        sys.exit(str(error))
