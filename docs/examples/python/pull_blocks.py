"""The decoder reads blocks of the prompt's torch tensors, and a row of a contiguous cache into blocks of its own."""

import torch
from llm_datadist import BlocksCacheKey, CacheDesc, CacheKeyByIdAndIndex, DataType, LLMRole
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

LAYERS, BLOCKS, BLOCK_SHAPE = 2, 8, (16, 4)
TENSORS = 2 * LAYERS
BLOCKS_DESC = CacheDesc(TENSORS, [BLOCKS, *BLOCK_SHAPE], DataType.DT_BF16)
ROW_ELEMENTS = 160  # two blocks and a half
ROWS_DESC = CacheDesc(TENSORS, [2, ROW_ELEMENTS], DataType.DT_BF16)
MODEL = 7


def random_tensors(seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator).to(torch.bfloat16) for _ in range(TENSORS)]


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, pair.prompt, enable_remote_cache_accessible=True)
    blocks, rows = random_tensors(1, BLOCKS, *BLOCK_SHAPE), random_tensors(2, 2, ROW_ELEMENTS)
    manager = datadist.cache_manager
    manager.register_blocks_cache(BLOCKS_DESC, addresses(blocks), BlocksCacheKey(PROMPT_CLUSTER, MODEL))
    pair.tell(manager.register_cache(ROWS_DESC, addresses(rows)).cache_id)
    pair.expect("unlinked")
    datadist.finalize()


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER, enable_remote_cache_accessible=True)
    tensors = [torch.zeros((BLOCKS, *BLOCK_SHAPE), dtype=torch.bfloat16) for _ in range(TENSORS)]
    manager = datadist.cache_manager
    cache = manager.register_blocks_cache(BLOCKS_DESC, addresses(tensors))
    row_cache_id = int(pair.hear())
    server = cluster_at(PROMPT_CLUSTER, pair.prompt, pair.decoder)
    link(datadist, server)

    src, dst = [0, 1, 5], [6, 7, 0]
    manager.pull_blocks(BlocksCacheKey(PROMPT_CLUSTER, MODEL), cache, src, dst)
    theirs = random_tensors(1, BLOCKS, *BLOCK_SHAPE)
    check("blocks", all(torch.equal(ours[dst], their[src]) for ours, their in zip(tensors, theirs, strict=True)))

    manager.pull_blocks(CacheKeyByIdAndIndex(PROMPT_CLUSTER, row_cache_id, batch_index=1), cache, [], [3, 1, 2])
    rows = random_tensors(2, 2, ROW_ELEMENTS)
    pieces = [ours[[3, 1, 2]].flatten() for ours in tensors]
    check("a row in blocks", all(torch.equal(p[:ROW_ELEMENTS], row[1]) for p, row in zip(pieces, rows, strict=True)))
    check("nothing after it", not any(p[ROW_ELEMENTS:].any() for p in pieces))
    check("the other blocks", not any(ours[[4, 5]].any() for ours in tensors))

    unlink(datadist, server)
    datadist.finalize()
    pair.tell("unlinked")


run(prompt, decoder)
