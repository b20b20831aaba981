"""The caller's memory as numpy arrays and as torch tensors, of several data types, between two nodes."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datadist_cluster import Cluster
from support.datadist_node import NumpyMemory, TorchMemory

KINDS = ["numpy", "torch"]


@pytest.mark.parametrize(("src_kind", "dst_kind"), list(product(KINDS, repeat=2)))
@pytest.mark.parametrize("data_type", ["DT_UINT8", "DT_FLOAT16", "DT_BF16", "DT_FLOAT", "DT_INT64"])
def test_by_address(cluster: Cluster, src_kind: str, dst_kind: str, data_type: str) -> None:
    shape = {"tensors": 4, "rows": 6, "row_bytes": 64, "data_type": data_type}
    prompt, decoder = cluster.open(1), cluster.open(2, listen="")
    src, dst = prompt.register("src", memory=src_kind, **shape), decoder.register("dst", memory=dst_kind, **shape)
    src_blocks = prompt.register("src blocks", layout="blocks", memory=src_kind, **shape)
    dst_blocks = decoder.register("dst blocks", layout="blocks", memory=dst_kind, **shape)
    decoder.link(prompt)
    decoder.manager.pull_cache(src.row(1), dst, 4)
    dst.expect_rows(src, [(1, 4)])
    decoder.manager.pull_blocks(src_blocks.blocks_key, dst_blocks, [0, 1, 5], [3, 4, 0])
    dst_blocks.expect_rows(src_blocks, [(0, 3), (1, 4), (5, 0)])
    decoder.manager.push_cache(src.row(0), dst, 5)
    src.expect_rows(dst, [(5, 0)])
    cluster.check()


def test_torch_memory_is_that_of_its_tensors() -> None:
    """The oracle knows both kinds by their bytes; this says that the addresses are those of the bytes."""
    memory, same_bytes = TorchMemory(3, 2, 4, 16), NumpyMemory(3, 2, 4, 16)
    for index, addr in enumerate(memory.addrs):
        tensor = memory.tensors[index]
        assert addr == tensor.data_ptr() == memory[index].ctypes.data
        assert torch.equal(tensor, torch.from_numpy(same_bytes[index]))
        tensor[2, 3] += 1
        assert memory[index][2, 3] == np.uint8(same_bytes[index][2, 3] + np.uint8(1))


WITHOUT_LIBRARIES = """
import sys
sys.modules["numpy"] = sys.modules["torch"] = None
import array
from vllm_datadist_connector.llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
config = LLMConfig()
config.device_id, config.enable_cache_manager = 0, True
datadist = LLMDataDist(LLMRole.MIX, 1)
datadist.init(config.generate_options())
memory = array.array("B", bytes(64))
desc = CacheDesc(1, [4, 16], DataType.DT_UINT8)
print(datadist.cache_manager.register_cache(desc, [memory.buffer_info()[0]]).cache_id)
datadist.finalize()
"""


def test_the_package_needs_neither_numpy_nor_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_LIBRARIES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
