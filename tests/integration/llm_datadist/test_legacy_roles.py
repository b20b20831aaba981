"""The legacy KvCacheManager of a prompt and a decoder: copies within a node, its tensors, and what its role allows."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from support.datadist_cluster import Cluster, failure
from support.datadist_peer import LOOPBACK
from support.legacy_ends import (
    BLOCKS,
    DECODER,
    PROMPT,
    SHAPE,
    Ends,
    await_empty,
    is_empty,
    open_ends,
    transfer,
)

from vllm_datadist_connector.llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)

INVALID = LLMStatusCode.LLM_PARAM_INVALID


@pytest.fixture
def ends(cluster: Cluster) -> Ends:
    prompt, decoder = open_ends(cluster)
    decoder.link(prompt)
    return prompt, decoder


# ---- within a node ----


def test_swapped_blocks_come_back_and_can_be_pulled(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    device, host = prompt.allocate("device", **BLOCKS), prompt.create_cpu_cache("host", **SHAPE)
    dst = decoder.allocate("dst", keys=(), **BLOCKS)
    prompt.manager.swap_blocks(device, host, {3: 0, 0: 1, 1: 2})
    host.expect_rows(device, [(3, 0), (0, 1), (1, 2)])
    prompt.manager.swap_blocks(host, device, {1: 2, 3: 3})
    device.expect_rows(host, [(1, 2), (3, 3)])
    decoder.manager.pull_blocks(device.blocks_key, dst, [2, 3], [0, 1])
    dst.expect_rows(device, [(2, 0), (3, 1)])
    for wrong in ({4: 0}, {0: 4}):
        assert failure(prompt.manager.swap_blocks, device, host, wrong) == INVALID
    assert failure(prompt.manager.swap_blocks, device, device, {0: 1}) == INVALID
    with pytest.raises(RuntimeError, match="cache"):
        prompt.manager.deallocate_cache(host)
    cluster.check()


def test_copies(cluster: Cluster, ends: Ends) -> None:
    prompt, _ = ends
    rows, more_rows, blocks = (
        prompt.allocate(name, **shape) for name, shape in (("rows", SHAPE), ("more rows", SHAPE), ("blocks", BLOCKS))
    )
    prompt.manager.copy_cache(more_rows, rows, 3, 1)
    more_rows.expect_rows(rows, [(1, 3)])
    prompt.manager.copy_cache(more_rows, rows, 0, 2, 8, 16)
    for tensor in range(4):
        more_rows.expected[tensor][0, 8:24] = rows.expected[tensor][2, 8:24]
    prompt.manager.copy_blocks(blocks, {0: [1, 3], 3: [2]})
    blocks.expect_rows(blocks, [(0, 1), (0, 3), (3, 2)])
    for arguments in ((4,), (0, 4), (0, 0, 40), (0, 0, 8, 33)):
        assert failure(prompt.manager.copy_cache, more_rows, rows, *arguments) == INVALID
    assert failure(prompt.manager.copy_blocks, blocks, {0: [4]}) == INVALID
    cluster.check()


def test_tensors_show_what_was_pulled(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    floats = {**SHAPE, "data_type": "DT_FLOAT"}
    src, dst = prompt.allocate("src", keys=[CacheKey(PROMPT, 1)], **floats), decoder.allocate("dst", **floats)
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst, 2)
    dst.expect_rows(src, [(0, 2)])
    for index in range(4):
        ((dtype, shape, data),) = decoder.ask("tensors", "dst", index)
        assert (dtype, shape) == ("float32", [4, 10])
        np.testing.assert_array_equal(
            np.frombuffer(base64.b64decode(data), np.uint8).reshape(4, 40), dst.expected[index]
        )
    with pytest.raises(RuntimeError, match="tensor_index"):
        decoder.ask("tensors", "dst", 4)
    cluster.check()


def test_an_abandoned_cache_gives_its_id_up(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    src, dst = prompt.allocate("src", keys=[CacheKey(PROMPT, 1)], **SHAPE), decoder.allocate("dst", **SHAPE)
    prompt.forget(src)
    assert not is_empty(prompt)
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst)
    dst.expect_rows(src, [(0, 0)])
    await_empty(prompt)
    cluster.check()


# ---- roles ----


def test_the_role_says_what_is_allowed(cluster: Cluster, ends: Ends) -> None:
    prompt, decoder = ends
    ours, theirs = prompt.allocate("ours", **SHAPE), decoder.allocate("theirs", **SHAPE)
    blocks = prompt.allocate("blocks", **BLOCKS)
    key = CacheKey(DECODER, 1)
    refused = [
        lambda: prompt.manager.pull_cache(CacheKeyByIdAndIndex(DECODER, theirs.cache_id), ours),
        lambda: prompt.manager.pull_blocks(BlocksCacheKey(DECODER), blocks, [0], [0]),
        lambda: decoder.allocate("keyed", keys=[key], **SHAPE),
        lambda: decoder.allocate("keyed", **BLOCKS),
        lambda: decoder.manager.remove_cache_key(key),
        lambda: transfer(decoder, theirs, [TransferConfig(PROMPT, ours.addrs)]),
        lambda: prompt.allocate("host", placement="HOST", **SHAPE),
    ]
    for index, call in enumerate(refused):
        assert failure(call) == INVALID, index
    cluster.check()


def test_data_flows_back_after_both_switched_roles(cluster: Cluster) -> None:
    prompt, decoder = open_ends(cluster, enable_switch_role=True)
    src = prompt.allocate("src", keys=[CacheKey(PROMPT, 1)], **SHAPE)
    back, dst = prompt.allocate("back", **SHAPE), decoder.allocate("dst", **SHAPE)
    decoder.link(prompt)
    decoder.manager.pull_cache(CacheKey(PROMPT, 1), dst, 3)
    dst.expect_rows(src, [(0, 3)])
    listen = {"llm.listenIpInfo": f"{LOOPBACK}:0"}
    assert failure(decoder.datadist.switch_role, LLMRole.PROMPT, listen) == LLMStatusCode.LLM_EXIST_LINK
    decoder.datadist.unlink_clusters([prompt.info()], 20_000)
    assert failure(decoder.datadist.switch_role, LLMRole.DECODER) == INVALID
    assert failure(decoder.datadist.switch_role, LLMRole.PROMPT) == INVALID
    prompt.datadist.switch_role(LLMRole.DECODER)
    decoder.datadist.switch_role(LLMRole.PROMPT, listen)
    decoder.port = decoder.ask("port")
    prompt.link(decoder)
    answer = decoder.allocate("answer", keys=[CacheKey(DECODER, 2)], **SHAPE)
    prompt.manager.pull_cache(CacheKey(DECODER, 2), back, 1)
    back.expect_rows(answer, [(0, 1)])
    assert failure(decoder.manager.pull_cache, CacheKey(PROMPT, 1), dst) == INVALID
    cluster.check()


def test_roles_stay_where_switching_is_not_enabled(ends: Ends) -> None:
    prompt, decoder = ends
    decoder.datadist.unlink_clusters([prompt.info()], 20_000)
    assert failure(prompt.datadist.switch_role, LLMRole.DECODER) == LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def test_the_link_tells_whether_it_works(ends: Ends) -> None:
    prompt, decoder = ends
    decoder.datadist.check_link_status(PROMPT)
    prompt.datadist.check_link_status(DECODER)
    assert failure(decoder.datadist.check_link_status, 77) == LLMStatusCode.LLM_NOT_YET_LINK
    decoder.datadist.unlink_clusters([prompt.info()], 20_000)
    assert failure(decoder.datadist.check_link_status, PROMPT) == LLMStatusCode.LLM_NOT_YET_LINK
    assert decoder.manager.is_initialized()
