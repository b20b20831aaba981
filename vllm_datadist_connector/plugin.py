"""Entry point `vllm.general_plugins`: vLLM calls register() once in each of its processes."""

from __future__ import annotations

import logging
import os

NAME = "DataDistConnector"
MODULE = "vllm_datadist_connector.connector"

_logger = logging.getLogger(__name__)


def register() -> None:
    """Makes `"kv_connector": "DataDistConnector"` known to vLLM. Idempotent; imports neither torch nor the engine.

    Never raises: what a plugin raises ends vLLM, also where nobody wants this connector, and hides why another plugin,
    such as a platform's, has failed. vLLM then says that it does not know the connector; the log says why.
    """
    for step in (_make_known, _prepare):
        try:
            step()
        except Exception:
            _logger.exception("vllm-datadist-connector: this vLLM does not take the plugin whole (%s)", step.__name__)


def _make_known() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # A forked process inherits the registry, and registering a name twice raises.
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)


def _prepare() -> None:
    from vllm_datadist_connector import compat

    compat.share_logging()
    if compat.is_npu():
        # CANN reads it when its runtime starts, as LLM-DataDist's own Python package knows; who set it knows better.
        os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")
    compat.prepare_process()
