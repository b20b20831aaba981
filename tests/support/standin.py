"""What stands in for CANN on hosts without NPUs: native/tests/standin/README.md says what it does, how to be harder."""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "default" / "standin" / "libllm_datadist.so"


def standin_variables(**rules: str | int) -> dict[str, str]:
    """Environment of a process that finds the provider `cann`: standin_variables(strict=1, late_every=3)."""
    return {
        "DATADIST_CANN_LIBRARY": str(LIBRARY),
        **{f"CANN_STANDIN_{name.upper()}": str(value) for name, value in rules.items()},
    }
