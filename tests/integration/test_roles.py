"""Instances whose roles change under load: what a request was promised it gets, byte for byte, or it is computed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.pd import wait_until
from support.role_process import FAILED, LOCAL, PULLED, RoleProcess

from vllm_datadist_connector.cli import main

P_CLUSTER, D_CLUSTER = 100, 200
AT_ONCE, BLOCKS_EACH = 4, 8
LOWER, UPPER = 0, 256
"""What an instance gives lies below, what it takes above."""
TIMES = 20

StartInstance = Callable[[int], RoleProcess]


@pytest.fixture
def instances(resources: ExitStack) -> tuple[RoleProcess, RoleProcess]:
    def start(cluster_id: int) -> RoleProcess:
        instance = RoleProcess(cluster_id, claim_s=4.0)
        resources.callback(instance.kill)
        return instance

    return start(P_CLUSTER), start(D_CLUSTER)


@pytest.fixture
def p(instances: tuple[RoleProcess, RoleProcess]) -> RoleProcess:
    return instances[0]


@pytest.fixture
def d(instances: tuple[RoleProcess, RoleProcess]) -> RoleProcess:
    return instances[1]


def blocks_of(first: int, index: int) -> list[int]:
    return list(range(first + 1 + index * BLOCKS_EACH, first + 1 + (index + 1) * BLOCKS_EACH))


def serve(giver: RoleProcess, taker: RoleProcess, name: str) -> Counter[str]:
    """Some requests through both, as a router sends them; none may be lost."""
    names = [f"{name}-{index}" for index in range(AT_ONCE)]
    params = giver.prefill({each: blocks_of(LOWER, index) for index, each in enumerate(names)})
    taken = taker.take(giver, params, {each: blocks_of(UPPER, index) for index, each in enumerate(names)})
    assert sorted(taken) == names
    return Counter(taken.values())


def switch(instance: RoleProcess, role: str, drain_s: float = 30.0) -> None:
    assert main(["role", role, str(instance.endpoint), "--drain-s", str(drain_s)]) == 0


@pytest.fixture
def nothing_held(p: RoleProcess, d: RoleProcess) -> Iterator[None]:
    yield
    for instance in (p, d):
        wait_until(lambda instance=instance: instance.held()[:2] == (0, 0), "the end of all leases")  # type: ignore[misc]


@pytest.mark.usefixtures("nothing_held")
def test_each_does_what_its_role_says(p: RoleProcess, d: RoleProcess) -> None:
    everything, nothing = Counter({PULLED: AT_ONCE}), Counter({LOCAL: AT_ONCE})
    assert serve(p, d, "both") == everything
    assert p.held()[2] == d.held()[2] == 1
    switch(p, "prefill")
    assert p.held()[2] == 0, "its links are gone"
    assert serve(p, d, "gives") == everything
    assert serve(d, p, "takes not") == nothing
    switch(p, "decode")
    assert p.held()[2] == 0
    assert serve(p, d, "gives not") == nothing
    assert serve(d, p, "takes") == everything
    switch(p, "both")
    assert serve(p, d, "gives again") == serve(d, p, "takes again") == everything


@pytest.mark.usefixtures("nothing_held")
def test_a_lease_that_nobody_takes_is_waited_for_and_revoked(p: RoleProcess, d: RoleProcess) -> None:
    params = p.prefill({"late": blocks_of(LOWER, 0)})
    switch(p, "decode", drain_s=0.2)
    assert p.held()[0] == 0
    assert d.take(p, params, {"late": blocks_of(UPPER, 0)})["late"] in (LOCAL, FAILED)


@pytest.mark.usefixtures("nothing_held")
def test_back_and_forth_under_load(p: RoleProcess, d: RoleProcess) -> None:
    """Nothing fails but what a drain of no time has cut off."""
    ended = threading.Event()
    became: list[Counter[str]] = [Counter(), Counter()]
    rounds, faults = [0], []

    def load() -> None:
        try:
            while not ended.is_set():
                for which, (giver, taker) in enumerate(((p, d), (d, p))):
                    became[which] += serve(giver, taker, f"load-{rounds[0]}")
                rounds[0] += 1
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for index in range(TIMES):
            switch(p, "decode" if index % 2 == 0 else "prefill", drain_s=0.0 if index % 5 == 4 else 30.0)
            # One that began before the switch, and one in the new role.
            enough = rounds[0] + 2
            wait_until(lambda enough=enough: bool(faults) or rounds[0] >= enough, "requests in the new role")  # type: ignore[misc]
    finally:
        ended.set()
        thread.join()
    assert not faults, faults
    assert all(each[PULLED] and each[LOCAL] for each in became), became
