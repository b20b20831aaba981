"""Loads vLLM's plugins in an order, and prints what there is then: `plugins.py first|last`, where ours comes."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import sys
from typing import Any

OURS = "datadist"


def order(first: bool) -> None:
    original = importlib.metadata.entry_points

    def entry_points(**group: str) -> Any:
        found = sorted(original(**group), key=lambda each: (each.name == OURS) != first)
        return importlib.metadata.EntryPoints(found)

    importlib.metadata.entry_points = entry_points


def main(where: str) -> None:
    order(where == "first")
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_datadist_connector import compat
    from vllm_datadist_connector.worker.options import choose_provider

    found: dict[str, Any] = {
        "platform": type(current_platform).__qualname__,
        "provider": choose_provider("auto", compat.is_npu()),
        "connectors": {
            name: sorted(map(str, inspect.getclosurevars(loader).nonlocals.values()))
            for name, loader in KVConnectorFactory._registry.items()
        },
        "scheduler": [each.__qualname__ for each in AsyncScheduler.__mro__],
        "AUTO_USE_UC_MEMORY": os.environ.get("AUTO_USE_UC_MEMORY"),
    }
    if "DataDistConnector" in found["connectors"]:
        found["ours"] = KVConnectorFactory.get_connector_class_by_name("DataDistConnector").__module__
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
