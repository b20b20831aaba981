"""The C++ example programs, built against what was installed and run in pairs on loopback."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support.cpp import EXAMPLES, ROOT, cmake_build, cmake_install, installed, output_of, pkg_config_build, run_pair

# How often the two processes of a pair compare all of their memory.
COMPARISONS = {"pull": 4, "push": 4, "switch_role": 5}


@pytest.fixture
def addresses() -> tuple[str, str]:
    """Two addresses that nobody else uses: a loopback IP of this test's own, ports that no client is given."""
    host = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    return f"{host}:26000", f"{host}:26001"


@pytest.fixture(scope="module")
def from_cmake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs built with find_package(llm_datadist) against the installed Python package."""
    build = tmp_path_factory.mktemp("cmake")
    return cmake_build(EXAMPLES, build, f"-DCMAKE_PREFIX_PATH={installed('--prefix')}")


def check_pair(program: Path, addresses: tuple[str, str]) -> None:
    outputs = run_pair(program, addresses)
    assert all(output.endswith("every byte is right\n") for output in outputs)
    assert sum(output.count("bytes as expected") for output in outputs) == COMPARISONS[program.name]


@pytest.mark.parametrize("example", COMPARISONS)
def test_pair_built_with_cmake(example: str, from_cmake: Path, addresses: tuple[str, str]) -> None:
    check_pair(from_cmake / example, addresses)


def test_pair_built_with_pkg_config(tmp_path: Path, addresses: tuple[str, str]) -> None:
    program = pkg_config_build(EXAMPLES / "pull.cc", tmp_path / "pull", installed("--pkg-config-path"))
    check_pair(program, addresses)


def test_numbers_keys_aggregates_and_defaults_of_the_headers_in_cpp14(tmp_path: Path) -> None:
    source = Path(__file__).with_name("header_contract.cc")
    output_of([str(pkg_config_build(source, tmp_path / "contract", installed("--pkg-config-path"), "c++14"))])


def test_installation_without_python_can_be_moved(tmp_path: Path, addresses: tuple[str, str]) -> None:
    quick = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0")
    build = cmake_build(
        ROOT / "native", tmp_path / "native", "-DDATADIST_BUILD_PYTHON=OFF", *quick, target="llm_datadist"
    )
    cmake_install(build, tmp_path / "prefix")
    shutil.rmtree(build)
    moved = (tmp_path / "prefix").rename(tmp_path / "elsewhere")

    examples = cmake_build(EXAMPLES, tmp_path / "examples", f"-DCMAKE_PREFIX_PATH={moved}")
    check_pair(examples / "push", addresses)
    (pkg_config_path,) = moved.glob("**/pkgconfig")
    check_pair(pkg_config_build(EXAMPLES / "pull.cc", tmp_path / "pull", pkg_config_path), addresses)
