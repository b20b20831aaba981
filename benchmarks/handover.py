#!/usr/bin/env python3
"""The hand-over step by step: where the time goes between P's last token and D's first.

    .venv/bin/python benchmarks/handover.py [--lengths 128,1024,4096,8000] [--requests 20] [--rounds 2]

A pair of P and D and a single instance serve side by side on this machine; requests go to one after the other, one at a
time. "direct": both legs come from here, D's after P's answer. "router": the same by vllm-router, for `--router-length`
tokens, and "single", one instance, with it: what a router adds, and where. Each step is the difference of the servers'
own histograms before and after the one request, or of clocks here; the tables hold medians, which need not add up.
The mark: D's leg takes at most one decode step, the copy and 5 ms. Results: tables, and JSON in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from console import progress  # noqa: E402
from scrape import scrape  # noqa: E402
from serving import Program, ServingError, pd_router  # noqa: E402
from systems import (  # noqa: E402
    ENVIRONMENT,
    LOGS,
    RESULTS,
    VOCABULARY,
    Setting,
    prefill,
    send,
    server_of,
    specs,
    started,
)

WARM_UP_REQUESTS = 3
MARK_MS = 5.0
METRICS_DEADLINE_S = 15.0
METRICS_POLL_S = 0.02
GIVE = {"do_remote_decode": True, "do_remote_prefill": False}

Steps = dict[str, float]
"""Milliseconds of one request, by step."""

DIRECT = (
    ("P's leg", "p"),
    ("  HTTP and parsing", "p http"),
    ("  to the engine and back", "p engine"),
    ("  vLLM's queue", "p queue"),
    ("  prefill", "p prefill"),
    ("D's leg to its first token", "d"),
    ("  HTTP and parsing", "d http"),
    ("  to the engine and back", "d engine"),
    ("  vLLM's queue, without the pull", "d queue"),
    ("  pull to P's confirmation", "d pull"),
    ("    waiting for its turn", "d turn"),
    ("    copy", "d copy"),
    ("    asking and confirming", "d confirm"),
    ("  first step", "d first step"),
    ("one decode step", "step"),
    ("D's leg - decode step - copy", "hand-over"),
)
WAYS = (
    ("first token", "all"),
    ("  P: to the engine and back", "p engine"),
    ("  P: vLLM's queue", "p queue"),
    ("  P: prefill", "p prefill"),
    ("  D: to the engine and back", "d engine"),
    ("  D: vLLM's queue, without the pull", "d queue"),
    ("  D: pull to P's confirmation", "d pull"),
    ("  D: first step, or single's prefill", "d first step"),
    ("  HTTP, parsing, router", "outside"),
)


class Pair:
    """The servers of one round. Each way of asking answers with its steps."""

    def __init__(self, prefill: Program, decode: Program, router: Program, single: Program) -> None:
        self._prefill, self._decode, self._router, self._single = prefill, decode, router, single

    def direct(self, prompt: list[int]) -> Steps:
        p, d = Clock(self._prefill), Clock(self._decode)
        p_leg, params = prefill(self._prefill, prompt, GIVE)
        if not params:
            raise ServingError(self._prefill.describe("answered without kv_transfer_params"))
        d_leg, _ = send(self._decode, prompt, params)
        steps = of_prefill(p) | of_decode(d, pulls=True)
        steps |= {"all": (p_leg + d_leg) * 1e3, "p": p_leg * 1e3, "d": d_leg * 1e3}
        steps["p http"] = steps["p"] - p.ms("vllm:e2e_request_latency_seconds")
        steps["d http"] = steps["d"] - d.ms("vllm:time_to_first_token_seconds")
        steps["outside"] = steps["p http"] + steps["d http"]
        steps["hand-over"] = steps["d"] - steps["step"] - steps["d copy"]
        return steps

    def router(self, prompt: list[int]) -> Steps:
        p, d = Clock(self._prefill), Clock(self._decode)
        first, _ = send(self._router, prompt)
        steps = of_prefill(p) | of_decode(d, pulls=True) | {"all": first * 1e3}
        inside = p.ms("vllm:e2e_request_latency_seconds") + d.ms("vllm:time_to_first_token_seconds")
        return steps | {"outside": steps["all"] - inside}

    def single(self, prompt: list[int]) -> Steps:
        clock = Clock(self._single)
        first, _ = send(self._single, prompt)
        steps = of_decode(clock, pulls=False) | {"all": first * 1e3}
        return steps | {"outside": steps["all"] - clock.ms("vllm:time_to_first_token_seconds")}


class Clock:
    """What a server's histograms say of the one request that came since this was made."""

    def __init__(self, server: Program) -> None:
        self._server = server
        self._before = scrape(server.url)
        self._after = self._before

    def wait(self, *names: str) -> None:
        """Until the server has told of the request: it does so after its answer."""
        until = time.monotonic() + METRICS_DEADLINE_S
        while not all(self._grown(f"{name}_count") for name in names):
            if time.monotonic() > until:
                raise ServingError(self._server.describe(f"tells nothing of a request in {', '.join(names)}"))
            time.sleep(METRICS_POLL_S)
            self._after = scrape(self._server.url)

    def ms(self, name: str) -> float:
        """Of one observation, or their mean where a request makes several."""
        count = self._grown(f"{name}_count")
        return self._grown(f"{name}_sum") / count * 1e3 if count else 0.0

    def _grown(self, name: str) -> float:
        return self._after.total(name) - self._before.total(name)


