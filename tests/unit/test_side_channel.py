"""Side channel over real sockets: what peers may do to each other, and what they may not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from support.pd import LOOPBACK, TOKEN, WAIT_S

from vllm_datadist_connector.protocol.messages import (
    MAX_BODY_BYTES,
    Confirmed,
    Meta,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    Request,
    Response,
    decode_response,
    encode,
)
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel import client as client_module
from vllm_datadist_connector.side_channel.client import Answer, SideChannelClient
from vllm_datadist_connector.side_channel.endpoint import Endpoint, zmq_url
from vllm_datadist_connector.side_channel.server import SideChannelServer
from vllm_datadist_connector.wakeup import Wakeup


def renew(request_id: int) -> Request:
    return Renew(id=request_id, tokens=(TOKEN,))


def release(request_id: int) -> Request:
    return Release(id=request_id, tokens=())


def answer(request: Request) -> Response:
    if isinstance(request, Renew):
        return Renewed(id=request.id, gone=request.tokens)
    return Released(id=request.id)


def serve(handler: Callable[[Request], Response] = answer, endpoint: Endpoint | None = None) -> SideChannelServer:
    server = SideChannelServer(endpoint or Endpoint(LOOPBACK, 0))
    server.start(handler)
    return server


@pytest.fixture
def server() -> Iterator[SideChannelServer]:
    server = serve()
    yield server
    server.close()


@pytest.fixture
def client() -> Iterator[SideChannelClient]:
    client = SideChannelClient()
    yield client
    client.close()


@pytest.fixture
def raw() -> Iterator[Callable[[int], zmq.Socket[bytes]]]:
    """Sockets of no client of ours."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(kind: int) -> zmq.Socket[bytes]:
        made = context.socket(kind)
        made.linger, made.rcvtimeo = 0, int(WAIT_S * 1000)
        sockets.append(made)
        return made

    yield make
    context.destroy(linger=0)


def collect(client: SideChannelClient, count: int) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    end = time.monotonic() + WAIT_S
    while len(answers) < count and time.monotonic() < end:
        for one in client.wait([], end)[0]:
            assert one.id not in answers
            answers[one.id] = one
    return answers


def ask(client: SideChannelClient, endpoint: Endpoint, timeout_s: float = WAIT_S) -> Answer:
    sent = client.send(endpoint, renew, timeout_s)
    return collect(client, 1)[sent]


def test_answers_go_to_their_requests(server: SideChannelServer, client: SideChannelClient) -> None:
    renewals = [client.send(server.endpoint, renew, WAIT_S) for _ in range(50)]
    releases = [client.send(server.endpoint, release, WAIT_S) for _ in range(50)]
    answers = collect(client, 100)
    assert all(answers[i].response == Renewed(id=i, gone=(TOKEN,)) for i in renewals)
    assert all(answers[i].response == Released(id=i) for i in releases)


def test_address_in_use_is_named(server: SideChannelServer) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {server.endpoint}"):
        SideChannelServer(server.endpoint)


OUR_ENVELOPE = encode(Released(id=1))[:6]
OTHER_VERSION = b"DDSC\x09\x00\x80"

# Whoever loads it is gone.
PICKLE = b"cposix\n_exit\n(I9\ntR."

GARBAGE = {
    "the pickle of CVE-2025-32444": PICKLE,
    "empty": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "other version": OTHER_VERSION,
    "not UTF-8": OUR_ENVELOPE + b"\x81\xa4type\xa4\xff\xff\xff\xff",
    "nesting": OUR_ENVELOPE + b"\x91" * 100_000,
    "a response": encode(Released(id=1)),
    "as large as allowed": b"\0" * MAX_BODY_BYTES,
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE.keys())
def test_server_refuses_garbage_and_lives(
    server: SideChannelServer,
    client: SideChannelClient,
    raw: Callable[[int], zmq.Socket[bytes]],
    frame: bytes,
) -> None:
    dealer = raw(zmq.DEALER)
    dealer.connect(zmq_url(server.endpoint))
    dealer.send(frame)
    refusal = decode_response(dealer.recv())
    assert isinstance(refusal, Refused)
    assert refusal.id == 0
    assert ask(client, server.endpoint).response is not None


