"""When in a step its pulls start: with the first hook that has the step's metadata, and once."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_config import vllm_config
from support.pd import WAIT_S, make_contract, make_params, make_ticket
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from vllm_datadist_connector import _native, compat
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.metadata import NOTHING, ONLY_PULLS, PullJob, StepMetadata
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.worker import build
from vllm_datadist_connector.worker.device import Fence
from vllm_datadist_connector.worker.transfers import FinishedPulls, Outbox
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace


class Driver:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.fences: list[Fence] = []
        self.waits: list[float] = []

    def submit(self, job: PullJob, fence: Fence) -> None:
        self.fences.append(fence)
        self.events.append(job.request_id)

    def cancel(self, request_id: str) -> None:
        self.events.append(f"cancel {request_id}")

    def linked_peers(self) -> dict[Transport, int]:
        return {}

    def quarantined_blocks(self) -> int:
        return 0

    def take_finished(self, wait_s: float) -> FinishedPulls:
        self.waits.append(wait_s)
        return FinishedPulls(set(), set(), set())


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def connector(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    worker: Any = ConnectorWorker(
        ConnectorConfig(),
        _native.LlmDataDist(1, 3),
        make_contract(),
        RankPlace(0, 0, 1, 1, 0),
        {},
        (16,),
        duties=Duties(gives=True, takes=True),
    )
    worker._driver = driver
    monkeypatch.setattr(build, "build_worker", lambda *_: worker)
    return DataDistConnector(vllm_config("kv_both"), KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=()))


def step_of(request_id: str) -> StepMetadata:
    remote = parse_remote_prefill(make_params(((1,),), ticket=make_ticket()))
    job = PullJob(request_id, remote, ((2,),), 0, 16, "", False, 1.0)
    return StepMetadata(pulls=(job,), cancels=("gone",), ended_leases=(f"{request_id}'s lease",))


def test_pulls_start_before_the_forward_pass(connector: Any, driver: Driver) -> None:
    """vLLM 0.32 has run the forward pass when it calls start_load_kv; on the CPU it has ended by then, too."""
    step = step_of("r")
    connector.handle_preemptions(step)
    assert driver.events == ["r", "cancel gone"]
    connector.bind_connector_metadata(step)
    connector.start_load_kv(None)
    assert driver.events == ["r", "cancel gone"], "a pull that is submitted twice would end twice"


def test_every_step_starts_its_own(connector: Any, driver: Driver) -> None:
    for number in range(3):
        step = step_of(str(number))
        connector.handle_preemptions(step)
        connector.bind_connector_metadata(step)
        connector.start_load_kv(None)
        connector.clear_connector_metadata()
    assert [event for event in driver.events if not event.startswith("cancel")] == ["0", "1", "2"]
    assert connector._working.take_sent() == {"0's lease", "1's lease", "2's lease"}


def test_pulls_wait_for_what_the_device_was_given_before(connector: Any, driver: Driver) -> None:
    """One fence for each step that brings pulls, taken by the hook itself: on vLLM's thread, behind its kernels."""
    taken: list[Any] = []

    class Device:
        def fence(self) -> Any:
            taken.append(SimpleNamespace(has_passed=lambda: False))
            return taken[-1]

    connector._working._device = Device()
    for step in (step_of("a"), StepMetadata(), step_of("b")):
        connector.handle_preemptions(step)
    assert len(taken) == 2
    assert driver.fences == taken


@pytest.mark.parametrize(("pp_size", "waits"), [(1, True), (2, False)])
def test_only_a_step_that_computes_nothing_waits_for_a_pull(
    connector: Any, driver: Driver, pp_size: int, waits: bool
) -> None:
    """Of several pipeline stages, one may have an empty step because the others are busy."""
    connector._working._place = RankPlace(0, 0, 1, pp_size, 0)
    for step in (StepMetadata(only_pulls=True), StepMetadata(), ONLY_PULLS, NOTHING):
        connector.handle_preemptions(step)
        connector.get_finished(set())
    first, second, third, fourth = driver.waits
    assert (second, fourth) == (0, 0)
    assert 0 < first <= 0.001 if waits else first == 0
    assert third == first


def test_the_wait_ends_with_the_first_pull() -> None:
    outbox = Outbox()
    job = step_of("r").pulls[0]
    begun = time.monotonic()
    outbox.put(job, failed=False)
    assert outbox.take(wait_s=WAIT_S).received == {"r"}
    putting = threading.Thread(target=outbox.put, args=(job, True))
    putting.start()
    assert outbox.take(wait_s=WAIT_S).failed == {"r"}
    putting.join()
    assert time.monotonic() - begun < WAIT_S
    begun = time.monotonic()
    assert outbox.take(wait_s=0.02).received == set(), "what was taken is not there any more"
    assert time.monotonic() - begun >= 0.02, "and is waited for again"


def test_not_where_vllm_would_zero_the_blocks_afterwards(
    connector: Any, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "LOADS_MAY_PRECEDE_ZEROING", False)
    step = step_of("r")
    connector.handle_preemptions(step)
    assert driver.events == []
    connector.bind_connector_metadata(step)
    connector.start_load_kv(None)
    assert driver.events == ["r", "cancel gone"]


def test_ds_that_have_left_are_unlinked_where_their_links_would_stay(connector: Any, driver: Driver) -> None:
    """By a P that pulls nothing, too."""
    connector._working._driver = None
    connector.handle_preemptions(StepMetadata(left_clusters=(7,)))
    told: list[int] = []
    connector._working._janitor = SimpleNamespace(unlink=told.extend, close=lambda: None)
    connector.handle_preemptions(StepMetadata(left_clusters=(8, 9)))
    connector.handle_preemptions(StepMetadata())
    assert (told, driver.events) == ([8, 9], [])


def test_what_layers_call_reaches_neither_driver_nor_provider(connector: Any) -> None:
    """vLLM captures graphs of a forward pass, these calls included: a link or a registration would end the capture."""

    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"{name}, while a graph may be captured")

    connector._worker = Untouchable()
    for layer in ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"):
        connector.wait_for_layer_load(layer)
        connector.save_kv_layer(layer, None, None)
    connector.wait_for_save()
