"""Side channel as the connector's Python uses it; what hostile ends may do to each other: native/tests/channel_*.cc."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.channels import collect, wait_for
from support.pd import LOOPBACK, OTHER_TOKEN, TOKEN, WAIT_S
from support.wire import OWN

from vllm_datadist_connector.side_channel.client import (
    MAX_LEASES_PER_MESSAGE,
    ChannelClient,
    Confirmed,
    RankDescription,
    Refused,
    Released,
    Renewed,
    open_client,
)
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import ChannelServer, EndedLease, LeaseTable, Refusal, serve
from vllm_datadist_connector.wakeup import Wakeup, wait_readable

ENGINE_ID = "engine-\ud800"
"""Ids are texts of clients' and administrators': also one that UTF-8 has no form for comes through as it is."""


@pytest.fixture
def leases() -> LeaseTable:
    return LeaseTable(600.0)


@pytest.fixture
def server(leases: LeaseTable) -> Iterator[ChannelServer]:
    server = serve(Endpoint(LOOPBACK, 0), ENGINE_ID, TOKEN, leases, Trust())
    yield server
    server.close()


@pytest.fixture
def endpoint(server: ChannelServer) -> Endpoint:
    return Endpoint(LOOPBACK, server.port)


@pytest.fixture
def client() -> Iterator[ChannelClient]:
    client = open_client(Trust())
    yield client
    client.close()


def test_answers_go_to_their_requests(
    server: ChannelServer, endpoint: Endpoint, leases: LeaseTable, client: ChannelClient
) -> None:
    server.set_geometries({(0, 0): b"rank 0", (0, 1): b"rank 1"})
    token, generation = leases.grant("r", TOKEN, OTHER_TOKEN, 3, 60.0, 60.0)
    expected = {}
    for rank in (1, 0):
        sent = client.describe_rank(endpoint, ENGINE_ID, TOKEN, 0, rank, WAIT_S)
        expected[sent] = RankDescription(f"rank {rank}".encode())
    expected[client.renew(endpoint, (token, OTHER_TOKEN), WAIT_S)] = Renewed((OTHER_TOKEN,))
    expected[client.confirm(endpoint, token, generation, TOKEN, OTHER_TOKEN, WAIT_S)] = Confirmed(True, "")
    other_prompt = client.confirm(endpoint, token, generation, OTHER_TOKEN, OTHER_TOKEN, WAIT_S)
    expected[other_prompt] = Confirmed(False, "the lease is for another prompt")
    expected[client.release(endpoint, [token], WAIT_S)] = Released()
    expected[client.describe_rank(endpoint, "other", TOKEN, 0, 0, WAIT_S)] = Refused(
        "another instance lives at this address now"
    )
    answers = collect(client, len(expected))
    assert {sent: answer.response for sent, answer in answers.items()} == expected
    assert not any(answer.error or answer.timed_out for answer in answers.values())
    asked_by = f"process {os.getpid()}"
    assert leases.take_refused() == (1, [Refusal("r", asked_by, "the lease is for another prompt")])
    assert leases.take_ended() == [EndedLease("r", "released", asked_by)]


def test_a_full_batch_of_tokens_fits(endpoint: Endpoint, client: ChannelClient) -> None:
    tokens = (TOKEN,) * MAX_LEASES_PER_MESSAGE
    assert wait_for(client, client.renew(endpoint, tokens, WAIT_S)).response == Renewed(tokens)


def test_address_in_use_is_named(endpoint: Endpoint, leases: LeaseTable) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {endpoint}"):
        serve(endpoint, ENGINE_ID, TOKEN, leases, Trust())


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, leases: LeaseTable) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a" * 64)
    keys.chmod(0o644)
    with pytest.raises(ValueError, match=str(keys)):
        serve(Endpoint(LOOPBACK, 0), ENGINE_ID, TOKEN, leases, Trust(auth=str(keys)))
    with pytest.raises(ValueError, match=str(keys)):
        open_client(Trust(auth=str(keys)))


def test_no_answer_fails_at_its_deadline() -> None:
    client = open_client(Trust(insecure=True))
    with socket.create_server((LOOPBACK, 0)) as silent:
        endpoint = Endpoint(LOOPBACK, silent.getsockname()[1])
        started = time.monotonic()
        failed = wait_for(client, client.renew(endpoint, (), 0.2))
        assert failed.response is None
        assert failed.error == f"{endpoint} did not answer in time"
        assert failed.timed_out
        assert 0.2 <= time.monotonic() - started < WAIT_S
    client.close()


def test_where_nobody_listens_it_is_no_use_to_wait_or_to_ask_again(client: ChannelClient) -> None:
    with socket.create_server((OWN, 0)) as closed:
        endpoint = Endpoint(*closed.getsockname())
    failed = wait_for(client, client.renew(endpoint, (), 60.0))
    assert failed.error.startswith(f"{endpoint} does not let us connect: ")
    assert "refused" in failed.error
    assert not failed.timed_out


@pytest.mark.parametrize("host", ["not an address", "\ud800", ""])
def test_endpoints_that_cannot_be_dialled_come_back_as_failures(client: ChannelClient, host: str) -> None:
    failed = wait_for(client, client.renew(Endpoint(host, 1), (), WAIT_S))
    assert failed.response is None
    assert failed.error


@pytest.mark.parametrize("token", ["", TOKEN[1:], TOKEN.upper(), TOKEN + "\n", "\ud800" * 32])
def test_tokens_that_are_none_are_refused(endpoint: Endpoint, client: ChannelClient, token: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        client.renew(endpoint, (token,), WAIT_S)


HOLDS_THE_GIL = f"""
import ctypes, sys
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import LeaseTable, serve
leases = LeaseTable(600.0)
server = serve(Endpoint("{LOOPBACK}", 0), "p", "{TOKEN}", leases, Trust())
server.set_geometries({{(0, 0): b"geometry"}})
token, generation = leases.grant("r", "{TOKEN}", "{OTHER_TOKEN}", 1, 60.0, 60.0)
print(server.port, token, generation, flush=True)
ctypes.PyDLL(None).sleep(600)
"""
"""Functions of a PyDLL are called with the GIL held."""


def test_answers_do_not_wait_for_the_gil(client: ChannelClient) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS_THE_GIL], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port, token, generation = process.stdout.readline().split()
            endpoint = Endpoint(LOOPBACK, int(port))
            for _ in range(3):
                sent = client.confirm(endpoint, token, int(generation), TOKEN, OTHER_TOKEN, WAIT_S)
                assert wait_for(client, sent).response == Confirmed(True, "")
            described = wait_for(client, client.describe_rank(endpoint, "p", TOKEN, 0, 0, WAIT_S))
            assert described.response == RankDescription(b"geometry")
            assert process.poll() is None
        finally:
            process.kill()


EXITS = f"""
from vllm_datadist_connector.side_channel.client import open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import LeaseTable, serve
server = serve(Endpoint("{LOOPBACK}", 0), "p", "{TOKEN}", LeaseTable(600.0), Trust())
client = open_client(Trust())
client.renew(("{LOOPBACK}", server.port), (), 600.0)
"""


def test_a_process_ends_with_its_ends_open() -> None:
    subprocess.run([sys.executable, "-c", EXITS], check=True, timeout=300)


def test_waits_for_file_descriptors_and_for_time(endpoint: Endpoint, client: ChannelClient) -> None:
    wakeup = Wakeup()
    fds = [wakeup.fileno(), client.fileno()]
    assert wait_readable(fds, time.monotonic() + 0.05) == set()
    wakeup.set()
    assert wait_readable(fds, None) == {wakeup.fileno()}
    wakeup.clear()
    client.renew(endpoint, (), WAIT_S)
    assert wait_readable(fds, time.monotonic() + WAIT_S) == {client.fileno()}
    assert len(client.take()) == 1
    assert wait_readable(fds, time.monotonic()) == set()
    assert client.take() == []


def test_closes_twice_and_does_not_wait_for_what_is_outstanding(server: ChannelServer) -> None:
    client = open_client(Trust(insecure=True))
    with socket.create_server((LOOPBACK, 0)) as silent:
        client.renew(Endpoint(LOOPBACK, silent.getsockname()[1]), (), 10 * WAIT_S)
        started = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - started < WAIT_S
    server.close()
    server.close()