def of_prefill(clock: Clock) -> Steps:
    """P's, whose request ends with its first token."""
    clock.wait("vllm:e2e_request_latency_seconds")
    steps = {"p queue": clock.ms("vllm:request_queue_time_seconds")}
    steps["p prefill"] = clock.ms("vllm:request_prefill_time_seconds")
    return steps | {"p engine": clock.ms("vllm:e2e_request_latency_seconds") - sum(steps.values())}


def of_decode(clock: Clock, pulls: bool) -> Steps:
    """D's up to its first token; of a single instance, too, which pulls nothing. vLLM counts the pull as queueing."""
    clock.wait("vllm:e2e_request_latency_seconds", *(["vllm:datadist_transfer_seconds"] if pulls else []))
    queue, first_step = (clock.ms(f"vllm:request_{name}_time_seconds") for name in ("queue", "prefill"))
    pull, turn, copy = (clock.ms(f"vllm:datadist_{name}_seconds") for name in ("transfer", "queue", "copy"))
    return {
        "d engine": clock.ms("vllm:time_to_first_token_seconds") - queue - first_step,
        "d queue": queue - pull,
        "d pull": pull,
        "d turn": turn,
        "d copy": copy,
        "d confirm": pull - turn - copy,
        "d first step": first_step,
        "step": clock.ms("vllm:inter_token_latency_seconds"),
    }


def main() -> int:
    arguments = parse_arguments()
    setting = Setting(arguments.model.resolve(), arguments.chunk, pin=arguments.pin)
    direct: dict[int, list[Steps]] = {length: [] for length in arguments.lengths}
    ways: dict[str, list[Steps]] = {"single": [], "direct": [], "router": []}
    meetings = []
    source = random.Random(1)
    for number in range(arguments.rounds):
        servers = [server_of(spec, 0, setting) for spec in specs("single", setting)]
        servers += [server_of(spec, core, setting) for core, spec in enumerate(specs("datadist", setting))]
        single, p, d = servers
        router = pd_router([p.url], [d.url], ENVIRONMENT.directory / "bin", LOGS, ENVIRONMENT.variables())
        with started(f"round {number + 1} of {arguments.rounds}", servers, [router]), progress("measure"):
            pair = Pair(p, d, router, single)
            for length, found in direct.items():
                found.extend(measure([pair.direct], length, arguments.requests, source)[0])
            asks = [pair.single, pair.direct, pair.router]
            results = measure(asks, arguments.router_length, arguments.requests, source)
            for kept, found in zip(ways.values(), results, strict=True):
                kept.extend(found)
            meetings.append(scrape(d.url).total("vllm:datadist_handshake_seconds_sum") * 1e3)
    report(direct, ways, meetings, arguments.router_length)
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / "handover.json"
    target.write_text(json.dumps({"direct": direct, "ways": ways, "meetings": meetings}, indent=1), encoding="utf-8")
    print(f"\nsaved {target.relative_to(ROOT)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-qwen3")
    parser.add_argument("--lengths", type=numbers, default=[128, 1024, 4096, 8000], help="prompt lengths in tokens")
    parser.add_argument("--router-length", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=20, help="per length, way and round")
    parser.add_argument("--rounds", type=int, default=2, help="fresh starts")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt that are computed in one step")
    parser.add_argument("--pin", action="store_true", help="P on one core and D on another, as if on two machines")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model: {arguments.model} is not there; tools/demo.py makes the default one")
    return arguments


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(
    ways: Sequence[Callable[[list[int]], Steps]], length: int, requests: int, source: random.Random
) -> list[list[Steps]]:
    """The ways in turn, so that a busier moment of the machine is everybody's."""
    found: list[list[Steps]] = [[] for _ in ways]
    for number in range(WARM_UP_REQUESTS + requests):
        for ask, kept in zip(ways, found, strict=True):
            steps = ask(source.choices(VOCABULARY, k=length))
            if number >= WARM_UP_REQUESTS:
                kept.append(steps)
    return found


def report(
    direct: dict[int, list[Steps]], ways: dict[str, list[Steps]], meetings: list[float], router_length: int
) -> None:
    print("\nDirect: P's leg, then D's; ms, medians " + "".join(f"{length:>10}" for length in direct))
    for title, step in DIRECT:
        print(f"{title:<40}" + "".join(f"{median(found, step):>10.2f}" for found in direct.values()))
    held = all(median(found, "hand-over") <= MARK_MS for found in direct.values())
    print(f"mark: at most {MARK_MS:g} ms: {'held' if held else 'missed'}")
    print(f"first contact of P and D, in the first pull only: {statistics.median(meetings):.1f} ms")

    print(f"\nThree ways, {router_length} tokens; ms, medians")
    titles = [*ways, "router - direct", "router - single"]
    print(f"{'':<40}" + "".join(f"{title:>18}" for title in titles))
    for title, step in WAYS:
        single, straight, routed = (median(found, step) for found in ways.values())
        cells = [single, straight, routed, routed - straight, routed - single]
        print(f"{title:<40}" + "".join(f"{cell:>18.2f}" for cell in cells))


def median(found: list[Steps], step: str) -> float:
    return statistics.median(steps.get(step, 0.0) for steps in found)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServingError as error:
        sys.exit(str(error))
