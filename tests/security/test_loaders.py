"""Nothing that builds objects out of bytes, anywhere: pickle is how most engines of this kind were taken over."""

from __future__ import annotations

import ast
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from support.endpoints import LOOPBACK, Endpoint

from vllm_datadist_connector.protocol.messages import Released, Renew, Request, Response
from vllm_datadist_connector.side_channel import endpoint as addresses
from vllm_datadist_connector.side_channel.client import SideChannelClient
from vllm_datadist_connector.side_channel.server import SideChannelServer

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vllm_datadist_connector", "tests", "tools", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
WAIT_S = 10.0

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj", "torch.load", "read_pickle", "unsafe_load"}


def unsafe_in(source: str) -> list[str]:
    """What in a program makes objects, or code, of bytes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if {function, function.rpartition(".")[2]} & UNSAFE_CALLS:
                found.append(f"line {node.lineno}: {function}()")
            if any(each.arg == "allow_pickle" for each in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
        found += [f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cve_2025_32444_and_its_copies_nothing_loads_objects(path: Path) -> None:
    """Tests and tools too: that is where the next copy comes from."""
    assert unsafe_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import a, marshal as b",
        "def f(s):\n    return s.recv_pyobj()",
        "import torch\ntorch.load(p)",
        "eval(text)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import pandas\npandas.read_pickle(p)",
    ],
)
def test_the_search_finds_each_way(source: str) -> None:
    assert unsafe_in(source)


def bomb(victim: Path) -> bytes:
    """A pickle, written by hand, that makes a file when it is loaded."""
    return b"cposix\nmkdir\n(V" + str(victim).encode() + b"\ntR."


@pytest.fixture
def side_channel() -> Iterator[SideChannelServer]:
    def answer(request: Request) -> Response:
        return Released(id=request.id)

    server = SideChannelServer(addresses.Endpoint(LOOPBACK, 0))
    server.start(answer)
    yield server
    server.close()


@pytest.fixture
def client() -> Iterator[SideChannelClient]:
    client = SideChannelClient()
    yield client
    client.close()


@pytest.fixture
def raw() -> Iterator[Callable[[int], zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def make(kind: int) -> zmq.Socket[bytes]:
        made = context.socket(kind)
        made.linger, made.rcvtimeo = 0, int(WAIT_S * 1000)
        return made

    yield make
    context.destroy(linger=0)


def ask(client: SideChannelClient, endpoint: addresses.Endpoint) -> Response | None:
    client.send(endpoint, lambda i: Renew(id=i, tokens=()), WAIT_S)
    ((answer,), _) = client.wait([], time.monotonic() + WAIT_S)
    return answer.response


def test_cve_2025_29783_a_server_does_not_load_what_it_is_sent(
    side_channel: SideChannelServer,
    client: SideChannelClient,
    raw: Callable[[int], zmq.Socket[bytes]],
    tmp_path: Path,
) -> None:
    dealer = raw(zmq.DEALER)
    dealer.connect(addresses.zmq_url(side_channel.endpoint))
    dealer.send(bomb(tmp_path / "loaded"))
    assert b"Refused" in dealer.recv()
    assert ask(client, side_channel.endpoint) is not None
    assert not (tmp_path / "loaded").exists()


def test_cve_2025_30165_a_client_does_not_load_what_it_is_answered(
    client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]], tmp_path: Path
) -> None:
    router = raw(zmq.ROUTER)
    liar = addresses.Endpoint(LOOPBACK, router.bind_to_random_port(f"tcp://{LOOPBACK}"))
    client.send(liar, lambda i: Renew(id=i, tokens=()), WAIT_S)
    identity, _ = router.recv_multipart()
    router.send_multipart([identity, bomb(tmp_path / "loaded")])
    ((answer,), _) = client.wait([], time.monotonic() + WAIT_S)
    assert answer.response is None
    assert not (tmp_path / "loaded").exists()


def test_cve_2026_103764_addresses_from_the_wire_are_never_used(
    make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., Endpoint]
) -> None:
    """Another engine's header {size, address, opcode}, for memory of ours, at a port that lets anybody in."""
    engine = make_endpoint(cluster_id=1, options={"datadist.Insecure": "1"})
    before = engine.read_memory()
    address, size = engine.memory.ctypes.data, 64
    for opcode in (0, 1, 2):
        with socket.create_connection((LOOPBACK, engine.port), timeout=WAIT_S) as stream:
            stream.sendall(struct.pack("<QQB", size, address, opcode) + b"\xee" * size)
            try:
                answer = stream.recv(4096)
            except ConnectionResetError:
                answer = b""
            assert answer == b"", "not a byte for who does not speak our protocol"
    assert (engine.read_memory() == before).all()
    make_peer("cma", cluster_id=2).link(engine)
