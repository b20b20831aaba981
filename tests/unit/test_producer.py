"""ProducerScheduler: what is held of which request, and what a D is answered."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.channels import wait_for
from support.d_requests import counted
from support.pd import BLOCK_SIZE, LOOPBACK, OTHER_TOKEN, TO_P, TOKEN, WAIT_S, finish, make_request
from vllm.v1.request import RequestStatus

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.digest import blocks_digest, prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY, RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.scheduler import producer as producer_module
from vllm_datadist_connector.scheduler.identity import InstanceIdentity, digest_of
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.side_channel.client import (
    ChannelClient,
    Confirmed,
    RankDescription,
    Refused,
    Released,
    Renewed,
    open_client,
)
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

IDENTITY = InstanceIdentity("engine-p", tp_size=2, pp_size=1, dcp_size=1, groups=(KVGroup(BLOCK_SIZE),))
BLOCKS = [7, 3, 5, 9]
LEASE_S = 30.0
PROMPT = list(range(3 * BLOCK_SIZE - 5))


@pytest.fixture
def meter() -> SchedulerMeter:
    return SchedulerMeter("engine-p")


@pytest.fixture
def producer(meter: SchedulerMeter) -> Iterator[ProducerScheduler]:
    producer = ProducerScheduler(IDENTITY, Endpoint(LOOPBACK, 0), 600.0, Trust(), meter=meter)
    yield producer
    producer.close()


@pytest.fixture
def client() -> Iterator[ChannelClient]:
    client = open_client(Trust())
    yield client
    client.close()


def ask(client: ChannelClient, producer: ProducerScheduler, kind: str, **fields: Any) -> object:
    """The answer to the client's request of that name."""
    answer = wait_for(client, getattr(client, kind)(producer.endpoint, **fields, timeout_s=WAIT_S))
    assert answer.response is not None, answer.error
    return answer.response


def heard(producer: ProducerScheduler, meter: SchedulerMeter) -> dict[str, int]:
    """What was counted since the last call."""
    producer.hear()
    return counted(meter)


def hold(producer: ProducerScheduler, request_id: str = "cmpl-a-0-00000000") -> RemotePrefill:
    held, params = producer.request_finished(finish(make_request(PROMPT, TO_P, request_id)), (BLOCKS,), LEASE_S)
    assert held
    return parse_remote_prefill(params)


def confirmation(remote: RemotePrefill, **changes: Any) -> dict[str, Any]:
    ticket = remote.ticket
    values = {
        "token": ticket.token,
        "generation": ticket.generation,
        "prompt_digest": ticket.prompt_digest,
        "blocks_digest": blocks_digest(remote.remote_block_ids),
    }
    return values | changes


def test_params_of_a_held_request(producer: ProducerScheduler) -> None:
    request = finish(make_request(PROMPT, TO_P))
    held, params = producer.request_finished(request, (BLOCKS,), LEASE_S)
    assert held
    remote = parse_remote_prefill(params)
    # Blocks past the computed tokens, which 0.23 hands over, hold nothing.
    assert remote.remote_block_ids == ((7, 3, 5),)
    assert remote.remote_num_tokens == len(PROMPT)
    assert (remote.remote_engine_id, remote.remote_request_id) == ("engine-p", request.request_id)
    assert (remote.remote_host, remote.remote_port) == producer.endpoint
    assert (remote.ticket.incarnation, remote.ticket.lease_s) == (IDENTITY.incarnation, LEASE_S)
    assert remote.ticket.block_sizes == (BLOCK_SIZE,)
    assert remote.ticket.prompt_digest == digest_of(request, len(PROMPT), "") == prompt_digest(PROMPT)
    assert (params["tp_size"], params["pp_size"], params["dcp_size"]) == (2, 1, 1)
    assert producer.held() == (1, 3)


HELD = {RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED}


@pytest.mark.parametrize("status", [status for status in RequestStatus if RequestStatus.is_finished(status)])
def test_held_by_how_it_ended(producer: ProducerScheduler, status: RequestStatus) -> None:
    held, params = producer.request_finished(finish(make_request(PROMPT, TO_P), status), (BLOCKS,), LEASE_S)
    assert held is (status in HELD)
    assert (EXTRA_KEY in params) is held
    assert params["remote_block_ids"] == ([[7, 3, 5]] if held else [[]])
    assert params["remote_num_tokens"] == (len(PROMPT) if held else 0)


