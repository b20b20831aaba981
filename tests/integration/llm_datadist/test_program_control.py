"""What a program does to its process while it has an engine: it is interrupted, it forks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 300
LINKING = """
import sys
from vllm_datadist_connector.llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole

config = LLMConfig()
config.device_id = 0
config.enable_cache_manager = True
config.ge_options = {"datadist.Insecure": "1"}
datadist = LLMDataDist(LLMRole.DECODER, 1)
datadist.init(config.generate_options())
peer = LLMClusterInfo()
peer.remote_cluster_id = 2
peer.append_local_ip_info("127.0.0.1", 0)
peer.append_remote_ip_info("127.0.0.1", int(sys.argv[1]))
try:
    datadist.link_clusters([peer], 600_000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
refused = LLMClusterInfo()
refused.remote_cluster_id = 3
refused.append_local_ip_info("127.0.0.1", 0)
refused.append_remote_ip_info("127.0.0.1", 1)
print(datadist.link_clusters([refused], 1_000)[0].name, flush=True)
"""
FORKING = """
import os
import numpy as np
from vllm_datadist_connector.llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMException, LLMRole

def start(cluster_id):
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options())
    return datadist

def register(datadist):
    memory = np.zeros((4, 16), dtype=np.int8)
    cache = datadist.cache_manager.register_cache(CacheDesc(1, [4, 16], DataType.DT_INT8), [memory.ctypes.data])
    datadist.cache_manager.unregister_cache(cache.cache_id)
    return cache.cache_id

parent = start(1)
assert register(parent) == 1
child = os.fork()
if child == 0:
    try:
        register(parent)
    except LLMException as error:
        assert "fork" in str(error), error
    else:
        raise SystemExit("the parent's engine worked")
    own = start(2)
    assert register(own) == 1
    raise SystemExit(7)  # with an engine that is not finalized, as programs do
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert register(parent) == 2
print("both work")
"""


@contextmanager
def program(text: str, cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs with SIGINT ignored, and the tests may be in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_interrupt_ends_a_call_at_once(tmp_path: Path) -> None:
    """Of ten minutes; and the program may go on with its engine, and ends while the call that it left still waits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        with program(LINKING, tmp_path, str(silent.getsockname()[1])) as process:
            connection, _ = silent.accept()  # the call waits for an answer now
            with connection:
                start = time.monotonic()
                process.send_signal(signal.SIGINT)
                assert process.stdout is not None
                assert process.stdout.readline() == "interrupted\n"
                assert time.monotonic() - start < PATIENCE_S
                out, err = process.communicate(timeout=PATIENCE_S)
    assert out.splitlines()[-1] == "LLM_LINK_FAILED", out + err
    assert process.returncode == 0, err


def test_a_child_of_fork_has_an_engine_of_its_own(tmp_path: Path) -> None:
    with program(FORKING, tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "both work\n"), err
