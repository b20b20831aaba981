"""Addresses of the side channel, and whom its ends take for a peer."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """IP literal (v4 or v6, without brackets) and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Trust(NamedTuple):
    """Of processes that are not of this user on this host: who knows a key, or anybody; neither: nobody."""

    auth: str = ""
    """Path of a key file."""
    insecure: bool = False
