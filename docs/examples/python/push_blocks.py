"""The prompt writes blocks, then one layer, into the decoder's torch tensors; the decoder makes no call."""

import torch
from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMRole
from pair import DECODER_CLUSTER, PROMPT_CLUSTER, Pair, check, cluster_at, link, run, start, unlink

LAYERS, BLOCKS, BLOCK_SHAPE = 3, 6, (16, 8)
TENSORS = 2 * LAYERS
DESC = CacheDesc(TENSORS, [BLOCKS, *BLOCK_SHAPE], DataType.DT_FLOAT)
SRC_BLOCKS, DST_BLOCKS = [2, 3, 0], [0, 1, 4]


def prompt_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand((BLOCKS, *BLOCK_SHAPE), generator=generator) for _ in range(TENSORS)]


def prompt(pair: Pair) -> None:
    datadist = start(LLMRole.PROMPT, PROMPT_CLUSTER, enable_remote_cache_accessible=True)
    tensors = prompt_tensors()
    manager = datadist.cache_manager
    cache = manager.register_blocks_cache(DESC, [tensor.data_ptr() for tensor in tensors])
    pair.expect("ready")
    server = cluster_at(DECODER_CLUSTER, pair.decoder, pair.prompt)
    link(datadist, server)

    key = BlocksCacheKey(DECODER_CLUSTER)
    manager.push_blocks(key, cache, SRC_BLOCKS, DST_BLOCKS)
    pair.tell("blocks")
    pair.expect("next")
    manager.push_blocks(key, cache, [5], [5], src_layer_range=range(1), dst_layer_range=range(2, 3))
    pair.tell("layer")
    pair.expect("next")
    unlink(datadist, server)
    pair.tell("unlinked")
    datadist.finalize()
    check("the prompt's own memory", all(map(torch.equal, tensors, prompt_tensors())))


def decoder(pair: Pair) -> None:
    datadist = start(LLMRole.DECODER, DECODER_CLUSTER, pair.decoder, enable_remote_cache_accessible=True)
    tensors = [torch.zeros((BLOCKS, *BLOCK_SHAPE)) for _ in range(TENSORS)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    datadist.cache_manager.register_blocks_cache(DESC, addresses, BlocksCacheKey(DECODER_CLUSTER))
    pair.tell("ready")
    theirs = prompt_tensors()

    pair.expect("blocks")
    check(
        "blocks",
        all(torch.equal(ours[DST_BLOCKS], their[SRC_BLOCKS]) for ours, their in zip(tensors, theirs, strict=True)),
    )
    check("the other blocks", not any(ours[[2, 3, 5]].any() for ours in tensors))
    pair.tell("next")

    pair.expect("layer")
    check("layer 0 in layer 2", all(torch.equal(tensors[4 + i][5], theirs[i][5]) for i in range(2)))
    check("the other layers", not any(ours[5].any() for ours in tensors[:4]))
    pair.tell("next")
    pair.expect("unlinked")
    datadist.finalize()


run(prompt, decoder)
