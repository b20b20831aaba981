"""What can be registered, and whether the bytes of a pull are right."""

from __future__ import annotations

from vllm_datadist_connector.selftest.bench import (
    Bench,
    End,
    Numbers,
    SkippedError,
    WrongError,
    moves_of,
    must,
)
from vllm_datadist_connector.selftest.party import ALLOCATOR, Outcome

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
OURS, THEIRS = 1, 2
"""Seeds of the patterns in the memory of A and of B."""

MOST_REGIONS = 1024
"""That are tried: a provider without a limit refuses none."""
REGION_BYTES = 4 * KIB
ADDRESS_COUNTS = (16, 128, 240, 241, 256, 512)
LARGE = 4 * GIB + 2 * MIB


def _check(a: End, moves: list[tuple[int, int, int]], what: str, numbers: Numbers) -> None:
    wrong = a.wrong_bytes("kv", OURS, THEIRS, moves)
    if wrong:
        raise WrongError(f"{what}: {wrong} bytes are wrong", {**numbers, "wrong_bytes": wrong})


def views_of_one_memory(bench: Bench) -> Numbers:
    """The same memory registered as blocks of several sizes on either side; a pull through each, byte for byte."""
    size, granules = 4 * MIB, (64 * KIB, 16 * KIB, 4 * KIB)
    numbers: Numbers = {"granules": list(granules), "bytes": size}
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", size, seed)
        ours, theirs = ([end.register("kv", each, size // each) for each in granules] for end in (a, b))
        must(a.link(b), "LinkLlmClusters")
        moves = []
        for number, granule in enumerate(granules):
            blocks = list(range(number, size // granule, 5))
            to_blocks = blocks[::-1]
            must(a.pull(b, theirs[number], ours[number], blocks, to_blocks), f"PullKvBlocks of {granule} bytes")
            moves += moves_of(blocks, to_blocks, granule)
            _check(a, moves, f"view of {granule} bytes", numbers)
    return numbers


def registrations(bench: Bench) -> Numbers:
    """How many distinct regions, and how many addresses in one registration, until the provider refuses; and whether
    one more view of a region that is registered is taken even then."""
    with bench.pair() as (a, _):
        a.allocate("kv", MOST_REGIONS * REGION_BYTES, None)
        refused, count = "", 0
        while count < MOST_REGIONS and not refused:
            outcome = a.try_register("kv", REGION_BYTES, 1, count * REGION_BYTES)
            refused = "" if outcome.ok else f"{outcome.status}: {outcome.why}"
            count += outcome.ok
        view = a.try_register("kv", REGION_BYTES // 2, 2)
    with bench.pair() as (a, _):
        a.allocate("kv", max(ADDRESS_COUNTS) * REGION_BYTES, None)
        addresses, told = 0, a.capabilities
        for repeat in ADDRESS_COUNTS:
            outcome = a.try_register("kv", REGION_BYTES, 1, repeat=repeat)
            if not outcome.ok:
                break
            addresses = repeat
    numbers: Numbers = {
        "regions": count,
        "regions_refused": refused or f"none of {MOST_REGIONS}",
        "view_of_a_registered_region": view.status if view.ok else f"{view.status}: {view.why}",
        "addresses_per_registration": addresses,
    }
    # The connector plans by what the provider told: less than that would fail at start.
    tried = (("max_regions", count, MOST_REGIONS), ("max_addrs_per_cache", addresses, max(ADDRESS_COUNTS)))
    for name, taken, most in tried:
        if min(told[name], most) > taken:
            raise WrongError(f"the provider's capability {name} is {told[name]}, it takes {taken}", numbers)
    if not view.ok:
        raise WrongError(
            "another view of a registered region counts as a region: the connector plans otherwise", numbers
        )
    return numbers


def unaligned_start(bench: Bench) -> Numbers:
    """Registrations that begin where no page does, as the views of hybrid models do."""
    size, block = MIB, 4 * KIB
    taken: dict[str, str] = {}
    numbers: Numbers = {"offsets": taken}
    for offset in (64 * KIB, 512, 2):
        with bench.pair() as (a, b):
            for end, seed in ((a, OURS), (b, THEIRS)):
                end.allocate("kv", size + 64 * KIB, seed)
            ours, theirs = (end.try_register("kv", block, size // block, offset) for end in (a, b))
            failed = next((each for each in (ours, theirs) if not each.ok), None)
            if failed is None:
                must(a.link(b), "LinkLlmClusters")
                blocks = list(range(0, size // block, 3))
                failed = a.pull(b, theirs.value, ours.value, blocks, blocks)
                if failed.ok:
                    _check(a, moves_of(blocks, blocks, block, offset), f"start {offset} bytes into memory", numbers)
            taken[str(offset)] = failed.status if failed.ok else f"{failed.status}: {failed.why}"
    if not any(each == "LLM_SUCCESS" for each in taken.values()):
        raise WrongError("no unaligned start is taken", numbers)
    return numbers


def region_over_4_gb(bench: Bench) -> Numbers:
    """One region of more than 4 GiB, and a pull of its last bytes."""
    if not bench.settings.large:
        raise SkippedError("needs --large, and 4 GiB on either end")
    block = 2 * MIB
    last = LARGE // block - 1
    with bench.pair() as (a, b):
        for end in (a, b):
            # Untouched: of host memory the kernel gives only what is used.
            end.allocate("kv", LARGE, None)
        ours, theirs = (end.try_register("kv", block, LARGE // block) for end in (a, b))
        for outcome in (ours, theirs):
            must(outcome, f"RegisterKvCache of {LARGE} bytes")
        b.call("write", int, name="kv", offset=last * block, value=0xA5, length=block)
        must(a.link(b), "LinkLlmClusters")
        outcome = must(a.pull(b, theirs.value, ours.value, [last], [last]), "PullKvBlocks")
        right = a.call("count", int, name="kv", offset=last * block, value=0xA5, length=block)
    numbers: Numbers = {"bytes": LARGE, "pull_ms": round(outcome.seconds * 1e3, 3)}
    if right != block:
        raise WrongError(f"{block - right} bytes beyond 4 GiB are wrong", numbers)
    return numbers


def expandable_segments(bench: Bench) -> Numbers:
    """Pulls into and out of memory whose pages came one after another behind reserved addresses, as those of torch's
    allocator do, and which grows while it is registered; and of memory that was there at once."""
    size, block = 32 * MIB, 64 * KIB
    blocks = list(range(0, size // block, 7))
    numbers: Numbers = {}
    for expandable, name in ((False, "off"), (True, "on")):
        with bench.pair(expandable) as (a, b):
            for end, seed in ((a, OURS), (b, THEIRS)):
                end.allocate("kv", size, seed)
            ours, theirs = (end.try_register("kv", block, size // block) for end in (a, b))
            failed = next((each for each in (ours, theirs, a.link(b)) if not each.ok), None)
            moves: list[tuple[int, int, int]] = []
            for to_blocks in (blocks, blocks[::-1]):
                failed = failed or a.pull(b, theirs.value, ours.value, blocks, to_blocks)
                if not failed.ok:
                    break
                moves += moves_of(blocks, to_blocks, block)
                _check(a, moves, f"expandable segments {name}", numbers)
                failed = None
                for end in (a, b):
                    end.call("grow", int, name="kv")
            numbers[name] = f"{failed.status}: {failed.why}" if failed else "LLM_SUCCESS"
        if failed:
            do = f": set {ALLOCATOR}=expandable_segments:False" if expandable else ""
            raise WrongError(f"memory with expandable segments {name} is not taken{do}", numbers)
    return numbers


def second_thread(bench: Bench) -> Numbers:
    """A pull from another thread than the one that made the endpoint: with EnterThread, and without."""
    size, block = MIB, 16 * KIB
    numbers: Numbers = {}
    for enters, name in ((True, "with_enter_thread"), (False, "without")):
        with bench.pair() as (a, b):
            for end, seed in ((a, OURS), (b, THEIRS)):
                end.allocate("kv", size, seed)
            ours, theirs = (end.register("kv", block, size // block) for end in (a, b))
            must(a.link(b), "LinkLlmClusters")
            args = a.pull_arguments(b, theirs, ours, [1, 5], [5, 2])
            outcome: Outcome = a.call("pull_in_thread", Outcome, a.pull_s, enter=enters, **args)
            numbers[name] = outcome.status if outcome.ok else f"{outcome.status}: {outcome.why}"
            if outcome.ok:
                _check(a, moves_of([1, 5], [5, 2], block), f"a pull in a thread, {name}", numbers)
            elif enters:
                raise WrongError("a pull in a thread fails, and the connector makes all of its pulls so", numbers)
    return numbers


def register_after_link(bench: Bench) -> Numbers:
    """Memory of B that is registered once the link stands."""
    size, block = MIB, 16 * KIB
    with bench.pair() as (a, b):
        for end, seed in ((a, OURS), (b, THEIRS)):
            end.allocate("kv", size, seed)
        ours = a.register("kv", block, size // block)
        must(a.link(b), "LinkLlmClusters")
        theirs = b.register("kv", block, size // block)
        outcome = a.pull(b, theirs, ours, [3], [4])
        told = bool(a.capabilities["register_before_link"])
        numbers: Numbers = {
            "pull": outcome.status if outcome.ok else f"{outcome.status}: {outcome.why}",
            "capability_register_before_link": told,
        }
        if outcome.ok:
            _check(a, moves_of([3], [4], block), "a pull of memory that was registered after the link", numbers)
    if not outcome.ok and not told:
        raise WrongError("the provider's capabilities say that this works", numbers)
    return numbers