def test_foreign_version_is_told_both(server: SideChannelServer, raw: Callable[[int], zmq.Socket[bytes]]) -> None:
    dealer = raw(zmq.DEALER)
    dealer.connect(zmq_url(server.endpoint))
    dealer.send(OTHER_VERSION)
    reason = f"protocol version 9; this instance speaks {PROTOCOL_VERSION}"
    assert decode_response(dealer.recv()) == Refused(id=0, reason=reason)


def test_server_ignores_several_frames_and_cuts_oversize_ones(
    server: SideChannelServer, client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    dealer = raw(zmq.DEALER)
    dealer.connect(zmq_url(server.endpoint))
    dealer.send_multipart([b"a", encode(renew(1))])
    dealer.send(b"\0" * (MAX_BODY_BYTES + 1000))
    assert ask(client, server.endpoint).response is not None
    with socket.create_connection(server.endpoint) as stream:
        stream.sendall(b"\xff" * 64)
    assert ask(client, server.endpoint).response is not None


def test_server_survives_its_handler(client: SideChannelClient, caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Request) -> Response:
        if isinstance(request, Renew):
            raise KeyError("bug")
        return Meta(id=request.id, geometry=b"\0" * MAX_BODY_BYTES)

    server = serve(broken)
    try:
        for build in (renew, release):
            sent = client.send(server.endpoint, build, WAIT_S)
            assert collect(client, 1)[sent].response == Refused(id=sent, reason="internal error")
    finally:
        server.close()
    assert len(caplog.records) == 2


def test_a_peer_that_does_not_read_does_not_stop_the_others(
    server: SideChannelServer, client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    slow = raw(zmq.DEALER)
    slow.sndhwm = slow.rcvhwm = 1
    slow.sndtimeo = 100
    slow.connect(zmq_url(server.endpoint))
    request = encode(Renew(id=1, tokens=(TOKEN,) * 4096))
    with contextlib.suppress(zmq.Again):
        for _ in range(300):
            slow.send(request)
    assert ask(client, server.endpoint).response is not None


def test_no_answer_fails_at_its_deadline(client: SideChannelClient) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        endpoint = Endpoint(LOOPBACK, silent.getsockname()[1])
        started = time.monotonic()
        failed = ask(client, endpoint, timeout_s=0.2)
        assert failed.response is None
        assert failed.error == f"{endpoint} did not answer in time"
        assert failed.timed_out
        assert 0.2 <= time.monotonic() - started < 2


def test_where_nobody_listens_it_is_no_use_to_ask_again(client: SideChannelClient) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        endpoint = Endpoint(LOOPBACK, silent.getsockname()[1])
        assert ask(client, endpoint, timeout_s=0.1).timed_out
    failed = ask(client, endpoint, timeout_s=1.0)
    assert failed.error == f"{endpoint} does not let us connect"
    assert not failed.timed_out
    with socket.create_server((LOOPBACK, endpoint.port)):
        assert ask(client, endpoint, timeout_s=0.2).timed_out


def test_a_restarted_server_on_the_same_port_gets_nothing_meant_for_its_predecessor(client: SideChannelClient) -> None:
    first = serve()
    assert ask(client, first.endpoint).response is not None
    first.close()
    assert ask(client, first.endpoint, timeout_s=0.2).response is None

    seen: list[Request] = []

    def remember(request: Request) -> Response:
        seen.append(request)
        return answer(request)

    second = serve(remember, first.endpoint)
    try:
        again = ask(client, first.endpoint)
        assert again.response is not None
        assert [request.id for request in seen] == [again.id]
    finally:
        second.close()


@pytest.mark.parametrize(
    "reply",
    [b"garbage", PICKLE, OTHER_VERSION, encode(Refused(id=0, reason="too new")), encode(renew(1))],
    ids=["garbage", "the pickle of CVE-2025-30165", "version", "refused", "request"],
)
def test_a_server_that_breaks_the_protocol_fails_what_is_outstanding(
    client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]], reply: bytes
) -> None:
    router = raw(zmq.ROUTER)
    endpoint = Endpoint(LOOPBACK, router.bind_to_random_port(f"tcp://{LOOPBACK}"))
    sent = {client.send(endpoint, renew, WAIT_S) for _ in range(2)}
    identity, _ = router.recv_multipart()
    router.send_multipart([identity, reply])
    answers = collect(client, 2)
    assert set(answers) == sent
    assert all(one.response is None and str(endpoint) in one.error for one in answers.values())