@pytest.mark.parametrize(
    "request_id", ["cmpl-a-0-0123abcd", "cmpl-a-1-0123abcd", "0_cmpl-a-0-0123abcd", "5_abc_0-0123abcd", "5_abc_0"]
)
def test_a_name_tells_nothing(producer: ProducerScheduler, request_id: str) -> None:
    """A client's `request_id` of /v1/responses looks like a child of n > 1 of vLLM's own naming."""
    assert producer.request_finished(finish(make_request(PROMPT, TO_P, request_id)), (BLOCKS,), LEASE_S)[0]


def test_embeddings_are_not_held(producer: ProducerScheduler) -> None:
    request = make_request([0] * len(PROMPT), TO_P, prompt_embeds=torch.zeros(len(PROMPT), 4))
    assert producer.request_finished(finish(request), (BLOCKS,), LEASE_S)[0] is False


def test_nothing_computed_is_not_held(producer: ProducerScheduler) -> None:
    request = finish(make_request(PROMPT, TO_P))
    request.num_computed_tokens = 0
    assert producer.request_finished(request, (BLOCKS,), LEASE_S)[0] is False


def test_each_lease_lasts_as_long_as_asked(producer: ProducerScheduler) -> None:
    """A request's D comes at once, a conversation's next turn when its user has read the answer."""
    for index, lease_s in enumerate((0.01, 480.0)):
        request = finish(make_request(PROMPT, TO_P, f"cmpl-{index}-0-00000000"))
        held, params = producer.request_finished(request, (BLOCKS,), lease_s)
        assert held
        assert params[EXTRA_KEY]["lease_s"] == lease_s
    ended: tuple[str, ...] = ()
    end = time.monotonic() + WAIT_S
    while not ended and time.monotonic() < end:
        ended = producer.take_ended()
    assert ended == ("cmpl-0-0-00000000",)
    assert producer.held() == (1, 3)


def test_release_gives_back_once(producer: ProducerScheduler, meter: SchedulerMeter, client: ChannelClient) -> None:
    remote = hold(producer)
    for _ in range(2):
        assert ask(client, producer, "release", tokens=(remote.ticket.token,)) == Released()
    assert producer.take_ended() == (remote.remote_request_id,)
    assert producer.take_ended() == ()
    assert heard(producer, meter) == {"leases_ended:released": 1}
    assert heard(producer, meter) == {}
    assert producer.held() == (0, 0)


def test_expiry_gives_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A D that fell silent is worth a warning; nobody's asking is how every answer without params ends."""
    caplog.set_level(logging.INFO)
    claim_s = 1.0  # within which the one is renewed, however busy the machine is
    meter = SchedulerMeter("engine-p")
    producer = ProducerScheduler(IDENTITY, Endpoint(LOOPBACK, 0), 600.0, Trust(), claim_s=claim_s, meter=meter)
    try:
        silent, orphan = "cmpl-late-0-00000000", "1_cmpl-late-0-00000000"
        requests = [finish(make_request(PROMPT, TO_P, name)) for name in (silent, orphan)]
        tickets = [producer.request_finished(request, (BLOCKS,), 2 * claim_s)[1][EXTRA_KEY] for request in requests]
        assert producer.leases.renew([tickets[0]["token"]], by="10.0.0.1:4567") == ()
        ended: tuple[str, ...] = ()
        end = time.monotonic() + WAIT_S
        while len(ended) < 2 and time.monotonic() < end:
            ended += producer.take_ended()
        assert ended == (orphan, silent)
        assert heard(producer, meter) == {"leases_ended:expired": 1, "leases_ended:unclaimed": 1}
        levels = [(record.levelno, record.message.split()[1]) for record in caplog.records]
        assert levels == [(logging.INFO, f"{orphan}:"), (logging.WARNING, f"{silent}:")]
        assert "its D, 10.0.0.1:4567, fell silent" in caplog.text
    finally:
        producer.close()


def test_who_asks_for_nothing_does_not_make_counts_grow(producer: ProducerScheduler, meter: SchedulerMeter) -> None:
    """vLLM 0.23 takes a scheduler's statistics only while a worker has some."""
    for index in range(100):
        hold(producer, f"cmpl-{index}-0-00000000")
        assert producer.leases.revoke("all", 0.0, 1) == 1
        producer.take_ended()
    assert (len(producer._ended), len(meter._counts)) == (0, 1)
    assert heard(producer, meter) == {"leases_ended:revoked": 100}


