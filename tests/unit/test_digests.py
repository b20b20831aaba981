"""PromptDigests: long prompts are read beside the scheduler thread, and read right."""

from __future__ import annotations

import hashlib
import operator
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.counting_keeper import CountingKeeper
from support.pd import BLOCK_SIZE, TO_P, decode, make_params, make_request, make_ticket, wait_until

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.digest import (
    PromptHash,
    PromptHasher,
    blocks_digest,
    digest_and_count,
    prompt_digest,
)
from vllm_datadist_connector.scheduler import digests as digests_module
from vllm_datadist_connector.scheduler.consumer import COMPARED_AT_ONCE, ConsumerScheduler
from vllm_datadist_connector.scheduler.digests import INLINE_TOKENS, PromptDigests
from vllm_datadist_connector.side_channel.endpoint import Trust

ESCAPE = 0xFFFFFFFF
"""Comes before an id that four bytes do not hold, or that is it."""

LONG = list(range(INLINE_TOKENS + 5000))


def words(values: Sequence[int]) -> bytes:
    return b"".join(
        struct.pack("<I", value) if 0 <= value < ESCAPE else struct.pack("<Iq", ESCAPE, value) for value in values
    )


def text(value: str) -> bytes:
    encoded = value.encode(errors="surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def whole_prompt(tokens: Sequence[int], adapter: str = "", mm_hashes: Sequence[str] = ()) -> bytes:
    ids = words(tokens)
    return ids + text(adapter) + b"".join(map(text, mm_hashes)) + struct.pack("<Q", len(ids))


def blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Seven:
    def __index__(self) -> int:
        return 7


class TestValues:
    """Another release must find the same: they cross the wire."""

    @pytest.mark.parametrize("length", [*range(50), 127, 128, 129, 5000])
    def test_prompts(self, length: int) -> None:
        tokens = [(7919 * each) % 2**33 - 5 for each in range(length)]
        assert prompt_digest(tokens) == blake2b(whole_prompt(tokens))

    @pytest.mark.parametrize("adapter", ["", "one@ab", "\ud800"])
    @pytest.mark.parametrize("mm_hashes", [(), ("a",), ("a", "b" * 300), ("\udfff",)])
    def test_what_decides_beside_tokens(self, adapter: str, mm_hashes: Sequence[str]) -> None:
        assert prompt_digest([1, 2], adapter, mm_hashes) == blake2b(whole_prompt([1, 2], adapter, mm_hashes))

    @pytest.mark.parametrize("mm_hash", ["", "\7\0\0\0\0\0\0\0" + 8 * "\0"])
    def test_a_hash_that_reads_like_ids(self, mm_hash: str) -> None:
        """A client may choose it (`multi_modal_uuids`)."""
        read_as_ids = struct.unpack(f"<{2 + len(mm_hash) // 4}I", text(mm_hash))
        one, other = [1], [1, 0, 0, *read_as_ids[:-2]]
        assert whole_prompt(one, "", [mm_hash])[:-8] == whole_prompt(other)[:-8], "but for the size of the ids"
        assert prompt_digest(one, "", [mm_hash]) != prompt_digest(other)

    @pytest.mark.parametrize("blocks", [(), ((),), ((1, 2, 3),), ((1,), (), (2**40, 0, 2**32)), (tuple(range(600)),)])
    def test_blocks(self, blocks: tuple[tuple[int, ...], ...]) -> None:
        expected = b"".join(struct.pack("<Q", len(words(group)) // 4) + words(group) for group in blocks)
        assert blocks_digest(blocks) == blake2b(expected)
        count = sum(block != 0 for group in blocks for block in group)
        assert digest_and_count(blocks) == (blake2b(expected), count), "a null block is none"

    @pytest.mark.parametrize("odd", [-1, 2**30, ESCAPE - 1, ESCAPE, 2**32, 2**62, -(2**63), True, Seven()])
    def test_elements_that_are_no_small_ints(self, odd: Any) -> None:
        """Among those that are, which are read in a shorter way."""
        for at in range(3):
            tokens = [3, 2**30 - 1]
            tokens.insert(at, odd)
            assert prompt_digest(tokens) == blake2b(whole_prompt([operator.index(each) for each in tokens]))

    def test_a_list_that_changes_while_it_is_read(self) -> None:
        class Shrinking:
            def __index__(self) -> int:
                del tokens[1:]
                return 5

        tokens: list[Any] = [1, Shrinking(), 2, 3]
        assert prompt_digest(tokens) == blake2b(whole_prompt([1, 5]))

    @pytest.mark.parametrize("pieces", [1, 3, 16, 17, 100])
    def test_pieces(self, pieces: int) -> None:
        whole = PromptHash()
        for start in range(0, 1000, pieces):
            whole.update(LONG[start : min(1000, start + pieces)])
            assert whole.copy().hexdigest() == whole.hexdigest()
        assert whole.hexdigest() == prompt_digest(LONG[:1000])

    @pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 1.0, "1", None])
    def test_what_is_no_token(self, bad: object) -> None:
        tokens: list[object] = [1, bad]
        with pytest.raises((OverflowError, TypeError)):
            PromptHash().update(tokens)  # type: ignore[arg-type]


class HeldPending:
    def __init__(self, token_ids: Sequence[int], num_tokens: int, gate: Gate) -> None:
        self._tokens = list(token_ids[:num_tokens])
        self._gate = gate

    @property
    def done(self) -> bool:
        return self._gate.open

    def take(self) -> PromptHash | None:
        if not self.done:
            return None
        whole = PromptHash()
        whole.update(self._tokens)
        return whole


class Gate:
    """In place of the thread: done once it is let."""

    def __init__(self) -> None:
        self.open = False

    def begin(self, token_ids: Sequence[int], num_tokens: int) -> HeldPending:
        return HeldPending(token_ids, num_tokens, self)

    def close(self) -> None:
        pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(digests_module, "PromptHasher", lambda: gate)
    return gate


@pytest.fixture
def digests() -> Iterator[PromptDigests]:
    digests = PromptDigests()
    yield digests
    digests.close()


@pytest.mark.parametrize("length", [1, INLINE_TOKENS, INLINE_TOKENS + 1, len(LONG)])
def test_as_at_once(digests: PromptDigests, length: int) -> None:
    request = make_request(LONG[:length], TO_P)
    digests.begin(request, length)
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    assert digests.take(request, length, "") == prompt_digest(LONG[:length])


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("shorter", [0, 1])
def test_what_came_after_the_prompt_is_added(gate: Gate, shorter: int, is_done: bool) -> None:
    digests = PromptDigests()
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG) - shorter)
    gate.open = is_done
    output = [7] * 40
    decode(request, output)
    assert digests.take(request, len(LONG) + 39, "") == prompt_digest([*LONG, *output[:39]])


