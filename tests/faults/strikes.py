"""The faults: how each strikes a scene, how it proves that it did, and how it is lifted."""

from __future__ import annotations

import contextlib
import os
import resource
from functools import partial

from scene import Scene
from support.party import Party, wait_until
from support.wire import Mode

_TOO_MUCH = 64 << 20
"""Bytes that a process without memory cannot have."""


def owner_dies(scene: Scene, _lifts: contextlib.ExitStack) -> None:
    scene.trio.owner.kill()
    scene.go_on()


def owner_stops(scene: Scene, lifts: contextlib.ExitStack) -> None:
    scene.trio.owner.stop()
    lifts.callback(scene.trio.owner.go_on)
    scene.go_on()


def caller_exits(scene: Scene, _lifts: contextlib.ExitStack) -> None:
    """What it waits for is held until it has gone."""
    scene.trio.caller.start("exit")
    scene.thaw()
    scene.trio.caller.wait_exit()
    scene.go_on()


def both_fork(scene: Scene, lifts: contextlib.ExitStack) -> None:
    """The children live on, with nothing of their parents' connections."""
    caller, owner = scene.trio.caller, scene.trio.owner
    forks = [(party, party.start("fork")) for party in (caller, owner)]
    scene.thaw()
    for party, fork in forks:
        child = fork.result().value
        lifts.callback(party.ask, "reap", child)
        assert len(party.sockets()) > 1
        # It says that it exists before it has let go of them.
        wait_until(partial(_has_one_socket, party, child), "the child has the test's own socket only")
    scene.go_on()


def _has_one_socket(party: Party, pid: int) -> bool:
    return len(party.sockets(pid)) == 1


def owner_has_no_descriptor(scene: Scene, lifts: contextlib.ExitStack) -> None:
    owner = scene.trio.owner
    used = set(map(int, os.listdir(f"/proc/{owner.pid}/fd")))
    free = next(number for number in range(len(used) + 1) if number not in used)
    lifts.callback(owner.limit(resource.RLIMIT_NOFILE, free))
    assert not owner.ask("can_open").value
    scene.go_on()


def owner_has_no_memory(scene: Scene, lifts: contextlib.ExitStack) -> None:
    owner = scene.trio.owner
    lifts.callback(owner.limit(resource.RLIMIT_AS, owner.status_kib("VmSize") << 10))
    assert not owner.ask("can_map", _TOO_MUCH).value
    scene.go_on()


MODES: dict[str, Mode] = {
    "swallow answers": "swallow answers",
    "swallow both": "swallow both",
    "reset": "reset",
    "slow": "drip",
}


def wire_fails(scene: Scene, _lifts: contextlib.ExitStack) -> None:
    # A dial that nobody accepts is held where it is: see prove_wire.
    if scene.cell.phase != "dial" or scene.cell.fault == "reset":
        scene.go_on(MODES[scene.cell.fault])


def prove_wire(scene: Scene) -> None:
    """After the call."""
    fault, wire = scene.cell.fault, scene.wire
    if scene.cell.phase == "dial" and fault != "reset":
        if fault == "swallow both":
            assert scene.is_unanswered()
        assert wire.accepted == 0
        # What has been said meanwhile comes to nobody, or too late.
        wire.release("pass" if fault == "slow" else "swallow both")
        scene.fillers.close()
        wait_until(lambda: wire.accepted > 0, "what waits is accepted")
        return
    wait_until(
        lambda: (wire.resets if fault == "reset" else wire.dripped if fault == "slow" else wire.swallowed) > 0,
        f"the wire does {fault}",
    )


def strike(scene: Scene, lifts: contextlib.ExitStack) -> None:
    """`lifts`: what ends the fault."""
    {
        "kill": owner_dies,
        "restart": owner_dies,
        "stop": owner_stops,
        "exit": caller_exits,
        "fork": both_fork,
        "descriptors": owner_has_no_descriptor,
        "memory": owner_has_no_memory,
    }.get(scene.cell.fault, wire_fails)(scene, lifts)
