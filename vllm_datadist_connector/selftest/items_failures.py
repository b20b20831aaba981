"""What happens when the peer dies: how soon it is known, and whether anything is written afterwards."""

from __future__ import annotations

import time

from vllm_datadist_connector.selftest.bench import Bench, Numbers, WrongError, must
from vllm_datadist_connector.selftest.items_memory import KIB, MIB, OURS, THEIRS
from vllm_datadist_connector.selftest.party import PullLoop

_SIZE, _BLOCK = 64 * MIB, 64 * KIB
_FILL = 0x5A
"""What stands for the KV that vLLM's next request has in those blocks."""


def late_write(bench: Bench) -> Numbers:
    """B dies in the middle of a pull. After the forced unlink nothing may be written to A's blocks any more."""
    settings = bench.settings
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", _SIZE, seed)
        ours, theirs = (end.register("kv", _BLOCK, _SIZE // _BLOCK) for end in (a, b))
        must(a.link(b), "LinkLlmClusters")
        # Every other block, so that the runs cannot be joined. Over and over: B dies while one is under way.
        blocks = list(range(0, _SIZE // _BLOCK, 2))
        a.call("begin_pulls", int, a.pull_s, **a.pull_arguments(b, theirs, ours, blocks, blocks))
        died = time.monotonic()
        b.kill()
        loop: PullLoop = a.call("end_pulls", PullLoop, a.pull_s)
        unlinked = a.unlink(b, force=True)
        numbers: Numbers = {
            "pulls_before": loop.succeeded,
            "pull_ended_as": f"{loop.last.status}: {loop.last.why}",
            "pull_ended_ms_after_death": round((loop.failed_at - died) * 1e3, 1),
            "forced_unlink": unlinked.status if unlinked.ok else f"{unlinked.status}: {unlinked.why}",
            "forced_unlink_ms": round(unlinked.seconds * 1e3, 3),
            "watched_s": settings.watch_s,
        }
        if not loop.succeeded:
            raise WrongError("the pull failed before the peer died", numbers)
        must(unlinked, "UnlinkLlmClusters by force")
        a.call("fill", int, name="kv", value=_FILL)
        changed = int(a.call("watch", int, settings.watch_s + 60, name="kv", value=_FILL, seconds=settings.watch_s))
        numbers["bytes_written_late"] = changed
        if changed:
            raise WrongError(f"{changed} bytes were written after the forced unlink had returned", numbers)
    return numbers


def peer_death(bench: Bench) -> Numbers:
    """B dies while the link is idle: when the provider knows of it, and how long a pull takes to fail."""
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", MIB, seed)
        ours, theirs = (end.register("kv", _BLOCK, MIB // _BLOCK) for end in (a, b))
        must(a.link(b), "LinkLlmClusters")
        must(a.pull(b, theirs, ours, [1], [1]), "PullKvBlocks")
        died = time.monotonic()
        b.kill()
        numbers: Numbers = {}
        if a.capabilities["reports_links"]:
            patience = bench.settings.patience_s
            lost = a.call("wait_until_lost", float | None, patience + 10, cluster_id=b.cluster_id, seconds=patience)
            if lost is None:
                raise WrongError(f"{patience:g} s after the death of the peer its link is reported as alive")
            numbers["known_ms_after_death"] = round((lost - died) * 1e3, 1)
        failed = a.pull(b, theirs, ours, [2], [2])
        numbers |= {"pull": f"{failed.status}: {failed.why}", "pull_failed_ms": round(failed.seconds * 1e3, 3)}
        if failed.ok:
            raise WrongError("a pull from a dead peer succeeds", numbers)
        wrong = a.wrong_bytes("kv", OURS, THEIRS, [(_BLOCK, _BLOCK, _BLOCK)])
        if wrong:
            raise WrongError(f"{wrong} bytes were written by a pull from a dead peer", numbers)
    return numbers
