"""ConsumerScheduler: every path of a D request, hostile params, and random sequences of vLLM's calls."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.counting_keeper import CountingKeeper
from support.d_requests import LOADED, LOCAL, PROMPT, REMOTE, counted, d_request, make_consumer, noted, params_for
from support.pd import BLOCK_SIZE, LOOPBACK, OTHER_TOKEN, TOKEN, make_request, make_ticket

from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.protocol.params import EXTRA_KEY, parse_remote_prefill
from vllm_datadist_connector.scheduler import consumer as consumer_module
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.side_channel.endpoint import Endpoint


@pytest.fixture
def meter() -> SchedulerMeter:
    return SchedulerMeter("engine-d")


@pytest.fixture
def consumer(keeper: CountingKeeper, meter: SchedulerMeter) -> ConsumerScheduler:
    del keeper
    return make_consumer(meter=meter)


def job_of(consumer: ConsumerScheduler) -> PullJob:
    (pulls, cancels) = consumer.take_jobs()
    assert cancels == ()
    (job,) = pulls
    return job


def test_pulled(consumer: ConsumerScheduler, meter: SchedulerMeter, keeper: CountingKeeper) -> None:
    request = d_request()
    params = params_for(PROMPT)
    consumer.on_new_request(request)
    assert keeper.endpoints == [(LOOPBACK, 40000)]
    assert consumer.matched_tokens(request, 0) == consumer.matched_tokens(request, 0) == LOADED
    consumer.after_alloc(request, (LOCAL,), LOADED)
    assert request.kv_transfer_params["do_remote_prefill"] is False
    assert job_of(consumer) == PullJob(
        request_id=request.request_id,
        remote=parse_remote_prefill(params),
        local_blocks=(tuple(LOCAL),),
        first_token=0,
        end_token=LOADED,
        prompt_digest=prompt_digest(PROMPT),
        from_ourselves=False,
        deadline_s=60.0,
    )
    assert consumer.pulling() == 1
    assert consumer.matched_tokens(request, 0) == 0
    assert +keeper.users
    consumer.received([request.request_id])
    assert not +keeper.users
    # vLLM calls again when it schedules the loaded request.
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.request_finished(request.request_id)
    assert consumer.take_jobs() == ((), ())
    assert (consumer.pulling(), counted(meter), counted(meter)) == (0, {"releases": 1}, {})


def test_nothing_is_kept_of_a_request_that_vllm_drops_without_a_word_once_it_is_loaded(
    consumer: ConsumerScheduler, keeper: CountingKeeper
) -> None:
    """vllm-ascend's RecomputeScheduler ends a preempted request and never calls request_finished(): its client asks
    again, perhaps by the same id."""
    for _ in range(2):
        request = d_request()
        consumer.on_new_request(request)
        assert consumer.matched_tokens(request, 0) == LOADED
        consumer.after_alloc(request, (LOCAL,), LOADED)
        assert job_of(consumer).request_id == request.request_id
        consumer.received([request.request_id])
        consumer.after_alloc(request, (LOCAL,), 0)
        assert (consumer.pulling(), consumer._requests) == (0, {})
        assert not +keeper.users


@pytest.mark.parametrize("local_hit_blocks", [1, 3, 4])
def test_only_what_the_prefix_cache_lacks_is_pulled(consumer: ConsumerScheduler, local_hit_blocks: int) -> None:
    request = d_request()
    consumer.on_new_request(request)
    lacking = consumer.matched_tokens(request, local_hit_blocks * BLOCK_SIZE)
    assert lacking == LOADED - local_hit_blocks * BLOCK_SIZE
    consumer.after_alloc(request, (LOCAL,), lacking)
    job = job_of(consumer)
    assert job.remote.remote_block_ids == (REMOTE,), "the confirmation is for all of them"
    assert (job.first_token, job.end_token) == (local_hit_blocks * BLOCK_SIZE, LOADED)
    assert job.local_blocks == (tuple(LOCAL[local_hit_blocks:]),)
    consumer.received([request.request_id])


@pytest.mark.parametrize("computed", [LOADED, len(PROMPT)])
def test_nothing_lacks(consumer: ConsumerScheduler, meter: SchedulerMeter, computed: int) -> None:
    request = d_request()
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, computed) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert consumer.take_jobs() == ((), ())
    assert counted(meter) == {"releases": 1}


def test_p_computed_less_than_the_prompt(consumer: ConsumerScheduler) -> None:
    request = d_request(params_for(PROMPT[: 2 * BLOCK_SIZE], REMOTE[:2]))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, BLOCK_SIZE) == BLOCK_SIZE
    consumer.after_alloc(request, (LOCAL,), BLOCK_SIZE)
    job = job_of(consumer)
    assert job.local_blocks == ((51,),)
    assert (job.first_token, job.end_token) == (BLOCK_SIZE, 2 * BLOCK_SIZE)
    consumer.received([request.request_id])


@pytest.mark.parametrize("held", [1, BLOCK_SIZE - 1, BLOCK_SIZE + 5, len(PROMPT) - 1])
def test_a_prompt_that_only_begins_with_what_p_holds(consumer: ConsumerScheduler, held: int) -> None:
    blocks = REMOTE[: -(-held // BLOCK_SIZE)]
    request = d_request(params_for(PROMPT[:held], blocks))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == held
    consumer.after_alloc(request, (LOCAL,), held)
    job = job_of(consumer)
    assert job.local_blocks == (tuple(LOCAL[: len(blocks)]),)
    assert (job.first_token, job.end_token) == (0, held)
    assert job.prompt_digest == prompt_digest(PROMPT[:held])
    consumer.received([request.request_id])


@pytest.mark.parametrize("held", [len(PROMPT) + 1, 10**6])
def test_p_cannot_give_more_than_the_prompt(consumer: ConsumerScheduler, held: int) -> None:
    """The digest is that of as many tokens as P claims to hold, of which this prompt has fewer."""
    request = d_request(params_for(PROMPT, num_tokens=held))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == LOADED
    consumer.request_finished(request.request_id)


def test_p_cannot_give_more_than_its_blocks(consumer: ConsumerScheduler) -> None:
    request = d_request(params_for(PROMPT, REMOTE[:3]))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 3 * BLOCK_SIZE
    consumer.request_finished(request.request_id)


@pytest.mark.parametrize(("size", "given"), [(32, LOADED), (8, 2 * 8)])
def test_p_counts_in_blocks_of_its_own_size(consumer: ConsumerScheduler, size: int, given: int) -> None:
    ticket = make_ticket(prompt_digest=prompt_digest(PROMPT), block_sizes=(size,))
    blocks = REMOTE[: -(-len(PROMPT) // size)] if size > BLOCK_SIZE else REMOTE[:2]
    request = d_request(params_for(PROMPT, blocks, ticket=ticket))
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == given
    consumer.after_alloc(request, (LOCAL,), given)
    assert job_of(consumer).local_blocks == (tuple(LOCAL[: -(-given // BLOCK_SIZE)]),)
    consumer.received([request.request_id])


@pytest.mark.parametrize("length", [1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
def test_all_but_the_last_token(consumer: ConsumerScheduler, meter: SchedulerMeter, length: int) -> None:
    """Also where the last one stands alone in its block, whose number D then does not pull into."""
    prompt = PROMPT[:length]
    blocks = REMOTE[: -(-length // BLOCK_SIZE)]
    request = make_request(prompt, params_for(prompt, blocks))
    consumer.on_new_request(request)
    count = consumer.matched_tokens(request, 0)
    assert count == length - 1
    consumer.after_alloc(request, (LOCAL,), count)
    pulls, _ = consumer.take_jobs()
    assert [job.local_blocks for job in pulls] == [(tuple(LOCAL[: -(-count // BLOCK_SIZE)]),)][: length - 1]
    assert all(job.remote.remote_block_ids == (blocks,) for job in pulls)
    consumer.received([request.request_id])
    assert counted(meter) == {"releases": 1}, "also of a prompt of one token, of which nothing is loaded"


@pytest.mark.parametrize(
    ("ourselves", "ours"),
    [
        (None, False),
        ((Endpoint(LOOPBACK, 40000), TOKEN), True),
        ((Endpoint(LOOPBACK, 40000), OTHER_TOKEN), False),
        ((Endpoint(LOOPBACK, 40001), TOKEN), False),
        ((Endpoint("127.0.0.2", 40000), TOKEN), False),
    ],
    ids=["no P", "we", "who lived here before", "another port", "another host"],
)
def test_blocks_of_ours_are_known_as_such(
    keeper: CountingKeeper, ourselves: tuple[Endpoint, str] | None, ours: bool
) -> None:
    del keeper
    consumer = make_consumer(ourselves=ourselves)
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), LOADED)
    assert job_of(consumer).from_ourselves is ours
    consumer.received([request.request_id])


@pytest.mark.parametrize("computed", [0, BLOCK_SIZE])
@pytest.mark.parametrize("fewer", [1, 5, BLOCK_SIZE, 3 * BLOCK_SIZE])
def test_vllm_takes_fewer_tokens_than_offered(consumer: ConsumerScheduler, computed: int, fewer: int) -> None:
    """It rounds down to whole blocks, for one: what it takes begins where the offer began."""
    request = d_request()
    consumer.on_new_request(request)
    consumer.matched_tokens(request, 2 * BLOCK_SIZE)
    taken = consumer.matched_tokens(request, computed) - fewer
    consumer.after_alloc(request, (LOCAL,), taken)
    job = job_of(consumer)
    assert (job.first_token, job.end_token) == (computed, computed + taken)
    assert job.local_blocks == (tuple(LOCAL[computed // BLOCK_SIZE : -(-(computed + taken) // BLOCK_SIZE)]),)
    consumer.received([request.request_id])


def test_aborted_before_it_was_scheduled(consumer: ConsumerScheduler, keeper: CountingKeeper) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.matched_tokens(request, 0)
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())


def test_aborted_while_it_is_pulled(consumer: ConsumerScheduler, keeper: CountingKeeper) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), LOADED)
    consumer.take_jobs()
    consumer.request_finished(request.request_id)
    assert consumer.take_jobs() == ((), (request.request_id,))
    assert +keeper.users, "P must keep the blocks until nothing reads them"
    consumer.received([request.request_id])
    assert not +keeper.users


def test_a_request_whose_pull_is_done_may_end_without_a_word(
    consumer: ConsumerScheduler, keeper: CountingKeeper
) -> None:
    """As with vllm-ascend's RecomputeScheduler, which frees a running request and has it computed elsewhere."""
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), LOADED)
    consumer.take_jobs()
    consumer.received([request.request_id])
    assert not consumer._requests
    assert not +keeper.users


