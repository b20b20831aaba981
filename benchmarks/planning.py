#!/usr/bin/env python3
"""What it costs D's driver thread to meet an unlike P, and to plan one long pull from it.

    python benchmarks/planning.py [--tokens 16000]

Equal sides are the reference: ratios are to their plan. Nothing moves; what the ids then cost is transfer.py's subject.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.kv_model import Attention, Side, make_ranks

from vllm_datadist_connector.worker.pairing import pair
from vllm_datadist_connector.worker.plan import TokenRange, plan_pull

LAYERS = [Attention(f"layers.{i}", 0, heads=8, content=256) for i in range(4)]
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16000)
    tokens = parser.parse_args().tokens
    base = Side(tp=1, pp=1, block_sizes=(16,), num_blocks=tokens // 8)
    cases = {
        "equal": (base, base),
        "TP 2 -> 1": (replace(base, tp=2), base),
        "blocks of 16 -> 64": (base, replace(base, block_sizes=(64,))),
        "blocks of 64 -> 16": (replace(base, block_sizes=(64,)), base),
        "NHD -> HND": (replace(base, heads_first=False), base),
    }
    reference = 0.0
    for name, (p, d) in cases.items():
        theirs, ours = (make_ranks(LAYERS, side)[0].geometry(1) for side in (p, d))
        start = time.perf_counter()
        pairings = pair(ours, theirs)
        pairing_s = time.perf_counter() - start
        request = TokenRange(0, tokens, (blocks_of(p, tokens),), (blocks_of(d, tokens),), tokens)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            pulls = plan_pull(ours, theirs, pairings, request)
            seconds.append(time.perf_counter() - start)
        reference = reference or min(seconds)
        ids = sum(len(pull.src_blocks) for pull in pulls)
        print(
            f"{name:20} pairing {pairing_s * 1e3:5.2f} ms   plan {min(seconds) * 1e3:5.2f} ms"
            f" ({min(seconds) / reference:4.1f}x)   {ids:7} ids of {pulls[0].granule} bytes"
        )


def blocks_of(side: Side, tokens: int) -> tuple[int, ...]:
    count = -(-tokens // side.block_sizes[0])
    return tuple(random.Random(count).sample(range(1, side.num_blocks), count))


if __name__ == "__main__":
    main()
