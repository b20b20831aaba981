"""The connector under the name that some routers know; see "Routers" in the README.

    {"kv_connector": "NixlConnector", "kv_connector_module_path": "vllm_datadist_connector.nixl", ...}

Routers that ask a server for its connector's name and act upon known ones only (Dynamo, SMG, srt-slurm) treat this one
as vLLM's own of that name, whose params ours are. A module of its own, so that the name means this class only where the
module path asks for it.
"""

from __future__ import annotations

from vllm_datadist_connector.connector import DataDistConnector


class NixlConnector(DataDistConnector):
    """DataDistConnector. It speaks with DataDistConnectors, not with vLLM's NixlConnector."""
