"""CANN and its LLM-DataDist library: where it is, whose it is, and whether our loader takes it."""

from __future__ import annotations

import platform
from pathlib import Path

from vllm_datadist_connector.doctor.ascend.parse import GarbledError, parse_info, version_numbers
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.installation import version_of
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.doctor.provider import Probed

SONAME = "libllm_datadist.so"
VARIABLE = "DATADIST_CANN_LIBRARY"
"""Names the file that the provider loads; else it is searched for by its name."""
_V1 = "libllm_engine.so"
_OURS = b"QueryListenPort"
"""A symbol of ours that CANN's library has not."""
_TOOLKITS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
_OLDEST = (8, 5)
_DRIVER = "/usr/local/Ascend/driver/version.info"


def toolkits(machine: Machine) -> list[str]:
    """Folders where CANN may be, that of the environment first."""
    given = [machine.environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if machine.environ.get(name)]
    return list(dict.fromkeys([*given, *_TOOLKITS]))


def check_library(machine: Machine, probed: Probed) -> Finding:
    """The loader of the provider has the last word, and the provider's finding says it; this says what there is."""
    name = SONAME
    if not probed.error:
        loaded = [path for path in probed.after if SONAME in path]
        return Finding(name, "ok", f"loaded from {', '.join(loaded) or 'no file'}{_companions(probed)}")
    given = machine.environ.get(VARIABLE, "")
    searched = [folder for folder in machine.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    known = [f"{toolkit}/lib64" for toolkit in toolkits(machine)]
    names = [given] if given else [f"{folder}/{SONAME}" for folder in dict.fromkeys([*searched, *known])]
    file = next((path for each in names if (path := machine.path(each)).exists()), None)
    if file is None and given:
        do = f"unset {VARIABLE}, or let it name lib64/{SONAME} of CANN 8.5 or newer"
        return Finding(name, "wrong", f"{VARIABLE} is {given}, which is not there", do)
    if file is None:
        do = "source set_env.sh of CANN 8.5 or newer (/usr/local/Ascend/cann/set_env.sh) before vllm serve"
        return Finding(name, "wrong", f"no {', no '.join(names)}", do)
    if _is_ours(file):
        do = "take that folder out of LD_LIBRARY_PATH: the engine of this package has the same name"
        return Finding(name, "wrong", f"{file} is this package's own, not CANN's", do)
    if not given and not any(file.is_relative_to(machine.path(folder)) for folder in searched):
        do = f"source set_env.sh there, or add {file.parent} to LD_LIBRARY_PATH"
        return Finding(name, "wrong", f"{file} is there, but not where libraries are searched", do)
    before = [path for path in probed.before if SONAME in path]
    who = f"; loaded before us, by LD_PRELOAD or an import: {', '.join(before)}" if before else ""
    do = "do what the provider's finding says"
    return Finding(name, "wrong", f"{file} is refused{who}{_companions(probed)}", do)


def _companions(probed: Probed) -> str:
    others = [path for path in probed.after if SONAME not in path]
    v1 = [path for path in others if _V1 in path]
    text = f"; V1 library loaded beside it: {', '.join(v1)}" if v1 else ""
    rest = [Path(path).name for path in others if path not in v1]
    return text + (f"; with {', '.join(rest)}" if rest else "")


def _is_ours(path: Path) -> bool:
    try:
        return _OURS in path.read_bytes()
    except OSError:
        return False


def check_versions(machine: Machine, probed: Probed) -> list[Finding]:
    return [_check_cann(machine), _check_driver(machine), *_check_python(probed)]


def _check_cann(machine: Machine) -> Finding:
    name, arch = "CANN", f"{platform.machine()}-linux"
    files = [f"{toolkit}/{arch}/ascend_toolkit_install.info" for toolkit in toolkits(machine)]
    for file in files:
        text = machine.read(file)
        if text is None:
            continue
        version = parse_info(text).get("version", "")
        try:
            numbers = version_numbers(version)
        except GarbledError as error:
            return Finding(name, "warning", f"{file}: {error}", "compare the version with 8.5")
        if numbers < _OLDEST:
            return Finding(name, "warning", f"{version}, in {file}", "8.5 is the oldest that this was written for")
        return Finding(name, "ok", f"{version}, in {file}")
    return Finding(name, "warning", f"no {' or '.join(files)}", "source CANN's set_env.sh; 8.5 is the oldest supported")


def _check_driver(machine: Machine) -> Finding:
    text = machine.read(_DRIVER)
    if text is None:
        do = "mount /usr/local/Ascend/driver into the container"
        return Finding("HDK driver", "warning", f"{_DRIVER} cannot be read", do)
    told = parse_info(text)
    version = told.get("Version") or told.get("package_version")
    if not version:
        return Finding("HDK driver", "warning", str(GarbledError(_DRIVER, text)), "report this text")
    return Finding("HDK driver", "ok", version)


def _check_python(probed: Probed) -> list[Finding]:
    findings = []
    for distribution in ("torch-npu", "vllm-ascend"):
        version = version_of(distribution)
        if version is None:
            do = "install it as vllm-ascend's guide says, or start from its image"
            findings.append(Finding(distribution, "wrong", "not installed in this environment", do))
        elif distribution == "torch-npu" and probed.torch_npu:
            do = "source set_env.sh of the CANN that it was built for"
            findings.append(Finding(distribution, "wrong", f"{version} cannot be imported: {probed.torch_npu}", do))
        else:
            findings.append(Finding(distribution, "ok", version))
    return findings
