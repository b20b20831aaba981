"""What providers can do, beside what our engine can."""

from __future__ import annotations

from vllm_datadist_connector import _native

ENGINE = _native.LlmDataDist(1, 1).capabilities
HARDWARE = ENGINE._replace(
    engine_options=False,
    reports_links=False,
    ipv6=False,
    device_memory=True,
    register_before_link=True,
    writes_end_with_call=False,
    grants_writes=False,
    peer_drops_half=False,
    crossing_links=False,
    max_addrs_per_cache=240,
    max_regions=256,
    max_links=512,
    min_run_bytes=4096,
    min_link_timeout_ms=2000,
)
"""As a library that drives NPUs."""
