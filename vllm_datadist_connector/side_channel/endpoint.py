"""Addresses of the side channel."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """IP literal (v4 or v6, without brackets) and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def zmq_url(endpoint: Endpoint) -> str:
    return f"tcp://{endpoint}"
