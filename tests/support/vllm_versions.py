"""What tests take from vLLM and find elsewhere in another version. Each says when it can go."""

from __future__ import annotations

# Goes when 0.33 is the oldest supported version.
try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

__all__ = ["get_kv_cache_config_from_groups"]
