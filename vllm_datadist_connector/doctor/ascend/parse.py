"""Files and outputs of Ascend's tools as values. Pure; what is not understood raises GarbledError with the line."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

_SHOWN = 120


class GarbledError(ValueError):
    """The text is not of the known form."""

    def __init__(self, what: str, text: str) -> None:
        shown = " | ".join(text.split("\n"))
        super().__init__(f"{what}: not understood: {shown[:_SHOWN]!r}")


class Chip(NamedTuple):
    """A row of `npu-smi info -m` that is an NPU."""

    npu: int
    chip: int
    logic: int
    physical: int | None
    """None where the driver's table has no such column."""
    name: str


def parse_hccn_conf(text: str) -> dict[int, str]:
    """Device addresses by physical id, of /etc/hccn.conf."""
    addresses: dict[int, str] = {}
    for line in text.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if not key or key.startswith("#"):
            continue
        if not equals:
            raise GarbledError("/etc/hccn.conf", line)
        found = re.fullmatch(r"address_(\d+)", key)
        if found:
            addresses[int(found[1])] = _address("/etc/hccn.conf", line, value)
    return addresses


def parse_ip(text: str) -> str:
    """Of `hccn_tool -i N -ip -g`."""
    found = re.search(r"^\s*ipaddr:\s*(\S+)", text, re.MULTILINE)
    if not found:
        raise GarbledError("hccn_tool -ip -g", text)
    return _address("hccn_tool -ip -g", found[0], found[1])


def parse_link(text: str) -> bool:
    """Whether `hccn_tool -i N -link -g` says that the link is up."""
    found = re.search(r"^\s*link status:\s*(UP|DOWN)\s*$", text, re.MULTILINE | re.IGNORECASE)
    if not found:
        raise GarbledError("hccn_tool -link -g", text)
    return found[1].upper() == "UP"


def parse_tls(text: str) -> bool:
    """Whether `hccn_tool -i N -tls -g` says that TLS is on."""
    found = re.search(r"\btls switch\s*\[([01])\]", text)
    if not found:
        raise GarbledError("hccn_tool -tls -g", text)
    return found[1] == "1"


def parse_npu_map(text: str) -> list[Chip]:
    """NPUs of `npu-smi info -m`, by their columns' names: drivers differ in which there are."""
    columns: list[str] = []
    chips: list[Chip] = []
    for line in text.splitlines():
        # Names of columns are words with single spaces, columns lie at least two apart or are cells without any.
        if "NPU ID" in line:
            columns = re.findall(r"NPU ID|Slot ID|Chip ID|Chip Logic ID|Chip Phy-ID|Chip Name", line)
            continue
        cells = line.split(None, len(columns) - 1) if columns else []
        if not cells:
            continue
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        if "-" in (row.get("Chip Logic ID"), row.get("Chip Phy-ID")):
            continue  # the card's controller
        try:
            physical = int(row["Chip Phy-ID"]) if "Chip Phy-ID" in row else None
            logic = int(row["Chip Logic ID"]) if "Chip Logic ID" in row else len(chips)
            chips.append(Chip(int(row["NPU ID"]), int(row["Chip ID"]), logic, physical, row["Chip Name"]))
        except (KeyError, ValueError):
            raise GarbledError("npu-smi info -m", line) from None
    if not chips:
        raise GarbledError("npu-smi info -m", text)
    return chips


def parse_visible(text: str) -> list[int]:
    """Of ASCEND_RT_VISIBLE_DEVICES: logical ids of the host, in the order of the process's own."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise GarbledError("ASCEND_RT_VISIBLE_DEVICES", text)
    return [int(word) for word in words]


def parse_info(text: str) -> dict[str, str]:
    """KEY=VALUE lines of version.info and *_install.info; others are passed over."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def version_numbers(text: str) -> tuple[int, int]:
    """Major and minor: of "8.5.0", "8.0.RC1", "9.1.0-beta.1"."""
    found = re.match(r"\s*(\d+)\.(\d+)", text)
    if not found:
        raise GarbledError("version", text)
    return int(found[1]), int(found[2])


def _address(what: str, line: str, text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise GarbledError(what, line) from None
