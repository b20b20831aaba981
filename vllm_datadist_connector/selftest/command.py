"""The command line of `vllm-datadist selftest`, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import Final

import vllm_datadist_connector
from vllm_datadist_connector.arguments import address, endpoint
from vllm_datadist_connector.selftest import items_failures, items_fence, items_links, items_memory, items_rate
from vllm_datadist_connector.selftest.bench import (
    Bench,
    Numbers,
    Place,
    Result,
    Settings,
    SkippedError,
    Status,
    WrongError,
)
from vllm_datadist_connector.selftest.hosts import HostError, Supervisor, connect
from vllm_datadist_connector.selftest.party import HOST, MEMORY
from vllm_datadist_connector.selftest.remote import PartyError, PartyLostError, ProcessWire
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

LOOPBACK = "127.0.0.1"
ENGINE = "engine"

ITEMS: Final[tuple[Callable[[Bench], Numbers], ...]] = (
    items_memory.views_of_one_memory,
    items_memory.registrations,
    items_memory.unaligned_start,
    items_memory.region_over_4_gb,
    items_memory.expandable_segments,
    items_memory.second_thread,
    items_memory.register_after_link,
    items_links.link_time,
    items_links.many_links,
    items_links.crossing_links,
    items_links.peers_half,
    items_rate.bandwidth,
    items_fence.fence,
    items_failures.late_write,
    items_failures.peer_death,
)
NAMES: Final = tuple(item.__name__ for item in ITEMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", choices=("a", "b"), help="two hosts: start b on one, then a on the other")
    parser.add_argument("--address", type=endpoint, metavar="HOST:PORT", help="where b listens, on either side")
    parser.add_argument("--auth", default="", metavar="FILE", help="key file (`vllm-datadist key`), on both hosts")
    parser.add_argument("--insecure", action="store_true", help="two hosts without a key: b lets in whoever connects")
    parser.add_argument("--provider", default=ENGINE, help="engine (default) or cann")
    parser.add_argument(
        "--memory",
        type=memory,
        metavar="host|npu:N",
        help="of this end; default: host for the engine, npu:0 otherwise. On one host b takes the device after it",
    )
    parser.add_argument("--only", type=names, metavar="ITEM,ITEM", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--host", type=address, default=LOOPBACK, metavar="IP", help="one host: this machine's own address"
    )
    parser.add_argument("--large", action="store_true", help="also a region of more than 4 GiB")
    parser.add_argument("--watch", type=float, metavar="S", help="look so long for late writes; default: 3, cann 60")
    parser.add_argument("--links", type=int, default=16, choices=range(1, 65), metavar="N", help="of many_links")
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into a report")


def memory(text: str) -> str:
    if not MEMORY.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither host nor a device such as npu:0")
    return text


def names(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; the items are {', '.join(NAMES)}")
    return wanted


def run(options: argparse.Namespace, fail: Callable[[str], int]) -> int:
    """
    Args:
        fail: tells of a wrong usage.
    """
    if (options.role is None) != (options.address is None):
        return fail("--role and --address go together")
    if options.role and bool(options.auth) == options.insecure:
        return fail("two hosts need --auth FILE on both, or --insecure: whoever reaches b can make it work")
    trust = Trust(options.auth, options.insecure)
    if options.role == "b":
        return _serve(options.address, trust)
    try:
        bench = _bench(options, trust)
    except (HostError, OSError, ValueError) as error:
        print(f"vllm-datadist selftest: {error}", file=sys.stderr)
        return 1
    started = time.monotonic()
    chosen = [item for item in ITEMS if options.only is None or item.__name__ in options.only]
    results = []
    for item in chosen:
        results.append(run_item(item, bench))
        if not options.json:
            print("\n".join(text_of(results[-1])), flush=True)
    if options.json:
        print(json.dumps(report(options, bench, results, time.monotonic() - started), indent=1))
    elif any(each.status == "wrong" for each in results):
        print("Something is wrong: run it again with --json, and paste what it prints into a report.")
    return int(any(each.status == "wrong" for each in results))


def _serve(address: Endpoint, trust: Trust) -> int:
    try:
        supervisor = Supervisor(address, trust)
    except OSError as error:
        print(f"vllm-datadist selftest: {address}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 1
    at = Endpoint(address.host, supervisor.port)
    print(f"listening on {at}; on the other host: vllm-datadist selftest --role a --address {at}", flush=True)
    try:
        supervisor.serve()
    except KeyboardInterrupt:
        supervisor.close()
    return 0


def _bench(options: argparse.Namespace, trust: Trust) -> Bench:
    ours = options.memory or (HOST if options.provider == ENGINE else "npu:0")
    device, _, index = ours.partition(":")
    theirs = f"{device}:{int(index) + 1}" if index and options.role is None else ours
    host = options.host
    if options.role:
        wire, host = connect(options.address, trust)
        wire.kill()
    settings = Settings(
        provider=options.provider,
        pull_timeout_ms=_pull_timeout_ms(options.provider),
        engine_options={
            "datadist.AuthKeyFile": trust.auth,
            "datadist.Insecure": str(int(trust.insecure)),
            # What the capabilities tell is what may be asked for.
            "datadist.MaxAddrsPerCache": "65536",
        },
        large=options.large,
        watch_s=options.watch or (3.0 if options.provider == ENGINE else 60.0),
        links=options.links,
    )
    there = Place(options.address.host, theirs, lambda: connect(options.address, trust)[0]) if options.role else None
    return Bench(Place(host, ours, ProcessWire), there or Place(host, theirs, ProcessWire), settings)


def _pull_timeout_ms(provider: str) -> int:
    """Above what HCCL's default retransmission takes, some 34 s: what a pull came to is to be the hardware's answer."""
    given = os.environ.get("ASCEND_TRANSFER_TIMEOUT", "")
    return int(given) if given.isdecimal() and int(given) else 10_000 if provider == ENGINE else 40_000


def run_item(item: Callable[[Bench], Numbers], bench: Bench) -> Result:
    started = time.monotonic()
    status: Status = "ok"
    note, numbers = "", {}
    try:
        numbers = item(bench)
    except SkippedError as reason:
        status, note = "skipped", str(reason)
    except WrongError as error:
        status, note, numbers = "wrong", str(error), error.numbers
    except (PartyLostError, PartyError, HostError) as error:
        status, note = "wrong", str(error)
    return Result(item.__name__, status, note, numbers, round(time.monotonic() - started, 3))


def text_of(result: Result) -> Iterable[str]:
    yield f"{result.status:<8} {result.name} ({result.seconds:.1f} s){f': {result.note}' if result.note else ''}"
    for name, value in result.numbers.items():
        yield f"{'':<8}   {name}: {value}"


def report(options: argparse.Namespace, bench: Bench, results: Iterable[Result], seconds: float) -> dict[str, object]:
    """Nothing in it is secret: no host name, no path, no key."""
    return {
        "selftest": vllm_datadist_connector.__version__,
        "provider": options.provider,
        "hosts": 2 if options.role else 1,
        "memory": [bench.a.memory, bench.b.memory],
        "machine": {"arch": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count()},
        "seconds": round(seconds, 1),
        "items": [dataclasses.asdict(each) for each in results],
    }
