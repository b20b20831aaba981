"""Bidirectional reuse: D keeps an answered request's blocks, and P pulls them for the conversation's next prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.counting_keeper import CountingKeeper
from support.engine_config import FULL, group_of, vllm_config
from support.pd import (
    BLOCK_SIZE,
    LOOPBACK,
    TO_P,
    TOKEN,
    decode,
    finish,
    make_contract,
    make_params,
    make_request,
    make_ticket,
)
from support.steps import NO_STEP, first_step
from vllm.v1.request import RequestStatus

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.metadata import NOTHING, ONLY_PULLS, StepMetadata
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY, names_earlier_turn, parse_remote_prefill
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

FIRST_TURN = list(range(100, 100 + 3 * BLOCK_SIZE))
ANSWER = list(range(500, 500 + BLOCK_SIZE + 1))
HELD = len(FIRST_TURN) + len(ANSWER) - 1
"""The answer's last token was never fed back."""
NEXT_TURN = [*FIRST_TURN, *ANSWER, *range(900, 950)]
BLOCKS = (11, 4, 9, 2)
TABLE = [50, 51, 52, 53, 54, 55, 56, 57]

GIVES = Duties(gives=True, takes=False)

MakeConsumer = Callable[[int | None], ConsumerScheduler]
MakeScheduler = Callable[..., ConnectorScheduler]


@pytest.fixture
def make_consumer(keeper: CountingKeeper) -> MakeConsumer:
    del keeper
    return lambda threshold: ConsumerScheduler(
        (KVGroup(BLOCK_SIZE),), lambda host: host == LOOPBACK, 60.0, 5.0, Trust(), threshold
    )


@pytest.fixture
def make_scheduler(keeper: CountingKeeper) -> Iterator[MakeScheduler]:
    del keeper
    made: list[ConnectorScheduler] = []

    def make(role: str, **config: Any) -> ConnectorScheduler:
        made.append(ConnectorScheduler(ConnectorConfig(**config), vllm_config(role), (group_of(FULL, "a"),)))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def earlier_turn(tokens: list[int] = NEXT_TURN[:HELD], **changes: Any) -> dict[str, Any]:
    """What D returned with its answer, as the router sends it on."""
    ticket = make_ticket(prompt_digest=prompt_digest(tokens))
    values = {"block_ids": (BLOCKS,), "ticket": ticket, "num_tokens": len(tokens), "for_next_turn": True}
    return make_params(**(values | changes))


