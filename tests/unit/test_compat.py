"""What compat.py does to vLLM, seen without an old vLLM: tests/oldest does the same with one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.engine_config import FULL, STATE, group_of, vllm_config
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec
from vllm.v1.request import RequestStatus

from vllm_datadist_connector import compat, plugin
from vllm_datadist_connector.config import ConfigError, parse_config
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
from vllm_datadist_connector.worker import build

NULL_BLOCK = 0
BLOCKS = {"bad": ([1, 2], [NULL_BLOCK, 3]), "good": ([4, 5], [NULL_BLOCK, 6]), "running": ([7], [8])}


def test_a_gauge_without_times_is_set() -> None:
    """Ray's."""
    values: list[float] = []
    compat.set_gauge(SimpleNamespace(set=values.append), 3, 1.0)
    assert values == [3]


def vllms_answer(self: Any, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> set[str]:
    """Stands in for vLLM's own."""
    del self, invalid_block_ids, num_scheduled_tokens
    return {"vLLM's answer"}


@pytest.fixture
def old_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """The scheduler's method as guarded in a vLLM without results by request."""
    monkeypatch.setattr(Scheduler, "_handle_invalid_blocks", vllms_answer)
    monkeypatch.setattr(compat, "TransferResults", None)
    compat.guard_failed_loads()
    guarded = Scheduler._handle_invalid_blocks
    assert guarded is not vllms_answer
    return guarded


def make_scheduler(recompute: bool, num_groups: int = 2, connector: type = DataDistConnector) -> Any:
    waiting = RequestStatus.WAITING_FOR_REMOTE_KVS
    status = {"bad": waiting, "good": waiting, "running": RequestStatus.RUNNING}
    return SimpleNamespace(
        connector=connector.__new__(connector),
        recompute_kv_load_failures=recompute,
        failed_recving_kv_req_ids=set(),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None] * num_groups),
        kv_cache_manager=SimpleNamespace(
            block_pool=SimpleNamespace(null_block=SimpleNamespace(block_id=NULL_BLOCK)), get_block_ids=BLOCKS.get
        ),
        requests={
            name: SimpleNamespace(request_id=name, status=status[name], num_computed_tokens=32) for name in BLOCKS
        },
    )


def computed(scheduler: Any) -> dict[str, int]:
    return {name: request.num_computed_tokens for name, request in scheduler.requests.items()}


@pytest.mark.parametrize("block", [1, 2, 3])
def test_fail_names_the_request_whose_load_failed(old_vllm: Callable[..., set[str]], block: int) -> None:
    scheduler = make_scheduler(recompute=False)
    assert old_vllm(scheduler, {NULL_BLOCK, block}, {}) == {"bad"}
    assert scheduler.failed_recving_kv_req_ids == set()


@pytest.mark.parametrize("block", [1, 2, 3])
def test_recompute_starts_that_request_from_nothing(old_vllm: Callable[..., set[str]], block: int) -> None:
    scheduler = make_scheduler(recompute=True)
    assert old_vllm(scheduler, {NULL_BLOCK, block}, {}) == set()
    assert scheduler.failed_recving_kv_req_ids == {"bad"}
    assert computed(scheduler) == {"bad": 0, "good": 32, "running": 32}


def test_blocks_of_no_load_fail_nobody(old_vllm: Callable[..., set[str]]) -> None:
    scheduler = make_scheduler(recompute=False)
    assert old_vllm(scheduler, {NULL_BLOCK, 7, 8, 99}, {}) == set()
    assert set(computed(scheduler).values()) == {32}


@pytest.mark.parametrize("changes", [{"num_groups": 1}, {"connector": SimpleNamespace}])
def test_the_rest_is_left_to_vllm(old_vllm: Callable[..., set[str]], changes: dict[str, Any]) -> None:
    assert old_vllm(make_scheduler(recompute=False, **changes), {1}, {}) == {"vLLM's answer"}


def test_guarding_twice_guards_once(old_vllm: Callable[..., set[str]]) -> None:
    compat.guard_failed_loads()
    assert Scheduler._handle_invalid_blocks is old_vllm


