#!/usr/bin/env python3
"""How fast KV blocks move between two processes of one host, as a ratio to memcpy in the same run.

    python benchmarks/transfer.py [--quick] [--pages base|huge] [--only NAME ...] [--output DIR]

Memory lies on base pages (4 KiB) and on huge pages (2 MiB) in turn, for every mechanism and the reference alike: the
connector asks for huge pages by default (huge_pages). Every mechanism gets a process pair of its own; in it, each case
(block size, pattern, total) alternates with a single-thread memcpy of the same block lists; 20th percentiles are
compared. Bytes are verified once per case. The plot needs matplotlib. NIXL is measured where it is installed:

    pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from transfer_bench.mechanisms import MECHANISMS, nixl_is_installed
from transfer_bench.pair import PAGES, Row, measure, own
from transfer_bench.pools import TENSORS, Case

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB]
TOTALS = [256 * KIB, 4 * MIB, 32 * MIB, 256 * MIB]


def make_cases(quick: bool) -> list[Case]:
    """One block of one tensor (latency), then every block size and pattern at totals up to 1 GiB."""
    cases = [Case(size, 1, scattered=False, tensors=1) for size in BLOCK_SIZES]
    totals = TOTALS[:3] if quick else TOTALS
    for size in BLOCK_SIZES:
        for total in totals:
            blocks = total // size // TENSORS
            if blocks >= 1:
                cases += [Case(size, blocks, scattered) for scattered in (False, True)]
    if not quick:
        cases += [Case(size, GIB // size // TENSORS, scattered=True) for size in (64 * KIB, MIB)]
    return cases


def size_name(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count // unit} {name}"
    return f"{count} B"


def print_table(rows: list[Row], names: list[str], pages: str) -> None:
    table: defaultdict[tuple[int, int, bool], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "ratio" in row:
            table[row["block_bytes"], row["total_bytes"], row["scattered"]][row["mechanism"]] = row
    print(f"\nOn {pages} pages: ratio to single-thread memcpy in the same run (in brackets GB/s)")
    print(f"{'block':>8} {'total':>8} {'pattern':>10} " + " ".join(f"{name:>16}" for name in names))
    for (block, total, scattered), cells in sorted(table.items()):
        line = f"{size_name(block):>8} {size_name(total):>8} {'scattered' if scattered else 'contiguous':>10} "
        for name in names:
            cell = cells.get(name)
            line += f"{cell['ratio']:>8.2f} ({cell['gb_per_s']:5.2f}) " if cell else f"{'-':>16} "
        print(line)
    print("\nOne block of one tensor, microseconds")
    for block in BLOCK_SIZES:
        cells = table.get((block, block, False), {})
        print(
            f"{size_name(block):>8} " + "  ".join(f"{n}: {cells[n]['seconds'] * 1e6:.1f}" for n in names if n in cells)
        )
    print("\nCores used by both idle processes")
    for row in rows:
        if "idle_cpu" in row:
            print(f"{row['mechanism']:>16}: {row['idle_cpu']:.3f}")


def save_plot(rows: list[Row], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted({row["pages"] for row in rows})
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(13, 5), sharey=True, squeeze=False)
    for axis, pages in zip(axes[0], kinds, strict=True):
        for name in names:
            best = [r for r in rows if r["mechanism"] == name and r["pages"] == pages and r.get("scattered")]
            points = {
                size: [r["ratio"] for r in best if r["block_bytes"] == size and r["total_bytes"] >= 16 * MIB]
                for size in BLOCK_SIZES
            }
            sizes = [size for size in BLOCK_SIZES if points[size]]
            axis.plot(sizes, [sum(points[s]) / len(points[s]) for s in sizes], marker="o", label=name)
        axis.axhline(1.0, color="grey", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(BLOCK_SIZES, [size_name(size) for size in BLOCK_SIZES])
        axis.set_title(f"scattered blocks on {pages} pages, totals of 32 MiB and more")
        axis.set_xlabel("block size")
    axes[0][0].set_ylabel("ratio to one-thread memcpy")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller totals")
    parser.add_argument("--only", nargs="+", choices=list(MECHANISMS), help="mechanisms to measure")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per case and mechanism")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds to watch idle processes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--pages", choices=list(PAGES.values()), help="one kind of pages instead of both")
    parser.add_argument("--own", help=argparse.SUPPRESS)
    parser.add_argument("--tensor-bytes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        own(args.own, args.tensor_bytes, args.pages == "huge")
        return 0

    names = args.only or list(MECHANISMS)
    if not nixl_is_installed() and any(name.startswith("nixl") for name in names):
        print("NIXL is not installed: its rows are left out", file=sys.stderr)
        names = [name for name in names if not name.startswith("nixl")]
    cases = make_cases(args.quick)
    tensor_bytes = max(case.blocks * case.block_bytes for case in cases)
    rows: list[Row] = []
    kinds = {huge: pages for huge, pages in PAGES.items() if args.pages in (None, pages)}
    for huge, pages in kinds.items():
        for name in names:
            for row in measure(name, tensor_bytes, huge, cases, args.budget, args.idle):
                rows.append(row)
                print(f"\r{pages} pages, {name}: {len(rows)} measurements", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "transfer.json").write_text(json.dumps(rows, indent=1))
    for pages in kinds.values():
        print_table([row for row in rows if row["pages"] == pages], names, pages)
    try:
        save_plot(rows, names, args.output / "transfer.png")
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
    print(f"\nSaved in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
