"""Types of command line arguments that several commands take."""

from __future__ import annotations

import argparse
import ipaddress

from vllm_datadist_connector.side_channel.endpoint import Endpoint


def address(text: str) -> str:
    """An IP address: nothing here resolves names."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from None


def endpoint(text: str) -> Endpoint:
    """HOST:PORT or [HOST]:PORT, HOST being an IP address."""
    host, _, port = text.rpartition(":")
    try:
        at = Endpoint(str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), int(port))
    except ValueError:
        at = Endpoint("", -1)
    if not 0 <= at.port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, HOST being an IP address")
    return at