class TestPull:
    def test_the_earlier_turn_is_pulled(self, make_consumer: MakeConsumer, keeper: CountingKeeper) -> None:
        consumer = make_consumer(64)
        params = earlier_turn()
        request = make_request(NEXT_TURN, dict(params))
        consumer.on_new_request(request)
        assert keeper.endpoints == [(LOOPBACK, 40000)]
        assert consumer.matched_tokens(request, 0) == HELD
        consumer.after_alloc(request, (TABLE,), HELD)
        ((job,), _) = consumer.take_jobs()
        assert job.remote == parse_remote_prefill(params)
        assert job.local_blocks == (tuple(TABLE[: len(BLOCKS)]),)
        assert (job.first_token, job.end_token) == (0, HELD)
        assert job.prompt_digest == prompt_digest(NEXT_TURN[:HELD])
        # It still is a P request, whose blocks a D waits for.
        assert request.kv_transfer_params == params
        consumer.received([request.request_id])

    def test_it_is_not_offered_before_its_holder_says_that_it_is_there(
        self, make_consumer: MakeConsumer, keeper: CountingKeeper
    ) -> None:
        consumer = make_consumer(64)
        request = make_request(NEXT_TURN, earlier_turn())
        keeper.unanswered.add(TOKEN)
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) is None
        assert consumer.matched_tokens(request, HELD) == 0, "there is nothing to ask for"
        keeper.unanswered.clear()
        assert consumer.matched_tokens(request, 0) == HELD
        consumer.request_finished(request.request_id)

    def test_one_that_is_gone_is_computed(self, make_consumer: MakeConsumer, keeper: CountingKeeper) -> None:
        consumer = make_consumer(64)
        request = make_request(NEXT_TURN, earlier_turn())
        consumer.on_new_request(request)
        keeper.gone.add(TOKEN)
        assert consumer.matched_tokens(request, 0) == 0
        consumer.after_alloc(request, (TABLE,), 0)
        assert consumer.take_jobs() == ((), ())

    def test_the_d_of_a_first_turn_does_not_wait(self, make_consumer: MakeConsumer, keeper: CountingKeeper) -> None:
        consumer = make_consumer(64)
        request = make_request(NEXT_TURN, earlier_turn(for_next_turn=False))
        keeper.unanswered.add(TOKEN)
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == HELD
        consumer.request_finished(request.request_id)

    @pytest.mark.parametrize(
        ("threshold", "cached", "pulled"),
        [(0, 0, HELD), (HELD, 0, HELD), (HELD + 1, 0, 0), (32, 32, 32), (33, 32, 0), (0, HELD, 0), (0, HELD - 1, 1)],
    )
    def test_only_what_is_worth_it(self, make_consumer: MakeConsumer, threshold: int, cached: int, pulled: int) -> None:
        assert HELD == 4 * BLOCK_SIZE
        consumer = make_consumer(threshold)
        request = make_request(NEXT_TURN, earlier_turn())
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, cached) == pulled
        consumer.after_alloc(request, (TABLE,), pulled)
        assert len(consumer.take_jobs()[0]) == (pulled > 0)
        consumer.received([request.request_id])

    def test_a_d_request_is_pulled_however_short_it_is(self, make_consumer: MakeConsumer) -> None:
        consumer = make_consumer(10**6)
        request = make_request(NEXT_TURN, earlier_turn(for_next_turn=False))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, HELD - 1) == 1
        consumer.request_finished(request.request_id)

    def test_not_if_it_is_switched_off(
        self, make_consumer: MakeConsumer, keeper: CountingKeeper, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = make_consumer(None)
        request = make_request(NEXT_TURN, earlier_turn())
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == 0
        consumer.after_alloc(request, (TABLE,), 0)
        assert consumer.take_jobs() == ((), ())
        assert keeper.endpoints == [], "D's lease is not renewed either"
        assert not caplog.records

    @pytest.mark.parametrize(
        "params", [TO_P, earlier_turn(block_ids=((),), ticket=None)], ids=["first turn", "none that is held"]
    )
    def test_a_first_turn_names_none(
        self, make_consumer: MakeConsumer, keeper: CountingKeeper, params: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = make_consumer(0)
        request = make_request(NEXT_TURN, dict(params))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == 0
        assert keeper.endpoints == []
        assert not caplog.records

    @pytest.mark.parametrize(
        ("prompt", "params"),
        [
            (NEXT_TURN[1:], earlier_turn()),
            (NEXT_TURN, earlier_turn(NEXT_TURN[1 : 1 + HELD])),
            (NEXT_TURN, earlier_turn(num_tokens=HELD - 1)),
            (NEXT_TURN, earlier_turn(host="169.254.169.254")),
            (NEXT_TURN, earlier_turn(ticket=None)),
            (NEXT_TURN[: HELD - 1], earlier_turn()),
        ],
        ids=["another prompt", "another answer", "another length", "host", "another connector's", "a shorter prompt"],
    )
    def test_another_conversation_is_prefilled_here(
        self,
        make_consumer: MakeConsumer,
        keeper: CountingKeeper,
        prompt: list[int],
        params: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        consumer = make_consumer(0)
        request = make_request(prompt, params)
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == 0
        consumer.after_alloc(request, (TABLE,), 0)
        assert consumer.take_jobs() == ((), ())
        assert not +keeper.users
        assert [request.request_id in record.message for record in caplog.records] == [True]


def d_request(**changes: Any) -> Any:
    ticket = make_ticket(prompt_digest=prompt_digest(FIRST_TURN))
    return make_request(FIRST_TURN, make_params((BLOCKS[:3],), ticket=ticket, **changes))


class TestGrant:
    def test_d_keeps_what_it_has_answered(self, make_scheduler: MakeScheduler) -> None:
        scheduler = make_scheduler("kv_consumer", bidirectional=True, decoder_lease_s=77.0)
        request = d_request()
        scheduler.on_new_request(request)
        scheduler.after_alloc(request, (TABLE,), len(FIRST_TURN))
        scheduler.build_step(NO_STEP)
        scheduler.finished([request.request_id], ())
        held, params = scheduler.request_finished(decode(request, ANSWER), (TABLE,))
        assert held
        assert params is not None
        assert names_earlier_turn(params)
        remote = parse_remote_prefill(params)
        assert remote.remote_num_tokens == HELD
        assert remote.remote_block_ids == (tuple(TABLE[:4]),)
        assert remote.remote_engine_id == "engine-kv_consumer"
        assert remote.ticket.prompt_digest == prompt_digest([*FIRST_TURN, *ANSWER[:-1]])
        assert remote.ticket.lease_s == 77.0

    def test_p_takes_what_d_has_granted(self, make_scheduler: MakeScheduler) -> None:
        d, p = (make_scheduler(role, bidirectional=True) for role in ("kv_consumer", "kv_producer"))
        request = d_request()
        d.on_new_request(request)
        d.after_alloc(request, (TABLE,), 0)
        _, params = d.request_finished(decode(request, ANSWER), (TABLE,))
        next_turn = make_request(NEXT_TURN, params, "cmpl-y-0-00000002")
        p.on_new_request(next_turn)
        assert p.matched_tokens(next_turn, BLOCK_SIZE) == 0, "fewer than recompute_threshold"
        assert p.matched_tokens(next_turn, 0) == HELD
        p.after_alloc(next_turn, (TABLE,), HELD)
        assert [job.end_token for job in p.build_step(NO_STEP).pulls] == [HELD]
        p.finished([next_turn.request_id], ())
        held, onward = p.request_finished(finish(next_turn), (TABLE,))
        assert held
        assert onward is not None
        # And it keeps its own for the D of this turn, as of any P request.
        assert onward["do_remote_prefill"] is True
        assert onward["remote_num_tokens"] == len(NEXT_TURN)
        assert onward[EXTRA_KEY]["lease_s"] == 30.0

    @pytest.mark.parametrize(
        ("role", "bidirectional", "kind", "for_next_turn"),
        [
            ("kv_consumer", True, "d", True),
            ("kv_both", True, "d", True),
            ("kv_producer", True, "d", True),
            ("kv_consumer", False, "d", None),
            ("kv_both", False, "d", None),
            ("kv_producer", False, "d", None),
            ("kv_consumer", True, "ordinary", None),
            ("kv_both", True, "ordinary", None),
            ("kv_both", True, "another connector's", None),
            ("kv_both", True, "empty", None),
            ("kv_both", True, "p", False),
            ("kv_both", False, "p", False),
            ("kv_consumer", True, "p", False),
            ("kv_consumer", False, "p", None),
        ],
    )
    def test_who_grants_what(
        self, make_scheduler: MakeScheduler, role: str, bidirectional: bool, kind: str, for_next_turn: bool | None
    ) -> None:
        """None: nothing is held, and no params are returned."""
        scheduler = make_scheduler(role, bidirectional=bidirectional)
        params = {
            "ordinary": None,
            "empty": {},
            "another connector's": make_params((BLOCKS[:3],), ticket=None),
            "p": dict(TO_P),
            "d": d_request().kv_transfer_params,
        }[kind]
        request = make_request(FIRST_TURN, params)
        scheduler.on_new_request(request)
        scheduler.after_alloc(request, (TABLE,), 0)
        held, returned = scheduler.request_finished(decode(request, ANSWER), (TABLE,))
        assert held is (for_next_turn is not None)
        assert (returned is None) is (for_next_turn is None)
        if returned is not None:
            assert returned["do_remote_decode"] is for_next_turn
            assert returned[EXTRA_KEY]["lease_s"] == (480.0 if for_next_turn else 30.0)

    @pytest.mark.parametrize("status", [status for status in RequestStatus if RequestStatus.is_finished(status)])
    def test_held_by_how_it_ended(self, make_scheduler: MakeScheduler, status: RequestStatus) -> None:
        scheduler = make_scheduler("kv_consumer", bidirectional=True)
        request = d_request()
        scheduler.on_new_request(request)
        scheduler.after_alloc(request, (TABLE,), 0)
        held, params = scheduler.request_finished(decode(request, ANSWER, status), (TABLE,))
        assert held is (status in {RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED})
        assert params is not None
        assert names_earlier_turn(params) is held
        assert params["do_remote_decode"] is True

    def test_a_token_fed_too_many_does_not_count(self, make_scheduler: MakeScheduler) -> None:
        scheduler = make_scheduler("kv_consumer", bidirectional=True)
        request = decode(d_request(), ANSWER, RequestStatus.FINISHED_STOPPED)
        request.num_computed_tokens += 1
        _, params = scheduler.request_finished(request, (TABLE,))
        assert params is not None
        assert params["remote_num_tokens"] == HELD

    def test_aborted_before_any_token_was_computed(self, make_scheduler: MakeScheduler) -> None:
        scheduler = make_scheduler("kv_consumer", bidirectional=True)
        request = d_request()
        scheduler.on_new_request(request)
        request.status = RequestStatus.FINISHED_ABORTED
        held, params = scheduler.request_finished(request, ([],))
        assert not held
        assert params is not None
        assert EXTRA_KEY not in params


def test_the_workers_are_told_of_steps_that_only_wait_for_pulls(make_scheduler: MakeScheduler) -> None:
    scheduler = make_scheduler("kv_consumer")
    busy = first_step("other", [[1]], 0, 1)
    assert scheduler.build_step(NO_STEP) is NOTHING
    request = d_request()
    scheduler.on_new_request(request)
    scheduler.after_alloc(request, (TABLE,), len(FIRST_TURN))
    first = scheduler.build_step(NO_STEP)
    assert (len(first.pulls), first.only_pulls) == (1, True)
    assert scheduler.take_stats() is not None
    assert scheduler.build_step(NO_STEP) is ONLY_PULLS, "with nothing else to tell"
    assert not scheduler.build_step(busy).only_pulls
    scheduler.finished([request.request_id], ())
    assert not scheduler.build_step(NO_STEP).only_pulls


class TestStatistics:
    def test_the_worker_is_told_of_the_schedulers(self, make_scheduler: MakeScheduler) -> None:
        """vLLM 0.23 asks the scheduler only where a worker has some, and the workers of a pure P have none."""
        scheduler = make_scheduler("kv_producer")
        assert not scheduler.build_step(NO_STEP).has_stats
        request = make_request(FIRST_TURN, {"do_remote_decode": True})
        scheduler.on_new_request(request)
        assert scheduler.request_finished(finish(request), (TABLE,))[0]
        assert scheduler.build_step(NO_STEP).has_stats
        stats = scheduler.take_stats()
        assert stats is not None
        (state,) = stats.data["gauges"].values()
        assert state["values"]["held_leases"] == 1
        assert not scheduler.build_step(NO_STEP).has_stats

    def test_a_step_in_which_nothing_happens_is_no_work(self, make_scheduler: MakeScheduler) -> None:
        """As nearly all are, and every running request waits for each of them."""
        scheduler = make_scheduler("kv_both")
        request = make_request(FIRST_TURN, {"do_remote_decode": True})
        scheduler.on_new_request(request)
        assert scheduler.request_finished(finish(request), (TABLE,))[0]
        assert scheduler.take_stats() is not None
        producer = scheduler._producer
        assert producer is not None
        scheduler.build_step(NO_STEP)
        asked: list[str] = []

        class Noting:
            def __init__(self, native: object) -> None:
                self._native = native

            def __getattr__(self, name: str) -> Any:
                asked.append(name)
                return getattr(self._native, name)

        parts: Any = producer
        parts._leases.table, parts._server = Noting(parts._leases.table), Noting(parts._server)
        assert scheduler.build_step(NO_STEP) is NOTHING
        assert scheduler.take_stats() is None
        assert asked == ["changes", "changes"]
        assert StepMetadata() == NOTHING

    def test_a_worker_hands_on_that_there_are_some(self) -> None:
        place = RankPlace(tp_rank=0, pp_rank=0, tp_size=1, pp_size=1, index=0)
        worker = ConnectorWorker(
            ConnectorConfig(), _native.LlmDataDist(1, 1), make_contract(), place, {}, (BLOCK_SIZE,), GIVES
        )
        try:
            for has_stats in (True, False):
                worker.start_step(StepMetadata(has_stats=has_stats))
                stats = worker.take_stats()
                assert (stats is not None) is has_stats
                assert stats is None or stats.is_empty()
        finally:
            worker.close()
