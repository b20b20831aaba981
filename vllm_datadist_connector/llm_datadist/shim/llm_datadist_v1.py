"""Found as `llm_datadist_v1` by processes that a script under `python -m vllm_datadist_connector.llm_datadist` starts.

The runner puts this directory on their path: an import hook of its own process is not inherited.
"""

from __future__ import annotations

import importlib
import sys

from vllm_datadist_connector.llm_datadist import aliases

aliases.install()
sys.modules["llm_datadist_v1"] = importlib.import_module("vllm_datadist_connector.llm_datadist.v1")
