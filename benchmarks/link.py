"""A link of limited rate to a network namespace, where programs of a benchmark run as on another machine. Needs root.

Everything that crosses it is slowed down in either direction (tc's token bucket), and nothing else.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serving import ServingError, Started, spawn

NAMESPACE = "datadist-bench"
NEAR_DEVICE, FAR_DEVICE = "datadist0", "datadist1"
BURST = "256kb"


@dataclass(frozen=True)
class Link:
    near: str = "10.77.0.1"
    """Our own address."""
    far: str = "10.77.0.2"
    """That of the programs in the namespace."""

    def launch(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO) -> Started:
        """serving.spawn() in the namespace."""
        return spawn(["ip", "netns", "exec", NAMESPACE, *command], env, cwd, output)


@contextmanager
def throttled(rate: str) -> Iterator[Link]:
    """
    Args:
        rate: as tc writes it, such as 400mbit.

    Raises:
        ServingError: this user may not make one, or iproute2 is not installed.
    """
    if os.geteuid() != 0:
        raise ServingError("--link-rate needs root, to make a network namespace")
    link = Link()
    _run("ip", "netns", "add", NAMESPACE)
    try:
        _run("ip", "link", "add", NEAR_DEVICE, "type", "veth", "peer", "name", FAR_DEVICE, "netns", NAMESPACE)
        _run("ip", "address", "add", f"{link.near}/24", "dev", NEAR_DEVICE)
        _run("ip", "link", "set", NEAR_DEVICE, "up")
        _in_namespace("ip", "address", "add", f"{link.far}/24", "dev", FAR_DEVICE)
        _in_namespace("ip", "link", "set", FAR_DEVICE, "up")
        _in_namespace("ip", "link", "set", "lo", "up")
        shape = ("root", "tbf", "rate", rate, "burst", BURST, "latency", "50ms")
        _run("tc", "qdisc", "add", "dev", NEAR_DEVICE, *shape)
        _in_namespace("tc", "qdisc", "add", "dev", FAR_DEVICE, *shape)
        yield link
    finally:
        # The devices go with it.
        _run("ip", "netns", "delete", NAMESPACE)


def _in_namespace(*command: str) -> None:
    _run("ip", "netns", "exec", NAMESPACE, *command)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ServingError(f"{command[0]} is not installed (apt-get install iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise ServingError(f"{' '.join(command)}: {error.stderr.strip()}") from error
