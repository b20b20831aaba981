"""What is reachable: the addresses that were named, nothing beside them, and nothing that answers HTTP."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.endpoints import LOOPBACK, Endpoint
from support.listeners import Address, listeners_of

LOOPBACKS = ["127.0.0.1", "127.0.0.2", "::1"]

INSTANCE = """
import json, sys
from vllm_datadist_connector import _native
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import LeaseTable, serve

host = sys.argv[1]
engine = _native.LlmDataDist(7, 3)
options = {"llm.DeviceId": "0", "llm.ListenIpInfo": f"[{host}]:0" if ":" in host else f"{host}:0"}
assert engine.initialize(options) == _native.LLM_SUCCESS, _native.last_error()
side_channel = serve(Endpoint(host, 0), "engine", "0" * 32, LeaseTable(600.0), Trust())
print(json.dumps([engine.listen_port()[1], side_channel.port]), flush=True)
sys.stdin.read()
side_channel.close()
engine.finalize()
"""


@contextmanager
def instance(host: str) -> Iterator[tuple[int, set[Address]]]:
    """A process with all that listens in an instance: its pid, and the addresses that it was told."""
    with subprocess.Popen(
        [sys.executable, "-c", INSTANCE, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.pid, {(host, port) for port in json.loads(process.stdout.readline())}
        process.communicate("", timeout=300)
    assert process.returncode == 0


@pytest.mark.parametrize("host", LOOPBACKS)
def test_cve_2025_47277_only_the_named_addresses_are_bound(host: str) -> None:
    """A helper that was told one address listened on all of them; an all-interfaces default does the same."""
    with instance(host) as (pid, told):
        assert listeners_of(pid) == told


def said_to(address: Address, request: bytes) -> bytes:
    """What a listener answers within a second to who speaks another protocol; one that waits for more says nothing."""
    with socket.create_connection(address, timeout=1.0) as stream:
        stream.sendall(request)
        try:
            return stream.recv(4096)
        except (TimeoutError, ConnectionResetError):
            return b""


def test_cve_2026_103765_no_listener_answers_http() -> None:
    """Metadata and management servers of other engines let anybody read, change and run things."""
    with instance("127.0.0.1") as (_, told):
        for address in told:
            assert b"HTTP" not in said_to(address, b"GET /metadata HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.mark.parametrize("opcode", [0, 1, 2])
def test_cve_2026_103764_addresses_from_the_wire_are_never_used(
    make_endpoint: Callable[..., Endpoint], opcode: int
) -> None:
    """Another engine's header {size, address, opcode}, for memory of ours, at a port that lets anybody in."""
    engine = make_endpoint(cluster_id=1, options={"datadist.Insecure": "1"})
    before = engine.read_memory()
    size, address = 64, engine.memory.ctypes.data
    assert said_to((LOOPBACK, engine.port), struct.pack("<QQB", size, address, opcode) + b"\xee" * size) == b""
    assert (engine.read_memory() == before).all()
    make_endpoint(cluster_id=2).link(engine)


def test_what_listens_beside_is_seen() -> None:
    before = listeners_of()
    with socket.create_server(("", 0)) as everywhere, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind((LOOPBACK, 0))
        assert listeners_of() - before == {everywhere.getsockname(), datagrams.getsockname()}
