"""TransferQueue as Python sees it. Its scheduling is tested natively; here are arguments, results and the eventfd."""

from __future__ import annotations

import gc
import select

import pytest

from vllm_datadist_connector import _native


@pytest.fixture
def queue() -> _native.TransferQueue:
    """Over an endpoint that is not initialised: every operation that runs fails at once."""
    return _native.TransferQueue(_native.LlmDataDist(1, 1), threads=2, capacity=8)


def _collect(queue: _native.TransferQueue, count: int) -> list[_native.Completion]:
    completions: list[_native.Completion] = []
    while len(completions) < count:
        readable, _, _ = select.select([queue], [], [], 30)
        assert readable, f"{len(completions)} of {count} operations completed"
        completions += queue.poll()
    return completions


def test_completions_carry_what_the_call_returned(queue: _native.TransferQueue) -> None:
    submitted = queue.submit_pull_blocks(2, 1, 1, [0], [1], 10_000)
    (completion,) = _collect(queue, 1)
    assert isinstance(completion, _native.Completion)
    assert (completion.id, completion.status, completion.cancelled) == (submitted, _native.LLM_FAILED, False)
    assert completion.error
    assert completion.queued_s >= 0
    assert completion.run_s >= 0
    assert queue.poll() == []
    assert select.select([queue], [], [], 0)[0] == []


def test_every_kind_of_operation_can_be_submitted(queue: _native.TransferQueue) -> None:
    peer = _native.ClusterInfo(2, [("127.0.0.1", 1)], [("127.0.0.1", 0)])
    ids = {
        queue.submit_pull_blocks(2, 1, 1, [0], [1], 10_000, (0, 1), (0, 1), 2),
        queue.submit_push_blocks(1, 2, 1, [0], [1], 4, 10_000),
        queue.submit_link(peer, 100, 10_000),
        queue.submit_unlink(peer, 100, 10_000, force=True),
    }
    assert {completion.id for completion in _collect(queue, 4)} == ids


def test_ids_that_no_block_can_have_complete_as_invalid(queue: _native.TransferQueue) -> None:
    queue.submit_pull_blocks(2, 1, 1, [-5], [1], 10_000)
    queue.submit_push_blocks(1, 2, 1, [0], [2**64], 4, 10_000)
    pulled, pushed = _collect(queue, 2)
    assert pulled.status == pushed.status == _native.LLM_PARAM_INVALID
    assert pulled.error.startswith("src_blocks[0] is -5")
    assert pushed.error.startswith("dst_blocks[0] is 18446744073709551616")
    with pytest.raises(TypeError):
        queue.submit_pull_blocks(2, 1, 1, ["0"], [1], 10_000)


def test_a_deadline_in_the_past_completes_as_cancelled(queue: _native.TransferQueue) -> None:
    queue.submit_pull_blocks(2, 1, 1, [0], [1], -1)
    (completion,) = _collect(queue, 1)
    assert (completion.status, completion.cancelled) == (_native.LLM_TIMEOUT, True)
    assert completion.run_s == 0


def test_cancel_of_unknown_ids_is_false(queue: _native.TransferQueue) -> None:
    assert not queue.cancel(0)
    assert not queue.cancel(-1)
    assert not queue.cancel(99)


def test_drained_and_closed_queues_refuse(queue: _native.TransferQueue) -> None:
    submitted = queue.submit_pull_blocks(2, 1, 1, [0], [1], 10_000)
    assert queue.drain(30.0)
    assert queue.drain(0)
    with pytest.raises(RuntimeError, match="drained or closed"):
        queue.submit_pull_blocks(2, 1, 1, [0], [1], 10_000)
    queue.close()
    queue.close()
    assert [completion.id for completion in queue.poll()] == [submitted]
    with pytest.raises(ValueError, match="nan"):
        queue.drain(float("nan"))


@pytest.mark.parametrize(
    ("threads", "capacity", "message"),
    [
        (-1, 1, r"threads is -1; allowed: 1\.\.64"),
        (0, 1, r"threads is 0; allowed: 1\.\.64"),
        (65, 1, r"threads is 65; allowed: 1\.\.64"),
        (1, 0, r"capacity is 0; allowed: 1\.\.1048576"),
        (1, 2**20 + 1, r"capacity is 1048577; allowed"),
    ],
)
def test_sizes_out_of_range_are_named(threads: int, capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.TransferQueue(_native.LlmDataDist(1, 1), threads, capacity)


def test_the_queue_keeps_its_endpoint(queue: _native.TransferQueue) -> None:
    gc.collect()
    queue.submit_pull_blocks(2, 1, 1, [0], [1], 10_000)
    assert len(_collect(queue, 1)) == 1


def test_queue_full_is_a_runtime_error() -> None:
    assert issubclass(_native.QueueFullError, RuntimeError)
