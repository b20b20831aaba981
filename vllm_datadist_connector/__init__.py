"""KV-cache transfer between vLLM instances over the LLM-DataDist API.

Importing this package is cheap and safe anywhere: it loads neither vLLM nor torch nor the native library. vLLM finds
the connector through the entry point `plugin:register`.
"""

from __future__ import annotations

__version__ = "0.1.0"
