"""Entry point `vllm.general_plugins`: vLLM calls register() once in each of its processes."""

from __future__ import annotations

NAME = "DataDistConnector"
MODULE = "vllm_datadist_connector.connector"


def register() -> None:
    """Makes `"kv_connector": "DataDistConnector"` known to vLLM. Idempotent; imports neither torch nor the engine.

    vLLM logs and swallows what a plugin raises, and only fails much later with "unsupported connector": so nothing in
    here may fail that does not have to.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_datadist_connector import compat

    # A forked process inherits the registry, and registering a name twice raises.
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
    compat.share_logging()
    compat.prepare_process()