def test_only_schedulers_that_load_with_us_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM registers every plugin in all of its processes, also of instances that have no use for this connector."""
    guarded: list[str] = []
    monkeypatch.setattr(compat, "guard_failed_loads", lambda: guarded.append("guarded"))
    monkeypatch.setattr(build, "build_worker", lambda *arguments: SimpleNamespace(arguments=arguments))
    groups = SimpleNamespace(kv_cache_groups=[group_of(FULL, "layers.0")])
    plugin.register()
    DataDistConnector(vllm_config("kv_consumer"), KVConnectorRole.WORKER, groups)
    assert guarded == []
    connector = DataDistConnector(vllm_config("kv_consumer"), KVConnectorRole.SCHEDULER, groups)
    connector.shutdown()
    assert guarded == ["guarded"]


@pytest.mark.parametrize("role", KVConnectorRole)
@pytest.mark.parametrize("owner", ["aux_output_config", "model_config"])
def test_returned_routed_experts_are_refused_by_name(role: KVConnectorRole, owner: str) -> None:
    config = vllm_config("kv_both")
    setattr(config, owner, SimpleNamespace(enable_return_routed_experts=True))
    with pytest.raises(ConfigError, match="--enable-return-routed-experts is not supported with DataDistConnector"):
        DataDistConnector(config, role, SimpleNamespace(kv_cache_groups=[group_of(FULL, "layers.0")]))


def test_vllms_own_option_for_routed_experts_is_the_one_that_is_refused() -> None:
    config = EngineArgs(enable_return_routed_experts=True)
    assert compat.returns_routed_experts(
        SimpleNamespace(aux_output_config=config.aux_output_config, model_config=config)
    )
    plain = EngineArgs()
    assert not compat.returns_routed_experts(SimpleNamespace(aux_output_config=plain.aux_output_config))


@pytest.mark.skipif(not hasattr(KVConnectorBase_V1, "supports_sleep_mode"), reason="this vLLM does not ask")
def test_sleep_mode_is_refused_by_vllm() -> None:
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(kv_connector=plugin.NAME, kv_role="kv_both"),
        model_config=SimpleNamespace(enable_sleep_mode=True),
    )
    plugin.register()
    with pytest.raises(ValueError, match="DataDistConnector does not support sleep mode"):
        VllmConfig._verify_kv_transfer_compat(config)


def test_sleep_mode_is_not_supported() -> None:
    assert DataDistConnector.supports_sleep_mode(SimpleNamespace()) is False


def test_a_vllm_with_results_by_request_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_handle_invalid_blocks", vllms_answer)
    monkeypatch.setattr(compat, "TransferResults", tuple)
    compat.guard_failed_loads()
    assert Scheduler._handle_invalid_blocks is vllms_answer


def test_an_unknown_scheduler_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, report: object) -> None:
        del self, report

    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(Scheduler, "_handle_invalid_blocks", changed)
    monkeypatch.setattr(compat, "TransferResults", None)
    monkeypatch.setattr(compat.logger, "critical", lambda *line: said.append(line))
    compat.guard_failed_loads()
    assert Scheduler._handle_invalid_blocks is changed
    assert said


@pytest.mark.parametrize("is_one_of_several", [False, True])
def test_pauses_are_told_of(monkeypatch: pytest.MonkeyPatch, is_one_of_several: bool) -> None:
    told: list[bool] = []
    monkeypatch.setattr(Scheduler, "set_pause_state", Scheduler.set_pause_state)
    monkeypatch.setattr(DataDistConnector, "_set_paused", lambda _, paused: told.append(paused))
    for _ in range(2):
        compat.watch_pauses()
    ours, theirs = object.__new__(DataDistConnector), object()
    connector = SimpleNamespace(_connectors=[theirs, ours]) if is_one_of_several else ours
    scheduler: Any = SimpleNamespace(connector=connector)
    for state in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL, PauseState.UNPAUSED):
        Scheduler.set_pause_state(scheduler, state)
        assert scheduler._pause_state is state
    assert told == [True, True, False]


def test_pauses_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "set_pause_state", Scheduler.set_pause_state)
    compat.watch_pauses()
    for connector in (None, object()):
        Scheduler.set_pause_state(SimpleNamespace(connector=connector), PauseState.PAUSED_ALL)  # type: ignore[arg-type]


def test_a_vllm_that_cannot_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Scheduler, "set_pause_state")
    compat.watch_pauses()


@pytest.mark.parametrize(
    ("additional", "packing"), [(None, "plain"), ({}, "plain"), ({"enable_kv_nz": True}, "nz"), ({"x": 1}, "plain")]
)
def test_an_npus_tiles_are_a_packing(
    additional: dict[str, Any] | None, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in tensors of the same shape: a P without them would not be noticed."""
    monkeypatch.setattr(compat, "is_npu", lambda: True)
    config = SimpleNamespace(additional_config=additional)
    latent = MLAAttentionSpec(block_size=128, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert compat.kv_packing(config, latent) == packing


@pytest.mark.parametrize(
    ("method", "is_async", "late"),
    [(None, False, False), ("ngram", False, False), ("eagle3", False, True), ("mtp", True, False), ("mtp", None, True)],
)
def test_drafters_that_run_after_the_tokens_are_known(method: str | None, is_async: bool | None, late: bool) -> None:
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method) if method else None,
        scheduler_config=SimpleNamespace(async_scheduling=is_async),
    )
    assert compat.drafts_late(config) is late


@pytest.mark.parametrize(
    ("chosen", "caching", "skips"),
    [
        ("vllm_ascend.core.recompute_scheduler.RecomputeScheduler", True, True),
        ("vllm_ascend.core.recompute_scheduler.AsyncRecomputeScheduler", False, False),
        (type("Theirs", (), {"__module__": "vllm_ascend.core.recompute_scheduler"}), True, True),
        (Scheduler, True, False),
        (None, True, False),
    ],
)
@pytest.mark.parametrize("spec", [STATE, FULL], ids=["states", "tokens"])
def test_a_scheduler_that_forgets_states_is_refused_where_there_are_some(
    chosen: Any, caching: bool, skips: bool, spec: KVCacheSpec
) -> None:
    config = vllm_config("kv_consumer")
    config.scheduler_config = SimpleNamespace(scheduler_cls=chosen)
    config.cache_config = SimpleNamespace(enable_prefix_caching=caching)
    groups = [group_of(spec, "layer")]
    if skips and spec is STATE:
        with pytest.raises(ConfigError, match="recompute_scheduler_enable: this scheduler takes a prompt"):
            ConnectorScheduler(parse_config({}), config, groups)
    else:
        ConnectorScheduler(parse_config({}), config, groups).close()