class TestPause:
    def test_what_nobody_pulls_is_given_up(self, producer: ProducerScheduler) -> None:
        waiting, pulled, left = (hold(producer, f"cmpl-{index}-0-00000000") for index in range(3))
        producer.leases.renew([waiting.ticket.token])
        producer.leases.renew([pulled.ticket.token], pulling=True)
        producer.set_paused(True)
        assert producer.take_ended() == (waiting.remote_request_id, left.remote_request_id)
        assert producer.held() == (1, 3)
        # A renewal that means no progress keeps nothing.
        producer.leases.renew([pulled.ticket.token])
        assert producer.take_ended() == (pulled.remote_request_id,)

    def test_a_pull_is_waited_for_so_long(self, producer: ProducerScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a D that is paused itself, and will never say that it is done."""
        monkeypatch.setattr(producer_module, "_PULL_GRACE_S", 0.0)
        pulled = hold(producer)
        producer.leases.renew([pulled.ticket.token], pulling=True)
        producer.set_paused(True)
        assert producer.take_ended() == (pulled.remote_request_id,)

    def test_nothing_is_held_until_it_ends(self, producer: ProducerScheduler) -> None:
        producer.set_paused(True)
        held, params = producer.request_finished(finish(make_request(PROMPT, TO_P)), (BLOCKS,), LEASE_S)
        assert not held
        assert EXTRA_KEY not in params
        producer.set_paused(False)
        hold(producer)
        assert producer.take_ended() == ()


def test_renew_tells_what_is_gone(producer: ProducerScheduler, client: ChannelClient) -> None:
    token = hold(producer).ticket.token
    assert ask(client, producer, "renew", tokens=(token, OTHER_TOKEN)) == Renewed((OTHER_TOKEN,))


def test_confirm(
    producer: ProducerScheduler, meter: SchedulerMeter, client: ChannelClient, caplog: pytest.LogCaptureFixture
) -> None:
    remote = hold(producer)
    assert ask(client, producer, "confirm", **confirmation(remote)) == Confirmed(True, "")
    changed = {"blocks_digest": blocks_digest(((3, 7, 5),)), "generation": 99, "prompt_digest": TOKEN, "token": TOKEN}
    for name, value in changed.items():
        refused = ask(client, producer, "confirm", **confirmation(remote, **{name: value}))
        assert isinstance(refused, Confirmed)
        assert not refused.held
        assert refused.reason
    assert heard(producer, meter) == {"refused_confirms": 4, "served_requests": 1, "served_blocks": 3}
    assert heard(producer, meter) == {}
    d = f"process {os.getpid()}"
    begins = [
        f"request {remote.remote_request_id}: refused to confirm a pull of {d}: ",
        f"a request that we do not remember: refused to confirm a pull of {d}: ",
    ]
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [[message.startswith(begin) for begin in begins] for message in messages] == [[True, False]] * 3 + [
        [False, True]
    ]
    ask(client, producer, "release", tokens=(remote.ticket.token,))
    late = ask(client, producer, "confirm", **confirmation(remote))
    assert isinstance(late, Confirmed)
    assert not late.held
    assert heard(producer, meter) == {"refused_confirms": 1, "leases_ended:released": 1}
    assert caplog.records[-1].message == begins[0] + late.reason


def test_describe_rank(producer: ProducerScheduler, client: ChannelClient) -> None:
    producer.set_geometries({(0, 0): b"rank 0", (0, 1): b"rank 1"})
    good: dict[str, Any] = {
        "engine_id": "engine-p",
        "incarnation": IDENTITY.incarnation,
        "pp_rank": 0,
        "tp_rank": 1,
    }
    assert ask(client, producer, "describe_rank", **good) == RankDescription(b"rank 1")
    for changes in ({"engine_id": "other"}, {"incarnation": TOKEN}):
        refused = ask(client, producer, "describe_rank", **(good | changes))
        assert isinstance(refused, Refused)
        assert "another instance" in refused.reason
    refused = ask(client, producer, "describe_rank", **(good | {"tp_rank": 2}))
    assert isinstance(refused, Refused)
    assert "(0, 2); there are [(0, 0), (0, 1)]" in refused.reason


def test_a_large_table_of_several_groups_is_confirmed(client: ChannelClient) -> None:
    """By its digest: repeated, so many ids are more than a message may have."""
    groups = tuple(KVGroup(BLOCK_SIZE) for _ in range(4))
    identity = InstanceIdentity("engine-p", tp_size=1, pp_size=1, dcp_size=1, groups=groups)
    producer = ProducerScheduler(identity, Endpoint(LOOPBACK, 0), 600.0, Trust())
    try:
        length = 65536 * BLOCK_SIZE
        tables = [list(range(1 + group, 65537 + group)) for group in range(4)]
        held, params = producer.request_finished(finish(make_request(range(length), TO_P)), tables, LEASE_S)
        assert held
        remote = parse_remote_prefill(params)
        assert producer.held() == (1, 4 * 65536)
        assert ask(client, producer, "confirm", **confirmation(remote)) == Confirmed(True, "")
    finally:
        producer.close()
