#!/usr/bin/env python3
"""The first request to fresh servers beside the second, for several sizes of KV cache.

    .venv/bin/python benchmarks/first_request.py [--gib 0.25,1,4] [--rounds 3] [--later 5]

For each size and round a P/D pair and a single instance are started afresh, and get requests one at a time. "pull" is
what D says of the transfer, from its start to P's confirmation; with the first one the instances meet and link. "token"
is the time to the first token that a client sees: its first-request costs of vLLM itself show in the single instance.
P and D take twice the size in memory. Results: a table, and JSON in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from console import progress  # noqa: E402
from scrape import scrape  # noqa: E402
from serving import Program, ServerSpec, ServingError, pd_router, read_config, vllm_server  # noqa: E402
from systems import ENVIRONMENT, RESULTS, VOCABULARY, send  # noqa: E402

LOGS = ROOT / "logs" / "first-request"
PROMPT_TOKENS = 256
SYSTEMS = ("single", "datadist")
METRICS_DEADLINE_S = 15.0
GIB = 2**30


@dataclass(frozen=True)
class Request:
    system: str
    gib: float
    number: int
    """1: the first that these servers got."""
    first_token_ms: float
    pull_ms: float
    """0 where nothing is pulled."""
    meeting_ms: float
    """Part of pull_ms: D met and linked P."""


def main() -> int:
    arguments = parse_arguments()
    requests: list[Request] = []
    for gib in arguments.gib:
        for number in range(arguments.rounds):
            for system in SYSTEMS:
                with progress(f"{gib:g} GiB, round {number + 1} of {arguments.rounds}, {system}"):
                    requests += measure(system, gib, arguments)
    print_table(requests)
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / "first_request.json"
    target.write_text(json.dumps([asdict(each) for each in requests], indent=1), encoding="utf-8")
    print(f"\nsaved {target.relative_to(ROOT)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-qwen3")
    parser.add_argument("--gib", type=sizes, default=[0.25, 1.0, 4.0], help="KV cache of each instance")
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts per size")
    parser.add_argument("--later", type=int, default=5, help="requests after the first two")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model: {arguments.model} is not there; tools/demo.py makes the default one")
    if arguments.rounds < 1 or arguments.later < 1:
        parser.error(f"--rounds {arguments.rounds}, --later {arguments.later}: at least 1 each")
    return arguments


def sizes(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def measure(system: str, gib: float, arguments: argparse.Namespace) -> list[Request]:
    source, requests = random.Random(1), []
    with running(system, arguments.model.resolve(), gib) as (entry, server):
        pulls = meetings = 0.0
        for number in range(1, 3 + arguments.later):
            first, _ = send(entry, source.choices(VOCABULARY, k=PROMPT_TOKENS))
            new_pulls, new_meetings = await_pull(server, number) if system != "single" else (0.0, 0.0)
            pull, meeting = (new_pulls - pulls) * 1e3, (new_meetings - meetings) * 1e3
            requests.append(Request(system, gib, number, first * 1e3, pull, meeting))
            pulls, meetings = new_pulls, new_meetings
    return requests


@contextmanager
def running(system: str, model: Path, gib: float) -> Iterator[tuple[Program, Program]]:
    """(what requests go to, the instance that answers)."""
    names = ("prefill", "decode") if system == "datadist" else ("single",)
    bin_dir, variables = ENVIRONMENT.directory / "bin", ENVIRONMENT.variables()
    servers = []
    for name in names:
        config = read_config(ROOT / "configs" / f"{name}.json") if system == "datadist" else None
        spec = ServerSpec(f"{name}-{gib:g}", model, config, kv_cache_bytes=int(gib * GIB))
        servers.append(vllm_server(spec, bin_dir, LOGS, variables))
    programs = list(servers)
    if system == "datadist":
        programs.append(pd_router([servers[0].url], [servers[1].url], bin_dir, LOGS, variables))
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        for program in programs[len(servers) :]:
            program.start()
            program.wait_ready()
        yield programs[-1], servers[-1]
    finally:
        for program in programs:
            program.stop()


def await_pull(decode: Program, number: int) -> tuple[float, float]:
    """Seconds of all pulls and of all meetings so far, once D's metrics tell of `number` pulls."""
    until = time.monotonic() + METRICS_DEADLINE_S
    while True:
        metrics = scrape(decode.url)
        if metrics.total("vllm:datadist_transfer_seconds_count") >= number:
            names = ("vllm:datadist_transfer_seconds_sum", "vllm:datadist_handshake_seconds_sum")
            pulls, meetings = (metrics.total(name) for name in names)
            return pulls, meetings
        if time.monotonic() > until:
            raise ServingError(decode.describe(f"answered request {number}, but did not pull its KV cache"))
        time.sleep(0.05)


def print_table(requests: list[Request]) -> None:
    """Medians over the rounds."""
    print(f"\n{'ms':>6}{'':10}{'pull':>10}{'':30}{'token':>10}")
    titles = ("first", "second", "later", "first-second")
    print(f"{'GiB':>6}  {'system':<10}" + "".join(f"{title:>13}" for title in ("meeting", *titles, *titles)))
    for gib in dict.fromkeys(each.gib for each in requests):
        for system in SYSTEMS:
            chosen = [each for each in requests if (each.gib, each.system) == (gib, system)]
            cells = [statistics.median(each.meeting_ms for each in chosen if each.number == 1)]
            for field in ("pull_ms", "first_token_ms"):
                first, second, later = (
                    statistics.median(getattr(each, field) for each in chosen if min(each.number, 3) == number)
                    for number in (1, 2, 3)
                )
                cells += [first, second, later, first - second]
            print(f"{gib:>6g}  {system:<10}" + "".join(f"{cell:>13.1f}" for cell in cells))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServingError as error:
        sys.exit(str(error))