def test_answers_that_nobody_asked_for_are_dropped(
    client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    router = raw(zmq.ROUTER)
    endpoint = Endpoint(LOOPBACK, router.bind_to_random_port(f"tcp://{LOOPBACK}"))
    sent = client.send(endpoint, renew, WAIT_S)
    identity, _ = router.recv_multipart()
    for reply_id in (sent + 1, sent, sent):
        router.send_multipart([identity, encode(Released(id=reply_id))])
    assert collect(client, 1) == {sent: Answer(sent, Released(id=sent), "")}


def test_an_answer_from_another_server_is_dropped(
    client: SideChannelClient, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    router = raw(zmq.ROUTER)
    liar = Endpoint(LOOPBACK, router.bind_to_random_port(f"tcp://{LOOPBACK}"))
    with socket.create_server((LOOPBACK, 0)) as silent:
        waiting = client.send(Endpoint(LOOPBACK, silent.getsockname()[1]), renew, WAIT_S)
        to_liar = client.send(liar, renew, WAIT_S)
        identity, _ = router.recv_multipart()
        router.send_multipart([identity, encode(Confirmed(id=waiting, held=True, reason=""))])
        router.send_multipart([identity, encode(Released(id=to_liar))])
        assert set(collect(client, 1)) == {to_liar}


def test_open_connections_are_bounded(client: SideChannelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ENDPOINTS", 3)
    servers = [serve() for _ in range(4)]
    try:
        answers = [ask(client, server.endpoint) for server in servers]
        assert [one.response is not None for one in answers] == [True, True, True, False]
        assert "more than 3 side channels" in answers[3].error
        monkeypatch.setattr(client_module, "IDLE_S", 0.0)
        client.wait([], time.monotonic())
        assert ask(client, servers[3].endpoint).response is not None
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize("host", ["not an address", "\ud800"])
def test_endpoints_that_cannot_be_dialled_come_back_as_failures(client: SideChannelClient, host: str) -> None:
    assert ask(client, Endpoint(host, 1)).response is None


def test_wait_returns_for_file_descriptors_and_for_time(client: SideChannelClient) -> None:
    wakeup = Wakeup()
    assert client.wait([wakeup.fileno()], time.monotonic() + 0.05) == ([], set())
    waker = threading.Thread(target=wakeup.set)
    waker.start()
    assert client.wait([wakeup.fileno()], time.monotonic() + WAIT_S) == ([], {wakeup.fileno()})
    waker.join()
    wakeup.clear()
    assert client.wait([wakeup.fileno()], time.monotonic()) == ([], set())


def test_close_does_not_wait_for_what_is_outstanding() -> None:
    client = SideChannelClient()
    with socket.create_server((LOOPBACK, 0)) as silent:
        client.send(Endpoint(LOOPBACK, silent.getsockname()[1]), renew, 60.0)
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 2


def test_server_closes_twice_and_before_it_has_started() -> None:
    server = SideChannelServer(Endpoint(LOOPBACK, 0))
    server.close()
    server.close()
    started = serve(endpoint=server.endpoint)
    started.close()
    started.close()
