#!/usr/bin/env python3
"""P's prefill with nothing to send, beside the same server without a connector, and with one that does nothing.

    .venv/bin/python benchmarks/prefill_cost.py [--lengths 128,1024,4096] [--requests 60] [--rounds 3]

All three serve side by side, on one core, and get prompts without a hand-off in turn, one at a time, so that a busier
moment is everybody's. P is told `transfer_mode: push`. What the idle connector costs is vLLM's own; the rest is ours.
The mark: P's median is at most 2 % above that of the server without any. With each ratio of medians goes the interval
in which it lies with a certainty of 95 % (bootstrap over the requests): the mark is held where that ends below it,
missed where it begins above, and open otherwise. Results: a table, and JSON in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tools"))

from console import progress  # noqa: E402
from serving import ServingError  # noqa: E402
from systems import RESULTS, VOCABULARY, Setting, prefill, server_of, specs, started  # noqa: E402

WARM_UP_REQUESTS = 3
MARK = 1.02
RESAMPLES = 4000
NAMES = ("without", "idle", "with")
MARKED = ("with", "without")
IDLE_CONNECTOR = {
    "kv_connector": "IdleConnector",
    "kv_role": "kv_producer",
    "kv_connector_module_path": "idle_connector",
}


def main() -> int:
    arguments = parse_arguments()
    setting = Setting(arguments.model.resolve(), arguments.chunk, pin=True)
    took: dict[int, dict[str, list[float]]] = {length: {name: [] for name in NAMES} for length in arguments.lengths}
    source = random.Random(1)
    for number in range(arguments.rounds):
        (plain,), (spec, _) = specs("single", setting), specs("datadist", setting)
        config = {**(spec.kv_transfer or {}), "kv_connector_extra_config": {"transfer_mode": "push"}}
        idle = replace(plain, name="bench-idle", kv_transfer=IDLE_CONNECTOR, variables={"PYTHONPATH": str(HERE)})
        servers = [server_of(each, 0, setting) for each in (plain, idle, replace(spec, kv_transfer=config))]
        with started(f"round {number + 1} of {arguments.rounds}", servers), progress("measure") as shown:
            for length, times in took.items():
                for request in range(WARM_UP_REQUESTS + arguments.requests):
                    # Who goes first changes: what one leaves behind in the caches is not the other's cost.
                    for name, server in list(zip(NAMES, servers, strict=True))[:: 1 - request % 2 * 2]:
                        seconds, _ = prefill(server, source.choices(VOCABULARY, k=length))
                        if request >= WARM_UP_REQUESTS:
                            times[name].append(seconds)
                    shown.tick()
    print_table(took)
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / "prefill_cost.json"
    target.write_text(json.dumps(took, indent=1), encoding="utf-8")
    print(f"\nsaved {target.relative_to(ROOT)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-qwen3")
    parser.add_argument("--lengths", type=numbers, default=[128, 1024, 4096], help="prompt lengths in tokens")
    parser.add_argument("--requests", type=int, default=60, help="per length, server and round")
    parser.add_argument("--rounds", type=int, default=3, help="fresh starts")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prompt that are computed in one step")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model: {arguments.model} is not there; tools/demo.py makes the default one")
    return arguments


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def print_table(took: dict[int, dict[str, list[float]]]) -> None:
    print(f"\n{'tokens':>8}" + "".join(f"{name + ', ms':>14}" for name in NAMES))
    for length, times in took.items():
        print(f"{length:>8}" + "".join(f"{statistics.median(times[name]) * 1e3:>14.2f}" for name in NAMES))
    for name, other in (MARKED, ("idle", "without"), ("with", "idle")):
        print(f"\n{name} / {other}")
        for length, times in took.items():
            ratio = statistics.median(times[name]) / statistics.median(times[other])
            low, high = interval(times[other], times[name])
            verdict = "held" if high <= MARK else "missed" if low > MARK else "open"
            mark = f"  mark {MARK:g}: {verdict}" if (name, other) == MARKED else ""
            print(f"{length:>8}{ratio:>10.4f}{low:>10.4f}-{high:.4f}{mark}")


def interval(without: Sequence[float], with_it: Sequence[float]) -> tuple[float, float]:
    """Of the ratio of their medians, between the 2.5th and the 97.5th percentile of what other samples would give."""
    source = random.Random(1)

    def median(times: Sequence[float]) -> float:
        return statistics.median(source.choices(times, k=len(times)))

    ratios = sorted(median(with_it) / median(without) for _ in range(RESAMPLES))
    return ratios[RESAMPLES * 25 // 1000], ratios[RESAMPLES * 975 // 1000 - 1]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServingError as error:
        sys.exit(str(error))
