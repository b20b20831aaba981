"""What links cost, and what becomes of them."""

from __future__ import annotations

import statistics

from vllm_datadist_connector.selftest.bench import LINK_MS, Bench, End, Numbers, WrongError, moves_of, must
from vllm_datadist_connector.selftest.items_memory import KIB, MIB, OURS, THEIRS
from vllm_datadist_connector.selftest.party import Outcome
from vllm_datadist_connector.selftest.remote import PartyLostError

_TIMES = 10
_SIZE, _BLOCK = MIB, 16 * KIB


def _prepare(*ends: End) -> list[int]:
    """Cache ids of memory whose first end's pattern is OURS, and the others' THEIRS."""
    for index, end in enumerate(ends):
        end.allocate("kv", _SIZE, THEIRS if index else OURS)
    return [end.register("kv", _BLOCK, _SIZE // _BLOCK) for end in ends]


def _pull_and_check(a: End, b: End, ours: int, theirs: int) -> Outcome:
    """Of what was pulled before, too, as all pulls are the same."""
    outcome = must(a.pull(b, theirs, ours, [1, 2, 9], [4, 0, 7]), "PullKvBlocks")
    wrong = a.wrong_bytes("kv", OURS, THEIRS, moves_of([1, 2, 9], [4, 0, 7], _BLOCK))
    if wrong:
        raise WrongError(f"{wrong} bytes are wrong")
    return outcome


def link_time(bench: Bench) -> Numbers:
    """LinkLlmClusters, the first pull over the link, which may fetch tables of the peer, and UnlinkLlmClusters."""
    links, pulls, unlinks = [], [], []
    with bench.pair() as (a, b):
        ours, theirs = _prepare(a, b)
        for _ in range(_TIMES):
            links.append(must(a.link(b), "LinkLlmClusters").seconds)
            pulls.append(_pull_and_check(a, b, ours, theirs).seconds)
            unlinks.append(must(a.unlink(b), "UnlinkLlmClusters").seconds)
    return {
        "first_link_ms": _ms(links[0]),
        "link_ms": _ms(statistics.median(links)),
        "first_pull_ms": _ms(statistics.median(pulls)),
        "unlink_ms": _ms(statistics.median(unlinks)),
    }


def many_links(bench: Bench) -> Numbers:
    """Memory of A, its device's included, and time for each of many links with processes of B's end."""
    count = bench.settings.links
    with bench.ends(bench.a, *[bench.b] * count) as (a, *peers):
        ours, *theirs = _prepare(a, *peers)
        used = int(a.call("memory_used", int))
        times = [must(a.link(peer), f"LinkLlmClusters, link {number}").seconds for number, peer in enumerate(peers, 1)]
        for peer, cache in zip(peers, theirs, strict=True):
            _pull_and_check(a, peer, ours, cache)
        more = int(a.call("memory_used", int)) - used
    return {"links": count, "bytes_per_link": max(0, more) // count, "link_ms": _ms(statistics.median(times))}


def crossing_links(bench: Bench) -> Numbers:
    """A links with B while B links with A."""
    with bench.pair() as (a, b):
        ours, theirs = _prepare(a, b)
        promised = bool(a.capabilities["crossing_links"])
        numbers: Numbers = {"capability_crossing_links": promised}
        for end, peer in ((a, b), (b, a)):
            end.remote.begin("link", peer=peer.address, timeout_ms=LINK_MS)
        for name, end in (("a", a), ("b", b)):
            try:
                outcome = end.remote.end(Outcome, LINK_MS / 1000 + 10)
            except PartyLostError as error:
                numbers[name] = str(error)
                if promised:
                    raise WrongError(f"links that cross: {error}", numbers) from None
                return numbers
            numbers[name] = outcome.status if outcome.ok else f"{outcome.status}: {outcome.why}"
        if promised:
            if a.query(b) is None:
                must(a.link(b), "LinkLlmClusters after links that crossed")
            _pull_and_check(a, b, ours, theirs)
    return numbers


def peers_half(bench: Bench) -> Numbers:
    """What B has of a link that A has unlinked by force, and whether A can link again."""
    with bench.pair() as (a, b):
        ours, theirs = _prepare(a, b)
        must(a.link(b), "LinkLlmClusters")
        _pull_and_check(a, b, ours, theirs)
        must(a.unlink(b, force=True), "UnlinkLlmClusters by force")
        promised = bool(a.capabilities["peer_drops_half"])
        numbers: Numbers = {"capability_peer_drops_half": promised}
        if b.capabilities["reports_links"]:
            patience = bench.settings.patience_s
            lost = b.call("wait_until_lost", float | None, patience + 10, cluster_id=a.cluster_id, seconds=patience)
            numbers["b_lost_the_link"] = lost is not None
            if promised and lost is None:
                raise WrongError("B keeps its half of the link", numbers)
        again = a.link(b)
        numbers["linked_again_ms" if again.ok else "link_again"] = (
            _ms(again.seconds) if again.ok else f"{again.status}: {again.why}"
        )
        if not again.ok and not promised:
            # The connector's janitor does this on P before its D comes again.
            dropped = b.unlink(a, force=True)
            numbers["unlinked_by_b"] = dropped.status if dropped.ok else f"{dropped.status}: {dropped.why}"
            again = a.link(b)
        must(again, "LinkLlmClusters after a forced unlink")
        _pull_and_check(a, b, ours, theirs)
    return numbers


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
