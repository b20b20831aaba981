"""Relief: when leases are given up for the head of the queue, and which."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.clock import Clock
from support.counting_keeper import CountingKeeper
from support.pd import BLOCK_SIZE, LOOPBACK, TO_P, finish, make_request

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.params import RemotePrefill, parse_remote_prefill
from vllm_datadist_connector.scheduler import relief as relief_module
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.scheduler.relief import Relief
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

GROUPS = (KVGroup(BLOCK_SIZE),)
IDENTITY = InstanceIdentity("engine-p", tp_size=1, pp_size=1, dcp_size=1, groups=GROUPS)
PROMPT = list(range(3 * BLOCK_SIZE))
HEAD = "head"


class Instance:
    """P and D, or P alone; vLLM's scheduler stands still."""

    def __init__(self, is_consumer: bool = True) -> None:
        self.producer = ProducerScheduler(IDENTITY, Endpoint(LOOPBACK, 0), 600.0, Trust())
        self.consumer = ConsumerScheduler(
            GROUPS,
            allows_peer=lambda _: True,
            recv_deadline_s=60.0,
            answer_timeout_s=5.0,
            trust=Trust(),
            recompute_threshold=None,
            ourselves=(self.producer.endpoint, IDENTITY.incarnation),
        )
        self.clock = Clock()
        self.relief = Relief(self.producer, self.consumer if is_consumer else None, self.clock)
        self.relief.arrived(HEAD)

    def close(self) -> None:
        for name in ("pulling", "waiting", "first", "last", "head", "other", "pulled"):
            self.consumer.request_finished(f"d-{name}")
        self.producer.close()

    def hold(self, name: str) -> RemotePrefill:
        request = finish(make_request(PROMPT, TO_P, name))
        held, params = self.producer.request_finished(request, ([1, 2, 3],), 30.0)
        assert held
        return parse_remote_prefill(params)

    def decode(self, name: str) -> RemotePrefill:
        """A D request of our own whose P is ourselves."""
        _, params = self.producer.request_finished(finish(make_request(PROMPT, TO_P, name)), ([1, 2, 3],), 30.0)
        remote = parse_remote_prefill(params)
        self.producer.leases.renew([remote.ticket.token])
        self.consumer.on_new_request(make_request(PROMPT, params, f"d-{name}"))
        self.relief.arrived(f"d-{name}")
        return remote

    def stall(self, seconds: float, asked: str | None = HEAD, tokens: int = 0) -> list[str]:
        """Of steps of one tenth of that, the leases that ended in them."""
        ended: list[str] = []
        for _ in range(10):
            self.clock.now += seconds / 10
            if asked is not None:
                self.relief.asked(asked)
            self.relief.step(tokens)
            ended += self.producer.take_ended()
        return ended


@pytest.fixture
def instance(keeper: CountingKeeper) -> Iterator[Instance]:
    del keeper
    instance = Instance()
    yield instance
    instance.close()


def test_own_requests_that_wait_behind_the_head_give_their_blocks(instance: Instance) -> None:
    first, last = instance.decode("first"), instance.decode("last")
    assert instance.stall(0.1) == ["last"], "one, and the next when its blocks are back"
    assert instance.consumer.matched_tokens(make_request(PROMPT, None, "d-last"), 0) == 0
    assert instance.consumer.matched_tokens(make_request(PROMPT, None, "d-first"), 0) == len(PROMPT) - 1
    instance.producer.sent(1)
    assert instance.stall(0.1) == ["first"]
    assert instance.producer.leases.renew([first.ticket.token, last.ticket.token]) != ()


def test_the_head_gives_its_own_first(instance: Instance) -> None:
    for name in ("head", "other"):
        instance.decode(name)
    assert instance.stall(0.1, asked="d-head") == ["head"]


def test_what_is_being_pulled_stays(instance: Instance) -> None:
    remote = instance.decode("pulled")
    instance.producer.leases.renew([remote.ticket.token], pulling=True)
    assert instance.stall(10.0) == []


def test_whoever_pulls_here_ends_by_itself(instance: Instance) -> None:
    instance.decode("waiting")
    remote = instance.decode("pulling")
    request = make_request(PROMPT, None, "d-pulling")
    instance.consumer.after_alloc(request, ([4, 5, 6],), len(PROMPT) - 1)
    assert instance.stall(10.0) == []
    instance.consumer.received(["d-pulling"])
    assert instance.stall(0.1) == ["waiting"]
    assert instance.producer.leases.renew([remote.ticket.token]) == ()


def test_steps_that_run_something_are_none_to_help(instance: Instance) -> None:
    instance.decode("waiting")
    assert instance.stall(10.0, tokens=1) == []


def test_a_moment_is_no_stall(instance: Instance) -> None:
    instance.decode("waiting")
    for _ in range(100):
        assert instance.stall(relief_module._OWN_AFTER_S / 2) == []
        instance.relief.step(1)


def test_an_allocated_head_is_none(instance: Instance) -> None:
    instance.decode("waiting")
    for _ in range(relief_module._STEPS * 2):
        instance.clock.now += 0.05
        instance.relief.asked(HEAD)
        instance.relief.allocated(HEAD)
        instance.relief.step(0)
    assert instance.producer.take_ended() == ()


def test_a_head_that_is_not_asked_about_again_is_helped_later(instance: Instance) -> None:
    """vLLM does not ask about a request whose pull is done and that needs one block more."""
    instance.decode("waiting")
    assert instance.stall(relief_module._UNASKED_AFTER_S / 2, asked=None) == []
    assert instance.stall(relief_module._UNASKED_AFTER_S, asked=None) == ["waiting"]


def test_an_idle_instance_keeps_what_it_holds(instance: Instance) -> None:
    instance.hold("held")
    instance.relief.ended(HEAD)
    assert instance.stall(100.0, asked=None) == []


@pytest.mark.parametrize("is_consumer", [True, False])
def test_leases_that_nobody_has_asked_for(
    keeper: CountingKeeper, is_consumer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations of a batch, prompts of a list, streams: their params reach nobody."""
    del keeper
    instance = Instance(is_consumer)
    try:
        for index in range(10):
            instance.hold(str(index))
        instance.producer.leases.renew([instance.hold("asked for").ticket.token])
        monkeypatch.setattr(relief_module, "_UNCLAIMED_AFTER_S", 0.0)  # leases are granted by the real clock
        ended = instance.stall(0.1)
        assert ended == [str(index) for index in range(relief_module._UNCLAIMED_AT_ONCE)]
        instance.producer.sent(len(ended))
        assert instance.stall(0.1) == ["8", "9"]
    finally:
        instance.close()


def test_a_young_lease_is_not_unclaimed(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief_module, "_UNCLAIMED_AFTER_S", 60.0)  # leases are granted by the real clock
    instance.hold("just granted")
    assert instance.stall(0.4) == []


@pytest.mark.parametrize("is_consumer", [True, False])
def test_leases_of_others_only_where_a_circle_is_possible(
    keeper: CountingKeeper, is_consumer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    del keeper
    instance = Instance(is_consumer)
    try:
        token = instance.hold("waited for elsewhere").ticket.token
        instance.producer.leases.renew([token])
        assert instance.stall(relief_module._OTHERS_AFTER_S * 0.9) == []
        monkeypatch.setattr(relief_module, "_OTHERS_AFTER_S", 0.0)  # leases are granted by the real clock
        assert instance.stall(1.0) == (["waited for elsewhere"] if is_consumer else [])
    finally:
        instance.close()
