"""Models with several KV cache groups, on both sides: sliding windows with null blocks, states with scratch blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from support.counting_keeper import CountingKeeper
from support.engine_config import FULL, STATE, WINDOW, group_of, vllm_config
from support.pd import (
    BLOCK_SIZE,
    LOOPBACK,
    OTHER_TOKEN,
    TO_P,
    decode,
    finish,
    make_params,
    make_request,
    make_ticket,
)
from vllm.v1.request import RequestStatus

from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY, parse_remote_prefill
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

PROMPT = list(range(100, 100 + 4 * BLOCK_SIZE - 3))
ATTENTION = (KVGroup(BLOCK_SIZE), KVGroup(BLOCK_SIZE))
WINDOWED = (KVGroup(BLOCK_SIZE), KVGroup(BLOCK_SIZE, has_window=True))
HYBRID = (*ATTENTION, KVGroup(0, scratch_blocks=1))
SIZES = (BLOCK_SIZE, BLOCK_SIZE, 0)
LEASE_S = 30.0

REMOTE = ((11, 4, 9, 2), (0, 0, 30, 31), (40,))
LOCAL = ([50, 51, 52, 53, 54], [0, 0, 60, 61, 62], [0, 70, 71])
"""vLLM's tables: look-ahead blocks at the end, null blocks where no window reaches, scratch after the state."""

MakeConsumer = Callable[[tuple[KVGroup, ...]], ConsumerScheduler]
MakeProducer = Callable[[tuple[KVGroup, ...]], ProducerScheduler]


@pytest.fixture
def make_consumer(keeper: CountingKeeper) -> MakeConsumer:
    del keeper
    return lambda groups: ConsumerScheduler(groups, lambda _: True, 60.0, 5.0, Trust(), recompute_threshold=None)


@pytest.fixture
def make_producer() -> Iterator[MakeProducer]:
    made: list[ProducerScheduler] = []

    def make(groups: tuple[KVGroup, ...]) -> ProducerScheduler:
        identity = InstanceIdentity("engine-p", tp_size=1, pp_size=1, dcp_size=1, groups=groups)
        made.append(ProducerScheduler(identity, Endpoint(LOOPBACK, 0), 600.0, Trust()))
        return made[-1]

    yield make
    for producer in made:
        producer.close()


def params_for(held: int, blocks: tuple[tuple[int, ...], ...] = REMOTE, sizes: tuple[int, ...] = SIZES) -> Any:
    ticket = make_ticket(prompt_digest=prompt_digest(PROMPT[:held]), block_sizes=sizes)
    return make_params(blocks, num_tokens=held, ticket=ticket)


