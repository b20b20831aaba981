"""What is reachable: the addresses that were named, nothing beside them, and nothing that answers HTTP."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.listeners import Address, listeners_of

LOOPBACKS = ["127.0.0.1", "127.0.0.2", "::1"]

INSTANCE = """
import json, sys
from vllm_datadist_connector import _native
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.side_channel.server import SideChannelServer

host = sys.argv[1]
engine = _native.LlmDataDist(7, 3)
options = {"llm.DeviceId": "0", "llm.ListenIpInfo": f"[{host}]:0" if ":" in host else f"{host}:0"}
assert engine.initialize(options) == _native.LLM_SUCCESS, _native.last_error()
side_channel = SideChannelServer(Endpoint(host, 0))
side_channel.start(lambda request: None)
print(json.dumps([engine.listen_port()[1], side_channel.endpoint.port]), flush=True)
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
        process.communicate("", timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("host", LOOPBACKS)
def test_cve_2025_47277_only_the_named_addresses_are_bound(host: str) -> None:
    """A helper that was told one address listened on all of them; an all-interfaces default does the same."""
    with instance(host) as (pid, told):
        assert listeners_of(pid) == told


def test_cve_2026_103765_no_listener_answers_http() -> None:
    """Metadata and management servers of other engines let anybody read, change and run things."""
    with instance("127.0.0.1") as (_, told):
        for host, port in told:
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("GET", "/metadata")
            with pytest.raises((http.client.BadStatusLine, ConnectionResetError)):
                connection.getresponse()
            connection.close()
