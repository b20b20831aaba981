"""One cell of the table from beginning to end, and what must hold in each."""

from __future__ import annotations

import contextlib

from scene import Scene
from strikes import MODES, prove_wire, strike
from support.party import PATIENCE_MS, wait_for_baseline, wait_until
from table import RESTARTS, Cell, is_patient
from trio import OWNER, Trio

SLACK_S = 10.0
"""What a call may take beyond its timeout on a busy machine: less than the patient wait."""

HEARD_S = 10.0
"""Within which the caller hears of a fault that the kernel tells of."""

OK, FAILED, TIMEOUT = "LLM_SUCCESS", "LLM_FAILED", "LLM_TIMEOUT"
NO_LINK, LINK_FAILED, UNLINK_FAILED = "LLM_NOT_YET_LINK", "LLM_LINK_FAILED", "LLM_UNLINK_FAILED"

DEATHS = ("kill", "restart", "reset")
SILENCE = ("stop", "swallow answers", "swallow both", "slow")
LINKING = ("dial", "handshake")


def allowed(cell: Cell) -> set[str]:
    """What the call may say."""
    if cell.fault == "fork":
        return {OK}
    if cell.phase == "pull" and cell.transport == "cma" and cell.fault not in DEATHS:
        return {OK}  # the owner takes no part
    if (cell.fault, cell.phase, cell.transport) == ("reset", "pull", "cma"):
        return {OK, FAILED}  # its bytes do not come by the wire: what was copied when the loss is noticed counts
    if cell.fault in ("descriptors", "memory"):
        return {OK, TIMEOUT, LINK_FAILED} if cell.phase in LINKING else {OK, FAILED, TIMEOUT}
    if cell.phase == "idle":
        return {NO_LINK, FAILED, OK, TIMEOUT} if cell.fault == "slow" else {NO_LINK, FAILED}
    if cell.fault == "swallow both" and cell.phase == "dial" and cell.transport == "cma":
        return {TIMEOUT, LINK_FAILED}  # in the end TCP is tried, where our wire does not listen
    if cell.fault in SILENCE:
        return {TIMEOUT}
    if cell.phase in LINKING:
        return {LINK_FAILED}
    return {UNLINK_FAILED, FAILED} if cell.phase == "unlink" else {FAILED}


def run_cell(trio: Trio, cell: Cell) -> None:
    before = {party: party.held() for party in trio.parties}
    if cell.fault == "restart":
        load = trio.start_load()
        for _ in range(RESTARTS):
            _meet_fault(trio, cell)
            trio.check_fresh_link()
        trio.end_load(load)
    else:
        _meet_fault(trio, cell)
        trio.check_fresh_link()
    for party in before.keys() & set(trio.parties):
        wait_for_baseline(party, before[party])
    for party in trio.parties:
        party.settle()
        party.check()


def _meet_fault(trio: Trio, cell: Cell) -> None:
    wire, port = trio.wire()
    with wire, contextlib.ExitStack() as lifts:
        scene = Scene(trio, cell, wire, port)
        with scene.fillers:
            scene.enter()
            strike(scene, lifts)
            if cell.fault == "exit":
                trio.check_healthy(trio.owner)
            else:
                _judge(scene)
    if cell.fault == "exit":
        trio.renew_caller()
        return
    trio.caller.ask("unlink", OWNER, port, PATIENCE_MS, True)
    if cell.fault in ("kill", "restart"):
        trio.renew_owner(trio.owner.port if cell.fault == "restart" else 0)
    elif cell.fault == "stop":
        trio.meet_again(trio.owner)


def _judge(scene: Scene) -> None:
    trio, cell = scene.trio, scene.cell
    if cell.phase == "idle":
        _notice(scene)
        scene.start_pull()
    trio.check_healthy(trio.caller)
    answer = scene.result()
    assert answer.seconds < (HEARD_S if is_patient(cell) else scene.timeout_ms / 1000 + SLACK_S)
    assert answer.status in allowed(cell), f"{answer.status}: {answer.why}"
    assert answer.status == OK or answer.why
    scene.settle(answer.status == OK)
    if cell.fault in MODES:
        prove_wire(scene)
    trio.caller.check()


def _notice(scene: Scene) -> None:
    """Nobody calls, and yet the caller learns of it where the link is lost."""
    caller, fault = scene.trio.caller, scene.cell.fault
    if fault in (*DEATHS, "stop", "swallow answers", "swallow both"):
        wait_until(lambda: not caller.ask("is_linked", OWNER).value, "the caller notices")
    elif fault == "slow":
        prove_wire(scene)