def test_fewer_than_were_begun_with(digests: PromptDigests) -> None:
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG))
    wait_until(lambda: digests.is_ready(request.request_id), "the digest")
    assert digests.take(request, 10, "") == prompt_digest(LONG[:10])


@pytest.mark.usefixtures("gate")
def test_forgotten_ones_are_not_kept() -> None:
    digests = PromptDigests()
    request = make_request(LONG, TO_P)
    digests.begin(request, len(LONG))
    assert not digests.is_ready(request.request_id)
    digests.forget(request.request_id)
    assert digests.is_ready(request.request_id)
    assert digests.take(request, 3, "") == prompt_digest(LONG[:3])
    assert not digests._begun


class TestHasher:
    @pytest.fixture
    def hasher(self) -> Iterator[PromptHasher]:
        hasher = PromptHasher()
        yield hasher
        hasher.close()

    def test_many_at_once(self, hasher: PromptHasher) -> None:
        begun = [hasher.begin(LONG, length) for length in range(500)]
        wait_until(lambda: all(each.done for each in begun), "all digests")
        for length, each in enumerate(begun):
            whole = each.take()
            assert whole is not None
            assert whole.hexdigest() == prompt_digest(LONG[:length])

    def test_what_is_taken_is_a_copy(self, hasher: PromptHasher) -> None:
        begun = hasher.begin(LONG, 10)
        wait_until(lambda: begun.done, "the digest")
        for _ in range(2):
            whole = begun.take()
            assert whole is not None
            whole.update(LONG[10:20])
            assert whole.hexdigest() == prompt_digest(LONG[:20])

    def test_dropped_ones_and_an_early_end(self, hasher: PromptHasher) -> None:
        for _ in range(100):
            hasher.begin(LONG, len(LONG))
        hasher.close()
        hasher.close()

    def test_after_its_end_it_reads_by_itself(self, hasher: PromptHasher) -> None:
        hasher.close()
        begun = hasher.begin(LONG, 20)
        whole = begun.take()
        assert whole is not None
        assert whole.hexdigest() == prompt_digest(LONG[:20])

    def test_a_forked_child_reads_by_itself(self, hasher: PromptHasher) -> None:
        begun = hasher.begin(LONG, 20)
        wait_until(lambda: begun.done, "the thread")
        child = os.fork()
        if child == 0:
            os._exit(0 if hasher.begin(LONG, 20).done else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("is_right", [True, False])
def test_a_request_waits_for_it(keeper: CountingKeeper, gate: Gate, is_right: bool) -> None:
    """vLLM asks again in the next step, and schedules others meanwhile."""
    del keeper
    consumer = ConsumerScheduler((KVGroup(BLOCK_SIZE),), lambda _: True, 60.0, 5.0, Trust(), None)
    digest = prompt_digest(LONG if is_right else LONG[1:])
    blocks = tuple(range(1, 2 + len(LONG) // BLOCK_SIZE))
    params = make_params((blocks,), ticket=make_ticket(prompt_digest=digest), num_tokens=len(LONG))
    request = make_request(LONG, params)
    consumer.on_new_request(request)
    for _ in range(2):
        assert consumer.matched_tokens(request, 0) is None
    gate.open = True
    assert consumer.matched_tokens(request, 0) == (len(LONG) - 1 if is_right else 0)
    consumer.request_finished(request.request_id)
    consumer.close()


def test_only_a_request_with_a_long_prompt_waits_for_it(keeper: CountingKeeper, gate: Gate) -> None:
    """A step costs any request more than the digest of some thousand tokens costs the others."""
    del keeper, gate
    consumer = ConsumerScheduler((KVGroup(BLOCK_SIZE),), lambda _: True, 60.0, 5.0, Trust(), None)
    answers = []
    for length in (COMPARED_AT_ONCE, COMPARED_AT_ONCE + 1):
        prompt = LONG[:length]
        blocks = tuple(range(1, 2 + length // BLOCK_SIZE))
        ticket = make_ticket(prompt_digest=prompt_digest(prompt))
        request = make_request(prompt, make_params((blocks,), ticket=ticket, num_tokens=length), f"r{length}")
        consumer.on_new_request(request)
        answers.append(consumer.matched_tokens(request, 0))
        consumer.request_finished(request.request_id)
    assert answers == [COMPARED_AT_ONCE - 1, None]
    consumer.close()
