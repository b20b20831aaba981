"""An instance whose role changes while it serves, as scheduler and operator see it; the side channel is real."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest
from support.channels import wait_for
from support.counting_keeper import CountingKeeper
from support.engine_config import FULL, group_of, vllm_config
from support.pd import (
    BLOCK_SIZE,
    LOOPBACK,
    TO_P,
    TOKEN,
    WAIT_S,
    finish,
    make_params,
    make_request,
    make_ticket,
    wait_until,
)
from support.steps import NO_STEP, first_step
from vllm.v1.request import Request

from vllm_datadist_connector.cli import main
from vllm_datadist_connector.config import ConfigError, ConnectorConfig, parse_config
from vllm_datadist_connector.doctor.deployment import Serve, understand
from vllm_datadist_connector.duties import Duties, duties_of
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
from vllm_datadist_connector.side_channel.client import ChannelClient, HandoffNews, Switched, open_client
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

PROMPT = list(range(100, 100 + 3 * BLOCK_SIZE))
TABLE = [50, 51, 52]
SWITCHES = ConnectorConfig(role_switch=True)


class Instance:
    """One without workers: no rank has a link to leave."""

    def __init__(self) -> None:
        self.scheduler = ConnectorScheduler(SWITCHES, vllm_config("kv_both"), (group_of(FULL, "a"),))
        producer = self.scheduler._producer
        assert producer is not None
        self.endpoint: Endpoint = producer.endpoint
        self.client: ChannelClient = open_client(Trust())

    def close(self) -> None:
        self.client.close()
        self.scheduler.close()

    def ask(self, role: str, drain_s: float = WAIT_S, patience_s: float = WAIT_S, wish: str = "") -> int:
        wish = wish or secrets.token_hex(16)
        return self.client.switch_role(self.endpoint, wish, role, drain_s, patience_s, WAIT_S)

    def status(self, asked: int) -> Switched:
        status = wait_for(self.client, asked).response
        assert isinstance(status, Switched)
        return status

    def switch(self, role: str, drain_s: float = WAIT_S) -> None:
        status = self.status(self.ask(role, drain_s))
        assert (status.state, status.role) == ("done", role), status

    def begin(self, role: str, drain_s: float = WAIT_S) -> Switched:
        """How far it is at once."""
        return self.status(self.ask(role, drain_s, 0.0))

    def arrive(self, request: Request) -> Request:
        self.scheduler.on_new_request(request)
        return request

    def prefill(self, request_id: str = "p", handoff: str = "") -> tuple[bool, dict[str, Any]]:
        held, params = self.finish(self.arrive(p_request(request_id, handoff)))
        return held, params

    def finish(self, request: Request) -> tuple[bool, dict[str, Any]]:
        held, params = self.scheduler.request_finished(finish(request), (TABLE,))
        assert params is not None
        return held, params

    def release(self, token: str) -> None:
        assert wait_for(self.client, self.client.release(self.endpoint, (token,), WAIT_S)).response is not None

    def handoff(self, token: str = TOKEN) -> HandoffNews:
        news = wait_for(
            self.client, self.client.await_handoff(self.endpoint, token, None, 0, 0, WAIT_S, WAIT_S)
        ).response
        assert isinstance(news, HandoffNews)
        return news

    def roles_told(self) -> list[str]:
        """Of which the gauge is 1 after the next step."""
        self.scheduler.build_step(NO_STEP)
        stats = self.scheduler.take_stats()
        values = next(iter(stats.data["gauges"].values()))["values"] if stats is not None else {}
        return [key for key, value in values.items() if key.startswith("role:") and value]

    def local_prefills(self) -> Mapping[str, int]:
        stats = self.scheduler.take_stats()
        counts = stats.data["counts"] if stats is not None else {}
        return {key.removeprefix("local_prefills:"): n for key, n in counts.items() if key.startswith("local_")}


@pytest.fixture
def instance(keeper: CountingKeeper) -> Iterator[Instance]:
    del keeper
    with closing(Instance()) as instance:
        yield instance


def p_request(request_id: str = "p", handoff: str = "") -> Request:
    named = {EXTRA_KEY: {"handoff": handoff}} if handoff else {}
    return make_request(PROMPT, {**TO_P, **named}, request_id)


def d_request(request_id: str = "d") -> Request:
    ticket = make_ticket(prompt_digest=prompt_digest(PROMPT))
    return make_request([*PROMPT, 7], make_params(((1, 2, 3),), ticket=ticket), request_id)


# ---- what the configuration says ----


@pytest.mark.parametrize(
    ("kv_role", "options", "duties"),
    [
        ("kv_producer", {}, Duties(gives=True, takes=False)),
        ("kv_consumer", {}, Duties(gives=False, takes=True)),
        ("kv_both", {}, Duties(gives=True, takes=True)),
        ("kv_producer", {"bidirectional": True}, Duties(gives=True, takes=True)),
        ("kv_consumer", {"bidirectional": True}, Duties(gives=True, takes=True)),
        ("kv_both", {"role_switch": True}, Duties(gives=True, takes=True)),
    ],
)
def test_duties_come_from_one_place(kv_role: str, options: dict[str, bool], duties: Duties) -> None:
    assert duties_of(kv_role, ConnectorConfig(**options)) == duties
    assert duties.both is (duties.gives and duties.takes)


@pytest.mark.parametrize("kv_role", ["kv_producer", "kv_consumer"])
def test_only_who_is_both_can_become_either(kv_role: str) -> None:
    with pytest.raises(ConfigError, match=rf"^role_switch: true, kv_role is '{kv_role}'; allowed: kv_both"):
        ConnectorScheduler(SWITCHES, vllm_config(kv_role), (group_of(FULL, "a"),))
    config = f'{{"kv_connector": "DataDistConnector", "kv_role": "{kv_role}", "kv_connector_extra_config":'
    _, finding = understand(config + ' {"role_switch": true}}', Serve("", {}))
    assert (finding.status, finding.found.split(",")[0]) == ("wrong", "role_switch: true")


def test_turns_are_kept_by_who_gives_and_takes_in_either_role() -> None:
    with pytest.raises(ConfigError, match=r"^role_switch and bidirectional exclude each other"):
        parse_config({"role_switch": True, "bidirectional": True})


# ---- what the scheduler does ----


def test_the_role_is_told(instance: Instance) -> None:
    assert instance.roles_told() == ["role:both"]
    for role in ("prefill", "decode", "both"):
        instance.switch(role)
        assert instance.roles_told() == [f"role:{role}"]
    assert instance.roles_told() == [], "told only when it has changed"


def test_a_decode_instance_holds_nothing_for_others(instance: Instance) -> None:
    assert instance.prefill("before")[0]
    instance.scheduler.build_step(NO_STEP)
    instance.switch("decode", drain_s=0.0)
    held, params = instance.prefill("after")
    assert not held
    assert (params["remote_num_tokens"], params["remote_block_ids"], EXTRA_KEY in params) == (0, [[]], False)
    assert instance.local_prefills() == {"switched": 1}
    request = instance.arrive(d_request())
    assert instance.scheduler.matched_tokens(request, 0) == len(PROMPT)
    instance.scheduler.request_finished(request, ([],))


def test_a_handoff_is_refused_at_once(instance: Instance) -> None:
    """Its D is not to wait for what will not come."""
    instance.switch("decode")
    instance.prefill(handoff=TOKEN)
    assert (instance.handoff().state, instance.handoff().reason) == (
        "ended",
        "P gives no KV in the role that it has now",
    )


def test_a_prefill_instance_takes_nothing(instance: Instance) -> None:
    instance.switch("prefill")
    request = instance.arrive(d_request())
    assert instance.scheduler.matched_tokens(request, 0) == 0
    assert instance.local_prefills() == {"switched": 1}
    held, params = instance.prefill()
    assert held
    assert params["remote_num_tokens"] == len(PROMPT)
    instance.switch("both", drain_s=0.0)
    back = instance.arrive(d_request("back"))
    assert instance.scheduler.matched_tokens(back, 0) == len(PROMPT)
    instance.scheduler.request_finished(back, ([],))
    assert instance.local_prefills() == {}


def test_what_was_held_is_waited_for_and_nothing_more_is(instance: Instance) -> None:
    _, params = instance.prefill("before")
    asked = instance.ask("decode")
    assert instance.begin("decode").leases == 1
    assert not instance.prefill("meanwhile")[0]
    instance.release(params[EXTRA_KEY]["token"])
    assert instance.status(asked).state == "done"


def test_a_handoff_that_was_promised_is_kept(instance: Instance) -> None:
    request = instance.arrive(p_request(handoff=TOKEN))
    asked = instance.ask("decode")
    assert instance.begin("decode").handoffs == 1
    held, params = instance.finish(request)
    assert held
    assert params[EXTRA_KEY]["token"] == TOKEN
    assert instance.begin("decode").leases == 1
    instance.release(TOKEN)
    assert instance.status(asked).state == "done"


def test_a_handoff_that_takes_too_long_ends(instance: Instance) -> None:
    request = instance.arrive(p_request(handoff=TOKEN))
    instance.switch("decode", drain_s=0.0)
    assert (instance.handoff().state, instance.handoff().reason) == ("ended", "P changes its role")
    instance.finish(request)
    assert [*instance.scheduler.build_step(NO_STEP).ended_leases] == [request.request_id]


def test_what_was_taken_is_pulled_before(instance: Instance) -> None:
    request = instance.arrive(d_request())
    asked = instance.ask("prefill")
    assert instance.begin("prefill").taken == 1
    assert instance.scheduler.matched_tokens(request, 0) == len(PROMPT)
    instance.scheduler.after_alloc(request, (TABLE,), len(PROMPT))
    assert len(instance.scheduler.build_step(NO_STEP).pulls) == 1
    assert instance.begin("prefill").taken == 1
    instance.scheduler.finished((request.request_id,), ())
    assert instance.status(asked).state == "done"
    assert instance.local_prefills() == {}


@pytest.mark.parametrize("how", ["allocated", "aborted"])
def test_what_is_not_pulled_in_time_is_prefilled_here(instance: Instance, how: str) -> None:
    request = instance.arrive(d_request())
    instance.switch("prefill", drain_s=0.0)
    assert instance.scheduler.matched_tokens(request, 0) == 0
    if how == "allocated":
        instance.scheduler.after_alloc(request, (), 0)
        instance.scheduler.build_step(NO_STEP)
        assert instance.local_prefills() == {"switched": 1}
    else:
        instance.scheduler.request_finished(request, ([],))
    assert instance.begin("both").taken == 0


def test_a_handoff_that_is_not_here_in_time_is_prefilled_here(instance: Instance) -> None:
    with closing(Instance()) as p:
        p.arrive(p_request(handoff=TOKEN))
        address = {"remote_host": LOOPBACK, "remote_port": p.endpoint.port, EXTRA_KEY: {"handoff": TOKEN}}
        request = instance.arrive(make_request([*PROMPT, 7], {"do_remote_prefill": True, **address}, "d"))
        assert instance.scheduler.matched_tokens(request, 0) is None
        instance.switch("prefill", drain_s=0.0)
        assert instance.scheduler.matched_tokens(request, 0) == 0
        assert instance.local_prefills() == {"switched": 1}


@pytest.mark.parametrize("role", ["both", "decode"])
def test_who_gives_nothing_pulls_while_p_computes(instance: Instance, role: str) -> None:
    """One that is both would hold blocks, and could wait for others that wait for these."""
    instance.switch(role)
    with closing(Instance()) as p:
        of_p = p.arrive(p_request(handoff=TOKEN))
        p.scheduler.build_step(first_step(of_p.request_id, (TABLE[:1],), 0, BLOCK_SIZE))
        address = {"remote_host": LOOPBACK, "remote_port": p.endpoint.port, EXTRA_KEY: {"handoff": TOKEN}}
        request = instance.arrive(make_request([*PROMPT, 7], {"do_remote_prefill": True, **address}, "d"))
        counts: list[int | None] = []

        def is_begun() -> bool:
            p.scheduler.build_step(NO_STEP)
            return p.handoff().state == "begun"

        def is_known() -> bool:
            counts.append(instance.scheduler.matched_tokens(request, 0))
            return counts[-1] is not None

        wait_until(is_begun, "what P knows of the prompt")
        if role == "both":
            assert not any(is_known() for _ in range(50))
            p.finish(of_p)
        wait_until(is_known, "an answer")
        assert counts[-1] == len(PROMPT)
        instance.scheduler.after_alloc(request, (TABLE,), len(PROMPT))
        (job,) = instance.scheduler.build_step(NO_STEP).pulls
        assert job.is_handoff is (role == "decode")
        instance.scheduler.finished((request.request_id,), ())


# ---- what the operator does ----


def role(*arguments: str) -> int:
    return main(["role", *arguments])


def test_the_command(instance: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Instance()) as other:
        assert role("decode", str(instance.endpoint), str(other.endpoint)) == 0
        said = capsys.readouterr()
        assert sorted(said.out.splitlines()) == sorted(f"{at}: decode" for at in (instance.endpoint, other.endpoint))
        assert said.err == ""


def test_the_command_says_who_has_not(instance: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ConnectorScheduler(ConnectorConfig(), vllm_config("kv_both"), (group_of(FULL, "a"),))
    with closing(plain):
        assert plain._producer is not None
        closed = Endpoint(LOOPBACK, 1)
        at = plain._producer.endpoint
        assert role("prefill", str(at), str(instance.endpoint), str(closed)) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{instance.endpoint}: prefill"]
    assert f"{at}: refused: it was not started with role_switch" in said.err.splitlines()
    assert f"{closed}: not switched, as far as is known: " in said.err


def test_the_command_is_refused_while_another_is_under_way(
    instance: Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    instance.prefill()
    instance.begin("decode")
    assert role("prefill", str(instance.endpoint)) == 1
    assert f"{instance.endpoint}: stays both: it is switching to decode just now" in capsys.readouterr().err


def test_ports_count_up(instance: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    first = Endpoint(LOOPBACK, instance.endpoint.port - 1)
    assert role("decode", str(first), "--dp-size", "2") == 1, "nobody listens at the first"
    assert f"{instance.endpoint}: decode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("127.0.0.1:5", "--dp-size", "0"), "--dp-size: 0, allowed"),
        (("127.0.0.1:65535", "--dp-size", "2"), "--dp-size: 2 ports from 127.0.0.1:65535 on"),
        (("127.0.0.1:5", "127.0.0.1:6", "--dp-size", "2"), "--dp-size counts ports up from one address"),
        (("127.0.0.1:5", "--drain-s", "-1"), "--drain-s: -1.0, allowed"),
        (("127.0.0.1:5", "--drain-s", "nan"), "--drain-s: nan, allowed"),
        (("127.0.0.1:5", "--auth", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert role("decode", *arguments) == 2
    assert capsys.readouterr().err.startswith("vllm-datadist role: ")
    assert main(["role", "decode", *arguments]) == 2
    assert error in capsys.readouterr().err
