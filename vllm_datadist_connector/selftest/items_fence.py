"""Whether what was pulled stays, where a step of the model that is in flight writes to the same block."""

from __future__ import annotations

from vllm_datadist_connector.selftest.bench import Bench, Numbers, WrongError, must
from vllm_datadist_connector.selftest.items_memory import KIB, MIB, OURS, THEIRS
from vllm_datadist_connector.selftest.party import HOST

_SIZE, _BLOCK = MIB, 16 * KIB
_ROUNDS, _ROUNDS_ON_DEVICE = 50, 1000
_WITHOUT = 20
_ROUND_S = 0.1


def fence(bench: Bench) -> Numbers:
    """As the connector pulls: once the step's end has passed. And without waiting for it, which must go wrong, or this
    would tell nothing."""
    rounds = _ROUNDS if bench.a.memory == HOST else _ROUNDS_ON_DEVICE
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", _SIZE, seed)
        ours, theirs = (end.register("kv", _BLOCK, _SIZE // _BLOCK) for end in (a, b))
        must(a.link(b), "LinkLlmClusters")
        pull = {**a.pull_arguments(b, theirs, ours, [5], [9]), "at": (THEIRS, 5 * _BLOCK, _BLOCK)}
        behind, beside = (
            int(a.call("pull_beside_work", int, a.pull_s + times * _ROUND_S, fenced=fenced, times=times, **pull))
            for fenced, times in ((True, rounds), (False, _WITHOUT))
        )
    numbers: Numbers = {"rounds": rounds, "wrong": behind, "rounds_without": _WITHOUT, "wrong_without": beside}
    if behind:
        raise WrongError(f"after {behind} of {rounds} pulls behind a fence a step in flight has written", numbers)
    if not beside:
        raise WrongError("without a fence nothing went wrong either: the work was too short to tell anything", numbers)
    return numbers