def test_a_failed_pull_is_recomputed_here(consumer: ConsumerScheduler) -> None:
    request = d_request()
    consumer.on_new_request(request)
    consumer.after_alloc(request, (LOCAL,), LOADED)
    consumer.take_jobs()
    consumer.received([request.request_id])
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert consumer.take_jobs() == ((), ())


def test_a_lease_known_to_be_gone_is_not_pulled(
    consumer: ConsumerScheduler, keeper: CountingKeeper, meter: SchedulerMeter, caplog: pytest.LogCaptureFixture
) -> None:
    request = d_request()
    consumer.on_new_request(request)
    keeper.gone.add(request.kv_transfer_params[EXTRA_KEY]["token"])
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    assert noted(meter) == {"lease_gone": 1}
    assert f"P's request cmpl-p-0-00000000 at {LOOPBACK}:40000" in caplog.text


def test_a_lease_that_nobody_needs_is_not_missed(
    consumer: ConsumerScheduler, keeper: CountingKeeper, meter: SchedulerMeter
) -> None:
    request = d_request()
    consumer.on_new_request(request)
    keeper.gone.add(request.kv_transfer_params[EXTRA_KEY]["token"])
    consumer.matched_tokens(request, LOADED)
    consumer.after_alloc(request, (LOCAL,), 0)
    assert noted(meter) == {}


