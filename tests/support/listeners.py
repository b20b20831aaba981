"""What a process listens on, as the kernel has it: what a program says of itself is no proof."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

LISTENS, HAS_NO_PEER = "0A", "07"  # states of TCP and UDP sockets in /proc/net
Address = tuple[str, int]


def listeners_of(pid: int | str = "self") -> set[Address]:
    """Every TCP and UDP address at which a stranger's packet reaches the process."""
    inodes = _socket_inodes(pid)
    found: set[Address] = set()
    for table, family, state in (
        ("tcp", socket.AF_INET, LISTENS),
        ("tcp6", socket.AF_INET6, LISTENS),
        ("udp", socket.AF_INET, HAS_NO_PEER),
        ("udp6", socket.AF_INET6, HAS_NO_PEER),
    ):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                found.add(_address(family, fields[1]))
    return found


def _socket_inodes(pid: int | str) -> set[str]:
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if match:
            inodes.add(match[1])
    return inodes


def _address(family: socket.AddressFamily, text: str) -> Address:
    words, _, port = text.partition(":")
    raw = bytes.fromhex(words)
    # The kernel prints each word of 32 bits in the host's order.
    in_order = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return socket.inet_ntop(family, in_order), int(port, 16)
