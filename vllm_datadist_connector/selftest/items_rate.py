"""How fast bytes move, by the size of the runs that they move in."""

from __future__ import annotations

from vllm_datadist_connector.selftest.bench import Bench, Numbers, WrongError, moves_of, must
from vllm_datadist_connector.selftest.items_memory import KIB, MIB, OURS, THEIRS

_SIZE = 64 * MIB
_RUNS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
_TIMES = 3


def bandwidth(bench: Bench) -> Numbers:
    """Half of 64 MiB, every other block, so that no two runs can be joined; the best of three pulls of each size."""
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", _SIZE, seed)
        views = [[end.register("kv", run, _SIZE // run) for end in (a, b)] for run in _RUNS]
        must(a.link(b), "LinkLlmClusters")
        link = a.query(b)
        rates: dict[str, float] = {}
        ratios: dict[str, float] = {}
        for run, (ours, theirs) in zip(_RUNS, views, strict=True):
            blocks = list(range(0, _SIZE // run, 2))
            times = [must(a.pull(b, theirs, ours, blocks, blocks), f"{run} bytes").seconds for _ in range(_TIMES)]
            rate = _SIZE / 2 / max(min(times), 1e-9)
            rates[str(run)] = round(rate / 1e9, 3)
            copied: float | None = a.call("memcpy_rate", float | None, size=_SIZE, run=run)
            if copied:
                ratios[str(run)] = round(rate / copied, 3)
        numbers: Numbers = {
            "transport": link.transport if link else "not told",
            "transport_reason": link.reason if link else "",
            "gb_per_s_by_run_bytes": rates,
            "of_memcpy_by_run_bytes": ratios,
        }
        halves = [(run, list(range(0, _SIZE // run, 2))) for run in _RUNS]
        moves = [move for run, blocks in halves for move in moves_of(blocks, blocks, run)]
        wrong = a.wrong_bytes("kv", OURS, THEIRS, moves)
    if wrong:
        raise WrongError(f"{wrong} bytes are wrong", numbers)
    return numbers
