"""Requests through vllm-ascend's schedulers with our connector in them: each step reads the right bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from instance import BLOCK_SIZE, SAMPLED, Instance, make_config, scheduler_class_of
from shapes import dense, hybrid, windowed
from steps import PATIENCE_S, prefill_all, prompt, run
from support.party import wait_until
from support.pd import TO_P
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus
from vllm_ascend.core.recompute_scheduler import AsyncRecomputeScheduler, RecomputeScheduler
from vllm_ascend.patch.platform.patch_balance_schedule import BalanceScheduler

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConfigError

MakeInstance = Callable[..., Instance]
RECOMPUTE = {"recompute_scheduler_enable": True}
OF_D: dict[str, tuple[type, dict[str, Any]]] = {
    "Balance": (BalanceScheduler, {}),
    "vLLM's, asynchronous": (AsyncScheduler, {"is_async": True}),
    "Recompute": (RecomputeScheduler, {"additional": RECOMPUTE}),
    "AsyncRecompute": (AsyncRecomputeScheduler, {"additional": RECOMPUTE, "is_async": True}),
}
of_d = pytest.mark.parametrize("of_d", OF_D)
HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
)


def check_nothing_is_held(p: Instance, d: Instance, free: tuple[int, int]) -> None:
    """Neither by vLLM nor by the connector, on both sides."""
    consumer = d.connector._scheduler._consumer
    assert (consumer._requests, consumer.pulling()) == ({}, 0)
    assert d.worker._worker._driver.quarantined_blocks() == 0
    producer = p.connector._scheduler._producer
    wait_until(
        lambda: p.step() == {} and producer.held() == (0, 0) and not p.scheduler.requests, "the leases' end", PATIENCE_S
    )
    assert (p.free_blocks(), d.free_blocks()) == free


@of_d
def test_requests_go_from_p_to_d(make_instance: MakeInstance, of_d: str) -> None:
    """Several at once, and one of them twice."""
    scheduler, settings = OF_D[of_d]
    p, d = make_instance("kv_producer", dense(64)), make_instance("kv_consumer", dense(64), **settings)
    assert type(p.scheduler) is BalanceScheduler
    assert type(d.scheduler) is scheduler
    free = p.free_blocks(), d.free_blocks()
    prompts = {f"r{number}": prompt(number, 1.3 + number / 2) for number in range(6)}
    prompts["again"] = prompts["r4"]
    for name, params in prefill_all(p, prompts).items():
        d.add(name, prompts[name], params, max_tokens=5)
    outputs = run(d)
    for name in prompts:
        assert [token for each in outputs[name] for token in each.new_token_ids] == [SAMPLED] * 5
        stats = outputs[name][0].prefill_stats
        assert stats.num_computed_tokens == 1, "D was to compute the prompt's last token alone"
    check_nothing_is_held(p, d, free)


@of_d
def test_hooks_come_as_documented(make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, of_d: str) -> None:
    p, d = make_instance("kv_producer"), make_instance("kv_consumer", **OF_D[of_d][1])
    called: list[str] = []
    for hook in HOOKS:
        monkeypatch.setattr(d.connector, hook, recorder(called, hook, getattr(d.connector, hook)))
    (params,) = prefill_all(p, {"r": prompt(0)}).values()
    d.add("r", prompt(0), params, max_tokens=2)
    run(d)
    once = [hook for hook in dict.fromkeys(called) if called.count(hook) == 1]
    assert {"on_new_request", "request_finished_all_groups"} <= set(once)
    assert list(dict.fromkeys(called)) == list(HOOKS)
    assert called.count("update_state_after_alloc") == 2, "with what is loaded, then for the last token"


def recorder(into: list[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any) -> Any:
        into.append(name)
        return original(*args)

    return record


@of_d
def test_a_d_that_runs_out_of_blocks(make_instance: MakeInstance, of_d: str) -> None:
    """Recompute schedulers end a request, for the router to send again; the others compute it again themselves."""
    scheduler, settings = OF_D[of_d]
    p, d = make_instance("kv_producer"), make_instance("kv_consumer", dense(8), **settings)
    free = p.free_blocks(), d.free_blocks()
    prompts = {f"r{number}": prompt(number, 2.98) for number in range(2)}
    for name, params in prefill_all(p, prompts).items():
        d.add(name, prompts[name], params, max_tokens=20)
    outputs: dict[str, list[Any]] = {}

    def step() -> bool:
        for name, output in d.step().items():
            outputs.setdefault(name, []).append(output)
        return all(each[-1].finish_reason is not None for each in outputs.values()) and len(outputs) == 2

    wait_until(step, "an end of both", PATIENCE_S)
    tokens = {name: sum(len(each.new_token_ids) for each in outputs[name]) for name in prompts}
    ended = [name for name in prompts if outputs[name][-1].stop_reason == "recomputed"]
    assert len(ended) == issubclass(scheduler, RecomputeScheduler)
    assert all(tokens[name] == 20 for name in prompts if name not in ended)
    for name in ended:
        # Theirs to forget: the request is listed on, without blocks.
        assert d.scheduler.requests.pop(name).status == RequestStatus.RUNNING
        so_far = prompts[name] + [SAMPLED] * tokens[name]
        (params,) = prefill_all(p, {"again": so_far}).values()
        d.add("again", so_far, params, max_tokens=20 - tokens[name])
    run(d)
    check_nothing_is_held(p, d, free)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@of_d
def test_a_pull_that_fails_and_writes_late(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, of_d: str, policy: str
) -> None:
    """With several KV cache groups, where vLLM 0.23 by itself would end the engine core."""
    p = make_instance("kv_producer", windowed(64))
    monkeypatch.setenv("CANN_STANDIN_LATE_EVERY", "1")
    monkeypatch.setenv("CANN_STANDIN_LATE_MS", "200")
    d = make_instance("kv_consumer", windowed(64), policy=policy, **OF_D[of_d][1])
    free = p.free_blocks(), d.free_blocks()
    (params,) = prefill_all(p, {"r": prompt(0)}).values()
    d.add("r", prompt(0), params, max_tokens=4)
    d.add("ordinary", prompt(1), max_tokens=4)
    outputs = run(d)
    assert str(outputs["ordinary"][-1].finish_reason) == "length"
    assert str(outputs["r"][-1].finish_reason) == ("error" if policy == "fail" else "length")
    check_nothing_is_held(p, d, free)


@of_d
def test_an_aborted_request(make_instance: MakeInstance, of_d: str) -> None:
    p, d = make_instance("kv_producer"), make_instance("kv_consumer", **OF_D[of_d][1])
    free = p.free_blocks(), d.free_blocks()
    prompts = {"early": prompt(0), "loading": prompt(1), "running": prompt(2)}
    params = prefill_all(p, prompts)
    for name in ("running", "loading", "early"):
        request = d.add(name, prompts[name], params[name], max_tokens=50)
        if name == "running":
            run(d, lambda request=request: request.status == RequestStatus.RUNNING)
        elif name == "loading":
            run(d, lambda request=request: request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)
    d.scheduler.finish_requests(list(prompts), RequestStatus.FINISHED_ABORTED)
    run(d)
    check_nothing_is_held(p, d, free)


STATES = {
    name: {**settings, "caching": caching}
    for name, settings, caching in (
        *((name, settings, True) for name, (_, settings) in OF_D.items() if not settings.get("additional")),
        *((f"{name}, no cache", settings, False) for name, (_, settings) in OF_D.items()),
    )
}


@pytest.mark.parametrize("settings", STATES.values(), ids=STATES)
def test_a_state_goes_with_the_tokens_that_it_is_of(make_instance: MakeInstance, settings: dict[str, Any]) -> None:
    """Also where D has had the same prompt before, and another request did not come from a P."""
    p, d = make_instance("kv_producer", hybrid()), make_instance("kv_consumer", hybrid(), **settings)
    free = p.free_blocks(), d.free_blocks()
    tokens = [*prompt(0, 2), 1]
    for turn in ("first", "second", "without P"):
        params = None if turn == "without P" else prefill_all(p, {turn: tokens})[turn]
        d.add(turn, tokens, params, max_tokens=3)
        run(d)
    check_nothing_is_held(p, d, free)


@pytest.mark.parametrize("of_d", ["Recompute", "AsyncRecompute"])
def test_recompute_schedulers_forget_states(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, of_d: str
) -> None:
    """The symptom: when the second half of this fails, the refusal can go."""
    settings = OF_D[of_d][1]
    with pytest.raises(ConfigError, match="recompute_scheduler_enable: this scheduler takes a prompt"):
        make_instance("kv_consumer", hybrid(), **settings)
    monkeypatch.setattr(compat, "skips_states", lambda _: False)
    d = make_instance("kv_consumer", hybrid(), **settings)
    d.add("first", [*prompt(0, 2), 1], max_tokens=3)
    run(d)
    d.add("second", [*prompt(0, 2), 1], max_tokens=3)
    with pytest.raises(AssertionError, match="not the state after 256 tokens"):
        run(d)


# ---- what a scheduler may be used for ----


def test_balance_scheduling_is_for_instances_that_are_both(make_instance: MakeInstance) -> None:
    balance = {"enable_balance_scheduling": True}
    both = make_instance("kv_both", additional=balance, extra={"provider": "engine"})
    assert type(both.scheduler) is BalanceScheduler
    assert both.scheduler._balance_enabled
    free = both.free_blocks()
    (params,) = prefill_all(both, {"p": prompt(0)}).values()
    both.add("d", prompt(0), params, max_tokens=3)
    outputs = run(both, lambda: both.free_blocks() == free and not both.scheduler.requests)
    assert str(outputs["d"][-1].finish_reason) == "length"


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_balance_scheduling_elsewhere(model: Any, role: str) -> None:
    with pytest.raises(ValueError, match="enable_balance_scheduling only supports PD-mixed mode"):
        make_config(model, role, additional={"enable_balance_scheduling": True})


def test_a_p_does_not_recompute(model: Any) -> None:
    config = make_config(model, "kv_producer", additional=dict(RECOMPUTE))
    assert scheduler_class_of(config) is BalanceScheduler


def test_who_is_both_does_not_recompute(model: Any) -> None:
    with pytest.raises(ValueError, match="recompute_scheduler_enable can only be enabled on PD-disaggregated D nodes"):
        make_config(model, "kv_both", additional=dict(RECOMPUTE))


def test_a_p_that_runs_out_of_blocks_preempts_nobody(make_instance: MakeInstance) -> None:
    """It waits until a D has come for those that it keeps."""
    p, d = make_instance("kv_producer", dense(8), max_tokens=BLOCK_SIZE), make_instance("kv_consumer")
    free = p.free_blocks(), d.free_blocks()
    prompts = {f"r{number}": prompt(number, 2.9) for number in range(5)}
    for name, tokens in prompts.items():
        p.add(name, tokens, dict(TO_P))
    arrived: set[str] = set()

    def step() -> bool:
        for name, output in p.step().items():
            d.add(name, prompts[name], output.kv_transfer_params, max_tokens=2)
            arrived.add(name)
        d.step()
        return len(arrived) == len(prompts) and not d.scheduler.requests

    wait_until(step, "all of them", PATIENCE_S)
    assert all(request.num_preemptions == 0 for request in p.scheduler.requests.values())
    check_nothing_is_held(p, d, free)
