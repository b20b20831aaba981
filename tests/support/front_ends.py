"""API servers of one vLLM, as far as their metrics go: a process each, forked from one that has imported vLLM.

    python front_ends.py

Each line of standard input is [directory, number, engine, stats]: the front end `number` of those whose processes share
`directory` takes the stats of an engine, or starts if they are null. Each is answered by a line. The variable
PROMETHEUS_MULTIPROC_DIR must be set from the start, as vLLM does: prometheus_client looks once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm

from vllm_datadist_connector import plugin

ENGINES: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}


def front_end(directory: str, updates: Connection) -> None:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    config: Any = SimpleNamespace(
        kv_transfer_config=KVTransferConfig(kv_connector="DataDistConnector", kv_role="kv_both")
    )
    metrics = KVConnectorProm(config, ["model_name", "engine"], ENGINES)
    while True:
        engine, stats = updates.recv()
        if stats is not None:
            metrics.observe(stats, engine)
        updates.send(True)


def main() -> None:
    plugin.register()
    fork = multiprocessing.get_context("fork")
    front_ends: dict[tuple[str, int], Connection] = {}
    for line in sys.stdin:
        directory, number, engine, stats = json.loads(line)
        if (directory, number) not in front_ends:
            ours, theirs = fork.Pipe()
            fork.Process(target=front_end, args=(directory, theirs), daemon=True).start()
            front_ends[directory, number] = ours
        front_ends[directory, number].send((engine, stats))
        print(json.dumps(front_ends[directory, number].recv()), flush=True)


if __name__ == "__main__":
    main()
