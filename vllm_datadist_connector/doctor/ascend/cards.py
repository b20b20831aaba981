"""NPUs that the instance will use: their ids, addresses, links and TLS."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from vllm_datadist_connector.doctor.ascend.parse import (
    GarbledError,
    parse_hccn_conf,
    parse_ip,
    parse_link,
    parse_npu_map,
    parse_tls,
    parse_visible,
)
from vllm_datadist_connector.doctor.deployment import Deployment
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.machine import Machine

T = TypeVar("T")
HCCN_CONF = "/etc/hccn.conf"
TOOL = "hccn_tool"
_TOOL_FOLDER = "/usr/local/Ascend/driver/tools"
_MOUNT = f"start the container with -v {HCCN_CONF}:{HCCN_CONF} -v {_TOOL_FOLDER}:{_TOOL_FOLDER}"


@dataclass(slots=True)
class Cards:
    """Physical ids in the order of a process's logical ones."""

    physical: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def davinci(machine: Machine) -> list[int]:
    """Physical ids of the cards whose device files are here."""
    names = (re.fullmatch(r"davinci(\d+)", path.name) for path in machine.glob("/dev/davinci*"))
    return sorted(int(found[1]) for found in names if found)


def find_cards(machine: Machine, deployment: Deployment) -> Cards:
    name, devices = "NPUs", davinci(machine)
    if not devices:
        do = "start the container with --device /dev/davinciN for each card, or look at `npu-smi info` on the host"
        return Cards(findings=[Finding(name, "wrong", "no /dev/davinciN", do)])
    cards = Cards()
    by_logic = dict(enumerate(devices))
    ran = machine.run("npu-smi", "info", "-m")
    try:
        if ran is None or ran.status:
            found = "npu-smi info -m does not run: ids are taken from the names of device files"
            cards.findings.append(Finding("npu-smi", "warning", found, "mount npu-smi into the container"))
        else:
            chips = parse_npu_map(ran.output)
            by_logic |= {chip.logic: chip.physical for chip in chips if chip.physical is not None}
        visible = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        logic = parse_visible(visible) if visible else sorted(by_logic)
    except GarbledError as error:
        cards.findings.append(Finding(name, "wrong", str(error), "correct it; an output of npu-smi: report this text"))
        return cards
    absent = [each for each in logic if each not in by_logic]
    if absent:
        found = f"ASCEND_RT_VISIBLE_DEVICES names {absent}, there are {sorted(by_logic)}"
        cards.findings.append(Finding(name, "wrong", found, "name cards that are there"))
        return cards
    cards.physical = [by_logic[each] for each in logic]
    shown = ", ".join(f"{mine} is {physical}" for mine, physical in enumerate(cards.physical))
    ranks = deployment.serve.ranks
    if ranks > len(cards.physical):
        found = f"{ranks} worker ranks, {len(cards.physical)} cards (logical ids are physical ones: {shown})"
        cards.findings.append(Finding(name, "wrong", found, "give the instance a card for each rank"))
    else:
        cards.findings.append(Finding(name, "ok", f"logical ids are physical ones: {shown}"))
    return cards


def check_addresses(machine: Machine, cards: Cards) -> list[Finding]:
    """Each card's device address, by the file that the library reads and by the tool that it asks otherwise."""
    name, text = "device addresses", machine.read(HCCN_CONF)
    try:
        written = parse_hccn_conf(text) if text is not None else {}
    except GarbledError as error:
        return [Finding(name, "wrong", str(error), f"make {HCCN_CONF} anew from the host's, KEY=VALUE by line")]
    found: dict[int, str] = {}
    for card in cards.physical:
        address = written.get(card) or _ask(machine, card, "-ip", parse_ip)
        if isinstance(address, GarbledError) or address is None:
            why = str(address or f"no address_{card} in {HCCN_CONF}, and {TOOL} does not run")
            if text is None:
                why = f"{HCCN_CONF} cannot be read; {why}"
            return [Finding(name, "wrong", f"card {card}: {why}", _MOUNT)]
        found[card] = address
    twice = {address for address in found.values() if list(found.values()).count(address) > 1}
    if twice:
        return [Finding(name, "wrong", f"{sorted(twice)} are of several cards: {found}", "give each its own address")]
    shown = ", ".join(f"card {card} {address}" for card, address in found.items())
    where = HCCN_CONF if text is not None else f"{TOOL}, as {HCCN_CONF} cannot be read"
    return [Finding(name, "ok", f"{shown}, by {where}")]


def check_links(machine: Machine, cards: Cards) -> list[Finding]:
    """Of the cards' ports. Atlas A3 has other links within a super pod, too, which this does not see."""
    links = {card: _ask(machine, card, "-link", parse_link) for card in cards.physical}
    switches = {card: _ask(machine, card, "-tls", parse_tls) for card in cards.physical}
    if None in links.values():
        found = f"{TOOL} does not run: neither links nor TLS are known"
        return [Finding("links", "warning", found, f"{_MOUNT}; as root: {TOOL} -i N -link -g")]
    return [_link_finding(links), _tls_finding(switches)]


def _link_finding(links: dict[int, bool | GarbledError | None]) -> Finding:
    garbled = [each for each in links.values() if isinstance(each, GarbledError)]
    if garbled:
        return Finding("links", "warning", str(garbled[0]), "report this text")
    down = [card for card, up in links.items() if not up]
    if down:
        do = f"look at cables and switch: {TOOL} -i {down[0]} -link_stat -g"
        return Finding("links", "wrong", f"of cards {down}: down", do)
    return Finding("links", "ok", "up")


def _tls_finding(switches: dict[int, bool | GarbledError | None]) -> Finding:
    strange = [each for each in switches.values() if not isinstance(each, bool)]
    if strange:
        return Finding("TLS", "warning", str(strange[0] or f"{TOOL} -tls -g does not run"), "report this text")
    on = [card for card, switch in switches.items() if switch]
    if on and len(on) < len(switches):
        do = f"{TOOL} -i N -tls -s enable 0 on all cards of both hosts, or 1 on all"
        return Finding("TLS", "wrong", f"on for cards {on}, off for the others: these cannot link with each other", do)
    state = "on" if on else "off"
    return Finding("TLS", "ok", f"{state} on all cards: it must be {state} on the other host as well")


def _ask(machine: Machine, card: int, what: str, parse: Callable[[str], T]) -> T | GarbledError | None:
    """None where the tool is not there; an error where it says what is not understood."""
    ran = machine.run(TOOL, "-i", str(card), what, "-g")
    if ran is None:
        ran = machine.run(str(machine.path(f"{_TOOL_FOLDER}/{TOOL}")), "-i", str(card), what, "-g")
    if ran is None:
        return None
    try:
        return parse(ran.output)
    except GarbledError as error:
        return error
