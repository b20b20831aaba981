"""An environment over another: the Python of one vLLM's wheel, and whatever else of the environment below.

What is compiled of that vLLM need not fit the torch below, and is left out; who wants some links it.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from bootstrap import Environment, Runtime
from console import run_step

Complete = Callable[[Environment, Path], None]
"""Adds to an overlay, in its folder of packages, what its vLLM lacks."""


def site_packages(environment: Environment) -> Path:
    (folder,) = environment.directory.glob("lib/python*/site-packages")
    return folder


def ensure_overlay(runtime: Runtime, base: Environment, distribution: str, complete: Complete) -> Environment:
    """Made anew unless it is whole: what tells vLLM's version is written last.

    Args:
        distribution: the one that has vLLM's Python.
    """
    overlay = Environment(runtime.directory)
    metadata = Path(f"vllm-{runtime.vllm}+cpu.dist-info") / "METADATA"  # "cpu" is how vLLM knows its platform
    theirs = site_packages(base)
    ours = runtime.directory / theirs.relative_to(base.directory)
    if (ours / metadata).is_file():
        print(f"  environment {runtime.name}: up to date", flush=True)
        return overlay
    make = [str(base.python), "-m", "venv", "--clear", "--without-pip", str(runtime.directory)]
    run_step("make the virtual environment", make, runtime.logs / "venv.log")
    (ours / "base.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n", encoding="utf-8")
    options = ["--only-binary=:all:", f"{distribution}=={runtime.vllm}"]
    wheel = download(overlay, f"vLLM {runtime.vllm}", runtime.logs / "vllm.log", options)
    with zipfile.ZipFile(wheel) as archive:
        python = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(ours, python)
    shutil.rmtree(wheel.parent)
    complete(overlay, ours)
    (ours / metadata).parent.mkdir()
    (ours / metadata).write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {runtime.vllm}+cpu\n", encoding="utf-8")
    return overlay


def download(overlay: Environment, what: str, log: Path, options: list[str], **variables: str) -> Path:
    """One file, without what it requires; in a folder of its own."""
    folder = overlay.directory / "downloads"
    command = [str(overlay.python), "-m", "pip", "download", "--no-deps", "--dest", str(folder), *options]
    run_step(f"download {what}", command, log, env={**overlay.variables(), **variables})
    (file,) = folder.iterdir()
    return file