class TestConsumer:
    def test_blocks_of_every_group(self, make_consumer: MakeConsumer) -> None:
        consumer = make_consumer(HYBRID)
        request = make_request(PROMPT, params_for(len(PROMPT) - 1))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == len(PROMPT) - 1
        consumer.after_alloc(request, LOCAL, len(PROMPT) - 1)
        ((job,), _) = consumer.take_jobs()
        assert job.local_blocks == ((50, 51, 52, 53), (0, 0, 60, 61), (70,))
        assert job.remote.remote_block_ids == REMOTE
        consumer.received([request.request_id])

    def test_a_state_is_pulled_whatever_else_is_cached_here(self, make_consumer: MakeConsumer) -> None:
        consumer = make_consumer(HYBRID)
        request = make_request(PROMPT, params_for(len(PROMPT) - 1))
        consumer.on_new_request(request)
        lacking = consumer.matched_tokens(request, 3 * BLOCK_SIZE)
        assert lacking == len(PROMPT) - 1 - 3 * BLOCK_SIZE
        consumer.after_alloc(request, LOCAL, lacking)
        ((job,), _) = consumer.take_jobs()
        assert (job.first_token, job.end_token) == (3 * BLOCK_SIZE, len(PROMPT) - 1)
        assert job.local_blocks == ((53,), (61,), (70,))
        consumer.received([request.request_id])

    @pytest.mark.parametrize("held", [1, BLOCK_SIZE, len(PROMPT) - 1])
    def test_the_state_of_any_token_but_the_last(self, make_consumer: MakeConsumer, held: int) -> None:
        consumer = make_consumer(HYBRID)
        request = make_request(PROMPT, params_for(held))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == held
        consumer.request_finished(request.request_id)

    @pytest.mark.parametrize(
        "params",
        [
            params_for(len(PROMPT)),
            params_for(len(PROMPT) + 1),
            params_for(len(PROMPT) - 1, (REMOTE[0][:3], *REMOTE[1:])),
            params_for(len(PROMPT) - 1, (REMOTE[0], REMOTE[1][:3], REMOTE[2])),
        ],
        ids=["after the last token", "of a longer prompt", "too few blocks", "too few blocks of one group"],
    )
    def test_a_state_of_another_token_has_no_use(
        self, make_consumer: MakeConsumer, keeper: CountingKeeper, params: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = make_consumer(HYBRID)
        request = make_request(PROMPT, params)
        consumer.on_new_request(request)
        assert +keeper.users, "P waits to hear of its lease"
        assert consumer.matched_tokens(request, 0) == 0
        consumer.after_alloc(request, LOCAL, 0)
        assert consumer.take_jobs() == ((), ())
        assert "are those after" in caplog.text

    def test_a_window_of_another_token_has_lost_what_this_one_needs(self, make_consumer: MakeConsumer) -> None:
        for held, loadable in ((len(PROMPT) - 1, len(PROMPT) - 1), (len(PROMPT), 0)):
            consumer = make_consumer(WINDOWED)
            request = make_request(PROMPT, params_for(held, REMOTE[:2], SIZES[:2]))
            consumer.on_new_request(request)
            assert consumer.matched_tokens(request, 0) == loadable
            consumer.request_finished(request.request_id)

    def test_without_states_the_last_token_is_left_out(self, make_consumer: MakeConsumer) -> None:
        consumer = make_consumer(ATTENTION)
        request = make_request(PROMPT, params_for(len(PROMPT), REMOTE[:2], SIZES[:2]))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == len(PROMPT) - 1
        consumer.request_finished(request.request_id)

    def test_the_group_with_the_fewest_tokens_counts(self, make_consumer: MakeConsumer) -> None:
        consumer = make_consumer(ATTENTION)
        request = make_request(PROMPT, params_for(len(PROMPT), (REMOTE[0], REMOTE[1][:2]), (BLOCK_SIZE, 8)))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == 16
        consumer.request_finished(request.request_id)

    def test_p_may_group_its_layers_in_another_way(self, make_consumer: MakeConsumer) -> None:
        """What lies where is the worker's to find, by the names of layers."""
        consumer = make_consumer(ATTENTION)
        request = make_request(PROMPT, params_for(len(PROMPT), REMOTE[:1], (BLOCK_SIZE,)))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == len(PROMPT) - 1
        consumer.after_alloc(request, LOCAL[:2], len(PROMPT) - 1)
        ((job,), _) = consumer.take_jobs()
        assert [len(group) for group in job.local_blocks] == [4, 4]
        assert len(job.remote.remote_block_ids) == 1
        consumer.received([request.request_id])

    @pytest.mark.parametrize("blocks", [REMOTE[:1], REMOTE])
    def test_other_groups_than_the_lease_is_for(
        self, make_consumer: MakeConsumer, blocks: tuple[tuple[int, ...], ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = make_consumer(ATTENTION)
        request = make_request(PROMPT, params_for(len(PROMPT), blocks, SIZES[:2]))
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == 0
        consumer.after_alloc(request, LOCAL[:2], 0)
        assert f"remote_block_ids: {len(blocks)} KV cache groups, the lease is for 2" in caplog.text


class TestProducer:
    TABLES = ([7, 3, 5, 9, 12], [0, 0, 6, 8, 13], [0, 20, 21])

    def test_blocks_of_every_group(self, make_producer: MakeProducer) -> None:
        producer = make_producer(HYBRID)
        request = finish(make_request(PROMPT, TO_P))
        held, params = producer.request_finished(request, self.TABLES, LEASE_S)
        assert held
        remote = parse_remote_prefill(params)
        assert remote.remote_block_ids == ((7, 3, 5, 9), (0, 0, 6, 8), (20,))
        assert remote.remote_num_tokens == len(PROMPT)
        assert remote.ticket.block_sizes == SIZES
        assert producer.held() == (1, 7), "null blocks are held by nobody"

    def test_what_d_gets_is_what_it_takes(self, make_producer: MakeProducer, make_consumer: MakeConsumer) -> None:
        _, params = make_producer(HYBRID).request_finished(
            finish(make_request(PROMPT[:-1], TO_P)), self.TABLES, LEASE_S
        )
        consumer = make_consumer(HYBRID)
        request = make_request(PROMPT, params)
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == len(PROMPT) - 1
        consumer.request_finished(request.request_id)

    @pytest.mark.parametrize("tables", [([], [], []), ([0, 0, 0], [0, 0, 0], [0, 0])])
    def test_no_blocks_are_not_held(self, make_producer: MakeProducer, tables: tuple[list[int], ...]) -> None:
        producer = make_producer(HYBRID)
        held, params = producer.request_finished(finish(make_request(PROMPT, TO_P)), tables, LEASE_S)
        assert not held
        assert EXTRA_KEY not in params
        assert params["remote_block_ids"] == [[], [], []]
        assert producer.held() == (0, 0)

    @pytest.mark.parametrize(("computed", "with_state"), [(-1, True), (0, True), (1, False)])
    def test_a_state_is_held_for_the_tokens_that_it_has_seen(
        self, make_producer: MakeProducer, computed: int, with_state: bool
    ) -> None:
        for groups, expected in ((HYBRID, with_state), (WINDOWED, with_state), (ATTENTION, True)):
            request = finish(make_request(PROMPT, TO_P))
            request.num_computed_tokens += computed
            tables = self.TABLES[: len(groups)]
            held, params = make_producer(groups).request_finished(request, tables, LEASE_S)
            assert held is expected
            assert params["remote_num_tokens"] == (len(PROMPT) + min(computed, 0) if held else 0)

    @pytest.mark.parametrize(
        ("status", "with_state"),
        [(RequestStatus.FINISHED_LENGTH_CAPPED, True), (RequestStatus.FINISHED_STOPPED, False)],
    )
    def test_a_decoded_request_that_stopped_by_itself_may_have_a_later_state(
        self, make_producer: MakeProducer, status: RequestStatus, with_state: bool
    ) -> None:
        for groups, expected in ((HYBRID, with_state), (WINDOWED, with_state), (ATTENTION, True)):
            request = decode(make_request(PROMPT, make_params()), [1, 2, 3], status)
            tables = self.TABLES[: len(groups)]
            held, _ = make_producer(groups).request_finished(request, tables, LEASE_S, for_next_turn=True)
            assert held is expected


class TestShortenedPrompt:
    """P computes the state before the prompt's last token, which D feeds to it; and keeps the window before it."""

    GROUPS = (group_of(FULL, "a"), group_of(STATE, "b"))

    @staticmethod
    def announced(request: Any, groups: Any, role: str = "kv_producer") -> Any:
        with closing(ConnectorScheduler(ConnectorConfig(), vllm_config(role), groups)) as scheduler:
            scheduler.on_new_request(request)
        return request

    @staticmethod
    def lengths(request: Any) -> set[int]:
        return {request.num_prompt_tokens, request.num_tokens, len(request.prompt_token_ids)}

    @pytest.mark.parametrize("spec", [STATE, WINDOW])
    def test_by_one_token(self, spec: Any) -> None:
        request = self.announced(make_request(PROMPT, TO_P), (group_of(FULL, "a"), group_of(spec, "b")))
        assert self.lengths(request) == {len(PROMPT) - 1}
        assert request.prompt_token_ids == list(request.all_token_ids) == PROMPT[:-1]
        assert request.max_tokens == 1

    @pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
    def test_is_what_the_lease_is_for(self, role: str, make_consumer: MakeConsumer) -> None:
        groups = (KVGroup(BLOCK_SIZE), KVGroup(0))
        with closing(ConnectorScheduler(ConnectorConfig(), vllm_config(role), self.GROUPS)) as scheduler:
            request = make_request(PROMPT, TO_P)
            scheduler.on_new_request(request)
            held, params = scheduler.request_finished(finish(request), ([7, 3, 5, 9], [20]))
        assert held
        assert params is not None
        consumer = make_consumer(groups)
        at_d = make_request(PROMPT, params)
        consumer.on_new_request(at_d)
        assert consumer.matched_tokens(at_d, 0) == len(PROMPT) - 1
        consumer.request_finished(at_d.request_id)

    def test_not_without_states_and_windows(self) -> None:
        request = self.announced(make_request(PROMPT, TO_P), (group_of(FULL, "a"),))
        assert self.lengths(request) == {len(PROMPT)}

    @pytest.mark.parametrize("params", [None, {}, make_params(ticket=make_ticket(prompt_digest=OTHER_TOKEN))])
    def test_not_of_requests_that_nobody_decodes_elsewhere(
        self, params: Any, keeper: CountingKeeper, make_consumer: MakeConsumer
    ) -> None:
        del make_consumer
        request = self.announced(make_request(PROMPT, params), self.GROUPS, "kv_both")
        assert self.lengths(request) == {len(PROMPT)}
        keeper.users.clear()

    def test_a_single_token_stays(self) -> None:
        request = self.announced(make_request([5], TO_P), self.GROUPS)
        assert self.lengths(request) == {1}


@pytest.mark.parametrize("insecure", [False, True])
def test_insecure_is_warned_of_once(insecure: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = ConnectorConfig(insecure=insecure)
    with closing(ConnectorScheduler(config, vllm_config("kv_both"), (group_of(FULL, "a"),))):
        pass
    warned = [record.getMessage() for record in caplog.records if "insecure" in record.getMessage()]
    assert len(warned) == int(insecure), warned
