"""Whether vLLM and this package are there, and find each other."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.machine import Machine

PACKAGE = "vllm_datadist_connector"
DISTRIBUTION = "vllm-datadist-connector"
PLUGIN = "datadist"
"""Of vLLM's entry point for us, by which VLLM_PLUGINS knows us."""
OLDEST, NEWEST = (0, 23), (0, 33)


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_vllm() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        found = f"vllm is not installed in {sys.prefix}, where we are"
        return Finding("vllm", "wrong", found, "install both in one environment")
    found = version_of("vllm") or "of no known version"
    supported = f"supported: {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if release == (0, 0):
        do = "compare what it was built from with the supported ones"
        return Finding("vllm", "warning", f"{found}, which does not say what it is; {supported}", do)
    if release < OLDEST:
        return Finding("vllm", "wrong", f"{found}; {supported}", "install a supported one")
    if release > NEWEST:
        return Finding("vllm", "warning", f"{found}; {supported}", "what is newer has not been tried")
    return Finding("vllm", "ok", f"{found}; {supported}")


def check_plugin(machine: Machine) -> Finding:
    name = "plugin"
    ours = [each for each in entry_points(group="vllm.general_plugins") if each.value.startswith(PACKAGE)]
    if not ours:
        found = f"{DISTRIBUTION} is no plugin of vLLM here"
        return Finding(name, "wrong", found, "install it with pip, not by PYTHONPATH")
    try:
        ours[0].load()
    except Exception as error:
        found = f"the entry point {ours[0].value} raises {type(error).__name__}: {error}"
        return Finding(name, "wrong", found, "reinstall the package: vLLM ends where a plugin raises")
    allowed = machine.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        do = f'add {PLUGIN!r}, unset it, or give "kv_connector_module_path": "{PACKAGE}.connector"'
        return Finding(name, "wrong", f"VLLM_PLUGINS is {allowed!r}, and vLLM loads no other plugins", do)
    return Finding(name, "ok", f"vLLM finds {ours[0].name} = {ours[0].value}")


def check_native() -> Finding:
    """Also why the library does not load: the wheel may be of another Python or C library."""
    name = "native library"
    do = "install the wheel of this Python, or `pip install .` in the repository, which compiles it"
    if importlib.util.find_spec(f"{PACKAGE}._native") is None:
        found = f"{PACKAGE} is installed without its native library, {PACKAGE}/_native.*.so"
        return Finding(name, "wrong", found, do)
    try:
        native = import_module(f"{PACKAGE}._native")
    except ImportError as error:
        return Finding(name, "wrong", f"does not load: {error}", do)
    return Finding(name, "ok", f"{native.__file__}; providers: {', '.join(native.providers())}")
