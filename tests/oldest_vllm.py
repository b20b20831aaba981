#!/usr/bin/env python3
"""Runs the core of the end-to-end tests with the oldest vLLM that the connector supports.

    tests/oldest_vllm.py [PYTEST_ARGUMENTS]

Sets up .venv-oldest, which takes more than 5 GB, and ends with pytest's exit status. Arguments are pytest's, before
our selection: `-k router`, say, or `-x`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import OLDEST, ensure_environment  # noqa: E402
from console import exit_status_of, run_shown  # noqa: E402

# What depends on vLLM's version.
SELECTION = (
    "tests/oldest",
    "tests/e2e/test_loading.py",
    "tests/e2e/test_pd_equality.py",
    "tests/e2e/test_pd_tp2.py",
    "tests/e2e/test_models.py::test_sixteen_at_once[gemma3-tp1-to-tp1]",
    "tests/e2e/test_models.py::test_what_the_prefix_cache_has_is_not_moved[gemma3-tp1-to-tp1]",
    "tests/unit/test_cpu_packing.py",
)


def run_selection() -> int:
    print(f"== set-up, vLLM {OLDEST.vllm}", flush=True)
    environment = ensure_environment(OLDEST)
    print("\n== tests", flush=True)
    command = [str(environment.tool("pytest")), *sys.argv[1:], *SELECTION]
    return run_shown(command, environment.variables(), ROOT)


if __name__ == "__main__":
    sys.exit(exit_status_of(run_selection))
