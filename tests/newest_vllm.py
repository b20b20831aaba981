#!/usr/bin/env python3
"""Runs what needs no model with the newest vLLM, of which there is no CPU build yet.

    tests/newest_vllm.py [PYTEST_ARGUMENTS]

Makes .venv-newest (180 MB, from a download of twice that) over .venv: the Python of the newest vLLM's wheel, with the
compiled parts of .venv's CPU build and everything else of .venv. Ends with pytest's exit status. Arguments are those of
pytest, before our selection: `-k sleep`, say, or `-x`.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import Environment, Runtime, ensure_environment  # noqa: E402
from console import exit_status_of, run_shown, run_step  # noqa: E402

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


def site_packages(environment: Environment) -> Path:
    (folder,) = environment.directory.glob("lib/python*/site-packages")
    return folder


def ensure_overlay(base: Environment) -> Environment:
    """.venv-newest, made anew unless it is whole: what tells vLLM's version is written last."""
    runtime = NEWEST_SOURCES
    overlay = Environment(runtime.directory)
    metadata = Path(f"vllm-{runtime.vllm}+cpu.dist-info") / "METADATA"  # "cpu" is how vLLM knows its platform
    theirs = site_packages(base)
    ours = runtime.directory / theirs.relative_to(base.directory)
    if (ours / metadata).is_file():
        print(f"  environment {runtime.name}: up to date", flush=True)
        return overlay
    wheels = runtime.directory / "wheels"
    make = [str(base.python), "-m", "venv", "--clear", "--without-pip", str(runtime.directory)]
    run_step("make the virtual environment", make, runtime.logs / "venv.log")
    download = [str(base.python), "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    title = f"download vLLM {runtime.vllm}"
    run_step(title, [*download, f"vllm=={runtime.vllm}"], runtime.logs / "vllm.log", env=base.variables())
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        python = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(ours, python)
    for library in theirs.glob("vllm/**/*.so"):
        os.symlink(library, ours / library.relative_to(theirs))
    (ours / "base.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n", encoding="utf-8")
    shutil.rmtree(wheels)
    (ours / metadata).parent.mkdir()
    (ours / metadata).write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {runtime.vllm}+cpu\n", encoding="utf-8")
    return overlay


def run_selection() -> int:
    print("== set-up", flush=True)
    overlay = ensure_overlay(ensure_environment())
    print(f"\n== tests, vLLM {NEWEST_SOURCES.vllm}", flush=True)
    command = [str(overlay.python), "-m", "pytest", *sys.argv[1:], *SELECTION]
    return run_shown(command, overlay.variables(), ROOT)


if __name__ == "__main__":
    sys.exit(exit_status_of(run_selection))