def test_more_leases_than_can_be_kept(
    consumer: ConsumerScheduler, keeper: CountingKeeper, meter: SchedulerMeter
) -> None:
    keeper.full = True
    request = d_request()
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    assert noted(meter) == {"too_many": 1}


def test_children_that_share_a_lease(consumer: ConsumerScheduler, keeper: CountingKeeper) -> None:
    children = [d_request(params_for(PROMPT), request_id=f"{i}_cmpl-x") for i in range(3)]
    for child in children:
        consumer.on_new_request(child)
        consumer.after_alloc(child, (LOCAL,), LOADED)
    assert len(consumer.take_jobs()[0]) == 3
    consumer.received([child.request_id for child in children[:2]])
    assert +keeper.users
    consumer.received([children[2].request_id])


def test_rejected_by_the_api_server_gives_the_lease_back(
    consumer: ConsumerScheduler, keeper: CountingKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM announces a rejected request with a prompt of its own making and aborts it at once."""
    request = make_request([0], params_for(PROMPT))
    consumer.on_new_request(request)
    assert +keeper.users
    consumer.request_finished(request.request_id)
    assert not +keeper.users
    assert consumer.take_jobs() == ((), ())
    assert not caplog.records


def test_ordinary_requests_are_none_of_ours(consumer: ConsumerScheduler, keeper: CountingKeeper) -> None:
    request = make_request(PROMPT)
    consumer.on_new_request(request)
    assert consumer.matched_tokens(request, 0) == 0
    consumer.after_alloc(request, (LOCAL,), 0)
    consumer.received(["unknown"])
    consumer.request_finished(request.request_id)
    assert not keeper.users
    assert consumer.take_jobs() == ((), ())


CALLS = st.sampled_from(["new", "match", "alloc", "alloc nothing", "step", "received", "finished"])


@given(st.lists(st.tuples(CALLS, st.integers(0, 2)), max_size=40))
def test_any_sequence_of_calls(calls: list[tuple[str, int]]) -> None:
    """vLLM may call in any order about any request: no exception, and each lease is released exactly once."""
    with pytest.MonkeyPatch.context() as patch:
        keeper = CountingKeeper()
        patch.setattr(consumer_module, "open_keeper", lambda *_: keeper)
        consumer = make_consumer(meter=(meter := SchedulerMeter("engine-d")))
        requests = [d_request(params_for(PROMPT), request_id=str(i)) for i in range(3)]
        pulled: Counter[str] = Counter()

        def step() -> None:
            pulls, _ = consumer.take_jobs()
            pulled.update(job.request_id for job in pulls)

        for call, index in calls:
            request = requests[index]
            if call == "new":
                consumer.on_new_request(request)
            elif call == "match":
                assert 0 <= consumer.matched_tokens(request, BLOCK_SIZE) <= LOADED - BLOCK_SIZE
            elif call == "alloc":
                consumer.after_alloc(request, (LOCAL,), LOADED)
            elif call == "alloc nothing":
                consumer.after_alloc(request, (LOCAL,), 0)
            elif call == "step":
                step()
            elif call == "received":
                consumer.received([request.request_id])
            else:
                consumer.request_finished(request.request_id)
        step()
        for request in requests:
            consumer.request_finished(request.request_id)
        consumer.received([request.request_id for request in requests])
        assert consumer.pulling() == 0
        assert not +keeper.users
        assert all(count == 1 for count in pulled.values())
        assert len(keeper.endpoints) == counted(meter).get("releases", 0)
