#!/usr/bin/env python3
"""Runs what needs no model with the newest vLLM, of which there is no CPU build yet.

    tests/newest_vllm.py [PYTEST_ARGUMENTS]

Makes .venv-newest (180 MB, from a download of twice that) over .venv: the Python of the newest vLLM's wheel, with the
compiled parts of .venv's CPU build and everything else of .venv. Ends with pytest's exit status. Arguments are those of
pytest, before our selection: `-k sleep`, say, or `-x`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import Environment, Runtime, ensure_environment  # noqa: E402
from console import exit_status_of, run_shown  # noqa: E402
from overlay import ensure_overlay, site_packages  # noqa: E402

NEWEST_SOURCES = Runtime(".venv-newest", "0.33.0")

# The hooks and their signatures, vLLM's scheduler with our connector in it, and its KV cache specs and layouts. Servers
# are not among them: compiled parts of another version may serve, and would prove nothing.
SELECTION = (
    "tests/unit/test_hook_signatures.py",
    "tests/unit/test_boundaries.py",
    "tests/unit/test_compat.py",
    "tests/unit/test_consumer.py",
    "tests/unit/test_cpu_packing.py",
    "tests/unit/test_group_requests.py",
    "tests/unit/test_kv_groups.py",
    "tests/unit/test_kv_spec.py",
    "tests/unit/test_metrics.py",
    "tests/unit/test_producer.py",
    "tests/unit/test_turns.py",
    "tests/unit/test_vllm_layouts.py",
    "tests/unit/test_vllm_states.py",
    "tests/unit/test_ascend_layouts.py",
    "tests/integration/test_multi_scheduler.py",
)


def link_compiled_parts(base: Environment, ours: Path) -> None:
    theirs = site_packages(base)
    for library in theirs.glob("vllm/**/*.so"):
        os.symlink(library, ours / library.relative_to(theirs))


def run_selection() -> int:
    print("== set-up", flush=True)
    base = ensure_environment()
    overlay = ensure_overlay(NEWEST_SOURCES, base, "vllm", lambda _, ours: link_compiled_parts(base, ours))
    print(f"\n== tests, vLLM {NEWEST_SOURCES.vllm}", flush=True)
    command = [str(overlay.python), "-m", "pytest", *sys.argv[1:], *SELECTION]
    return run_shown(command, overlay.variables(), ROOT)


if __name__ == "__main__":
    sys.exit(exit_status_of(run_selection))
