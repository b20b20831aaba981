"""Grants through the bindings: a queue pushes into what was granted, and into nothing else."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from support.endpoints import Endpoint, Peer, copy_blocks

from vllm_datadist_connector import _native
from vllm_datadist_connector._native import LlmDataDist

SIZES = {"tensors": 4, "blocks": 16, "block_bytes": 4096}
PUSHER = 2


@pytest.fixture
def ends(
    transport: str, make_endpoint: Callable[..., Endpoint], make_peer: Callable[..., Peer]
) -> tuple[Endpoint, Peer]:
    """The owner, which is here, and the pusher."""
    options = {"datadist.Transport": transport, "datadist.PeerAccess": "granted"}
    owner = make_endpoint(cluster_id=1, options=options, **SIZES)
    pusher = make_peer(transport, cluster_id=PUSHER, **SIZES)
    owner.link(pusher)
    return owner, pusher


def _push(pusher: Peer, owner: Endpoint, src: Sequence[int], dst: Sequence[int]) -> int:
    status: int = pusher.call(
        "push_kv_blocks", pusher.cache_id, 1, owner.cache_id, list(src), list(dst), SIZES["tensors"]
    )
    return status


def test_a_peer_writes_what_it_was_granted(ends: tuple[Endpoint, Peer]) -> None:
    owner, pusher = ends
    before = owner.read_memory()
    assert _push(pusher, owner, [0, 1], [5, 6]) == _native.LLM_PARAM_INVALID
    np.testing.assert_array_equal(owner.memory, before)
    status, grant = owner.datadist.grant_writes(PUSHER, [(owner.cache_id, np.array([5, 6], np.uint64))])
    assert (status, grant) == (_native.LLM_SUCCESS, 1)
    assert _push(pusher, owner, [0, 1], [5, 6]) == _native.LLM_SUCCESS
    assert _push(pusher, owner, [0, 1], [6, 7]) == _native.LLM_PARAM_INVALID
    copy_blocks(pusher.read_memory(), before, [0, 1], [5, 6])
    np.testing.assert_array_equal(owner.memory, before)
    assert owner.datadist.revoke_writes(grant) == _native.LLM_SUCCESS
    assert _push(pusher, owner, [0, 1], [5, 6]) == _native.LLM_PARAM_INVALID


def test_a_queue_pushes_layers_into_a_grant(transport: str, make_endpoint: Callable[..., Endpoint]) -> None:
    options = {"datadist.Transport": transport}
    owner = make_endpoint(cluster_id=1, options=options | {"datadist.PeerAccess": "read_granted"}, **SIZES)
    pusher = make_endpoint(cluster_id=PUSHER, options=options, **SIZES)
    pusher.link(owner)
    status, _ = owner.datadist.grant_writes(PUSHER, [(owner.cache_id, [5]), (owner.cache_id, [6])])
    assert status == _native.LLM_SUCCESS, _native.last_error()
    queue = _native.TransferQueue(pusher.datadist)
    expected = owner.read_memory()
    for dst, layers in ([5, 6], (1, 2)), ([6, 7], (1, 2)), ([5, 6], (0, 3)):
        queue.submit_push_blocks(
            pusher.cache_id,
            1,
            owner.cache_id,
            np.array([0, 1], np.uint64),
            dst,
            SIZES["tensors"],
            20_000,
            layers,
            layers,
            1,
        )
    completions: list[_native.Completion] = []
    while len(completions) < 3:
        assert select.select([queue], [], [], 60)[0]
        completions += queue.poll()
    queue.close()
    assert [done.status for done in completions] == [
        _native.LLM_SUCCESS,
        _native.LLM_PARAM_INVALID,
        _native.LLM_SUCCESS,
    ]
    assert "only where they were granted" in completions[1].error
    copy_blocks(pusher.memory, expected, [0, 1], [5, 6])
    np.testing.assert_array_equal(owner.memory, expected)


def test_arguments_are_checked_where_they_are_written(make_endpoint: Callable[..., Endpoint]) -> None:
    owner = make_endpoint(cluster_id=1, options={"datadist.PeerAccess": "granted"}, **SIZES)
    grant = owner.datadist.grant_writes
    assert grant(PUSHER, [(owner.cache_id, [16])]) == (_native.LLM_PARAM_INVALID, 0)
    assert "16, allowed: 0..15" in _native.last_error()
    assert grant(PUSHER, [(owner.cache_id, [-1])]) == (_native.LLM_PARAM_INVALID, 0)
    assert grant(PUSHER, []) == (_native.LLM_PARAM_INVALID, 0)
    assert grant(PUSHER, [(owner.cache_id + 1, [0])]) == (_native.LLM_KV_CACHE_NOT_EXIST, 0)
    with pytest.raises(TypeError):
        grant(PUSHER, [(owner.cache_id, "0")])
    assert owner.datadist.revoke_writes(77) == _native.LLM_SUCCESS


def test_who_is_not_initialized_grants_nothing() -> None:
    bare = LlmDataDist(1, 1)
    assert bare.capabilities.grants_writes
    assert bare.grant_writes(PUSHER, [(1, [0])])[0] == _native.LLM_FAILED
    assert bare.revoke_writes(1) == _native.LLM_FAILED
