#!/usr/bin/env python3
"""Time to first token and latency of prefill/decode beside a single instance and vLLM's NixlConnector.

    .venv/bin/python benchmarks/serve.py [--lengths 128,1024,4096] [--requests 20] [--rounds 2] [--link-rate 1gbit]

Everything runs on this machine, with one tiny model, in one run: each round starts each system afresh, in rotating
order, so that none profits from a warmer or quieter machine. Requests go one at a time, through vllm-router where
there are two instances, each with a prompt of its own. Results: a table, and JSON and PNG in benchmarks/results;
`--plot FILE` also draws what the README shows, and prints the README's table.

"datadist" is one leg after the other, through vllm-router; "overlapped" and "pushed" both legs at once, through
tools/overlap_router.py, where D pulls and where P pushes: of these the table also says which share of the KV cache came
while P was still computing. `--link-rate` puts P into a network namespace of its own, behind a link of that rate (as tc
writes it): it takes root.

"nixl" is NixlConnector, where D pulls, "nixl-push" NixlPushConnector, where P writes into blocks that D registers with
it once D has P's answer. Both go through vllm-router, one leg after the other. They need packages that are no
dependency of ours:

    uv pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1

NixlConnector pins the worker's threads to the last core on CPU, which starves a machine of two cores; "nixl" is the
same server with every thread allowed on every core again, "nixl-pinned" (--systems) the server as it comes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from console import progress  # noqa: E402
from link import throttled  # noqa: E402
from scrape import Metrics, scrape  # noqa: E402
from serving import Program, ServingError  # noqa: E402
from systems import MOVERS, OUTPUT_TOKENS, RESULTS, SYSTEMS, VOCABULARY, Setting, available, running, send  # noqa: E402

WARM_UP_REQUESTS = 3
NAMES = {
    "single": "one instance, no transfer",
    "datadist": "one leg after the other",
    "overlapped": "both at once, D pulls",
    "pushed": "both at once, P pushes",
    "nixl": "NIXL, D pulls",
    "nixl-push": "NIXL, P pushes",
    "nixl-pinned": "NIXL as it comes",
}
"""In the README."""
FIRST_TOKEN = {"first_token_p50_ms": "time to first token, p50"}


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
    systems = available(arguments.systems)
    timings: list[Timing] = []
    source = random.Random(1)
    with throttled(arguments.link_rate) if arguments.link_rate else nullcontext() as link:
        setting = Setting(arguments.model.resolve(), arguments.chunk, link, arguments.pin)
        for number in range(arguments.rounds):
            for system in systems[number % len(systems) :] + systems[: number % len(systems)]:
                print(f"round {number + 1} of {arguments.rounds}: {system}", flush=True)
                with running(system, setting) as (entry, servers):
                    timings += measure(system, entry, servers[-1], arguments, source)
    rows = summarize(timings)
    print_table(rows)
    save(rows, timings)
    if arguments.plot is not None:
        print_markdown(rows)
        plot(rows, FIRST_TOKEN, arguments.plot)
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
    parser.add_argument("--systems", type=names, default=[name for name in SYSTEMS if name != "nixl-pinned"])
    parser.add_argument("--plot", type=Path, help="draw the time to first token into this file, such as docs/ttft.svg")
    arguments = parser.parse_args()
    if arguments.plot is not None and not has_matplotlib():
        parser.error("--plot: install matplotlib first, with  uv pip install matplotlib")
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


def measure(
    system: str, entry: Program, decode: Program, arguments: argparse.Namespace, source: random.Random
) -> list[Timing]:
    timings = []
    with progress(f"measure {system}") as shown:
        for length in arguments.lengths:
            times, before = [], scrape(decode.url)
            for number in range(WARM_UP_REQUESTS + arguments.requests):
                prompt = source.choices(VOCABULARY, k=length)
                took = send(entry, prompt)
                if number >= WARM_UP_REQUESTS:
                    times.append(took)
                shown.tick()
            after = scrape(decode.url)
            if system == "pushed" and not grown("pushed_bytes", before, after):
                raise ServingError(decode.describe("got nothing by push"))
            early = early_share(before, after)
            timings += [Timing(system, length, first, whole, early) for first, whole in times]
    return timings


def early_share(before: Metrics, after: Metrics) -> float:
    early, moved = (grown(name, before, after) for name in ("early_bytes", "bytes_transferred_sum"))
    return early / moved if moved else 0.0


def grown(name: str, before: Metrics, after: Metrics) -> float:
    return after.total(f"vllm:datadist_{name}") - before.total(f"vllm:datadist_{name}")


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
    if not has_matplotlib():
        print("no plot: install it with  uv pip install matplotlib")
        return
    plot(rows, {**FIRST_TOKEN, "latency_p50_ms": f"latency of {OUTPUT_TOKENS} tokens, p50"}, target.with_suffix(".png"))


def print_markdown(rows: list[Row]) -> None:
    """The README's table: medians, and what came before P's prefill was done."""
    systems = [name for name in NAMES if any(row.system == name for row in rows)]
    early = [name for name in systems if name in MOVERS]
    titles = ["prompt tokens", *(NAMES[name] for name in systems), *(f"{NAMES[name]}: early" for name in early)]
    print("\n| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    for length in sorted({row.prompt_tokens for row in rows}):
        of = {row.system: row for row in rows if row.prompt_tokens == length}
        cells = [f"{of[name].first_token_p50_ms:.0f}" for name in systems]
        cells += [f"{of[name].early_share * 100:.0f} %" for name in early]
        print(f"| {length} | " + " | ".join(cells) + " |")


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: list[Row], titles: Mapping[str, str], target: Path) -> None:
    """One diagram for each field of a row that has a title."""
    import matplotlib as mpl

    mpl.use("agg")
    # Text stays text, and the same rows make the same file: it is kept in the repository.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "serve"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(titles), figsize=(1 + 5 * len(titles), 4.5), squeeze=False)
    for axis, (field, title) in zip(axes[0], titles.items(), strict=True):
        for system in (name for name in NAMES if any(row.system == name for row in rows)):
            points = [(row.prompt_tokens, getattr(row, field)) for row in rows if row.system == system]
            axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[system])
        axis.set(title=title, xlabel="prompt tokens", ylabel="ms", xscale="log", yscale="log")
        lengths = sorted({row.prompt_tokens for row in rows})
        axis.set_xticks(lengths, labels=[str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120, metadata={"Date": None} if target.suffix == ".svg" else None)
    print(f"saved {target}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServingError as error:
        sys.exit(str(error))
