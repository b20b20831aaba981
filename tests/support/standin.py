"""What stands in for CANN on hosts without NPUs, and how to make it harder: native/tests/standin/README.md."""

from __future__ import annotations

from pathlib import Path

STANDIN_VARIABLES = (
    "DATADIST_CANN_LIBRARY",
    *(f"CANN_STANDIN_{rule}" for rule in ("STRICT", "LATE_EVERY", "LATE_MS", "MAX_LINKS", "MAX_REGIONS", "TRACE")),
)
"""Read when an endpoint is made."""

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "default" / "standin" / "libllm_datadist.so"


def standin_variables(**rules: str | int) -> dict[str, str]:
    """Environment of a process that finds the provider `cann`: standin_variables(strict=1, late_every=3)."""
    return {
        "DATADIST_CANN_LIBRARY": str(LIBRARY),
        **{f"CANN_STANDIN_{name.upper()}": str(value) for name, value in rules.items()},
    }
