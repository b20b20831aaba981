"""The provider `cann` in Python, over what stands in for CANN's library: processes that pull, push and die.

Each endpoint is in a process of its own: a library that a process has loaded stays loaded.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest
from support.endpoints import PeerProcess, copy_blocks
from support.standin import LIBRARY, standin_variables

from vllm_datadist_connector import _native

SIZES = {"tensors": 6, "blocks": 32, "block_bytes": 4096}
SRC, DST = [3, 4, 9, 0], [1, 2, 7, 31]


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in standin_variables(strict=1).items():
        monkeypatch.setenv(name, value)


def _peer(resources: ExitStack, cluster_id: int) -> PeerProcess:
    options = {"llm.SyncKvCacheWaitTime": "3000", "datadist.Transport": "cma"}
    peer = PeerProcess(cluster_id=cluster_id, options=options, provider="cann", **SIZES)
    return resources.enter_context(peer)


def test_pulls_and_pushes_between_processes(resources: ExitStack) -> None:
    d, p = _peer(resources, 1), _peer(resources, 2)
    d.link(p)
    expected = d.read_memory()
    copy_blocks(p.read_memory(), expected, SRC, DST)
    assert d.call("pull_kv_blocks", 2, p.cache_id, d.cache_id, SRC, DST) == _native.LLM_SUCCESS
    assert (d.read_memory() == expected).all()

    expected = p.read_memory()
    copy_blocks(d.read_memory(), expected, SRC, DST)
    assert d.call("push_kv_blocks", d.cache_id, 2, p.cache_id, SRC, DST, SIZES["tensors"]) == _native.LLM_SUCCESS
    assert (p.read_memory() == expected).all()


def test_a_pull_from_a_peer_that_was_killed_fails_in_time(resources: ExitStack) -> None:
    d, p = _peer(resources, 1), _peer(resources, 2)
    d.link(p)
    memory = d.read_memory()
    p.kill()
    assert d.call("pull_kv_blocks", 2, p.cache_id, d.cache_id, SRC, DST) != _native.LLM_SUCCESS
    assert (d.read_memory() == memory).all()


SCRIPT = """
from vllm_datadist_connector import _native
print(_native.providers())
datadist = _native.LlmDataDist(1, 3, "cann")
print(datadist.capabilities.writes_end_with_call, datadist.capabilities.max_links)
print(datadist.initialize({"llm.DeviceId": "9"}), _native.last_error())
print(datadist.initialize({"llm.DeviceId": "1", "llm.ListenIpInfo": "127.0.0.1:0"}), datadist.listen_port()[0])
"""


def test_is_listed_tells_what_it_can_do_and_says_what_is_wrong() -> None:
    answer = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    listed, capabilities, refused, taken = answer.splitlines()
    assert listed == "['engine', 'cann']"
    assert capabilities == "False 512"
    assert refused.startswith(f"{_native.LLM_FAILED} ")
    assert "aclrtSetDevice(9)" in refused
    assert taken == "0 0"


def test_works_beside_the_v1_library_that_is_there_for_all_to_see() -> None:
    """Of native/tests/cann_loader_test.cc, in the build that has no sanitizer: those refuse RTLD_DEEPBIND."""
    v1 = LIBRARY.with_name("libllm_engine.so")
    script = f"""
import ctypes
ctypes.CDLL({str(v1)!r}, ctypes.RTLD_GLOBAL)
from vllm_datadist_connector import _native
print(_native.LlmDataDist(1, 3, "cann").initialize({{"llm.DeviceId": "0"}}))
"""
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert answer == "0\n"
