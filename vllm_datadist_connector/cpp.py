"""Where C++ programs find the library that came with this package.

cmake -DCMAKE_PREFIX_PATH="$(python -m vllm_datadist_connector.cpp --prefix)" ...
PKG_CONFIG_PATH="$(python -m vllm_datadist_connector.cpp --pkg-config-path)" pkg-config --cflags --libs llm_datadist
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vllm_datadist_connector

_CMAKE_PACKAGE = Path("lib/cmake/llm_datadist/llm_datadistConfig.cmake")


def prefix() -> Path:
    """The directory that holds include/ and lib/: what CMAKE_PREFIX_PATH takes.

    An editable installation has it in another folder than the sources. FileNotFoundError where nothing is installed.
    """
    folders = [Path(each).resolve() for each in vllm_datadist_connector.__path__]
    for folder in folders:
        if (folder / _CMAKE_PACKAGE).is_file():
            return folder
    raise FileNotFoundError(
        f"no {_CMAKE_PACKAGE} in {' or '.join(map(str, folders))}: this is a source tree; install the package"
        " (pip install .), or the library alone (cmake --install)"
    )


def pkg_config_path() -> Path:
    """The directory that holds llm_datadist.pc: what PKG_CONFIG_PATH takes. Errors as `prefix`."""
    return prefix() / "lib" / "pkgconfig"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_datadist_connector.cpp", description="Where C++ programs find llm_datadist."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prefix", action="store_const", const=prefix, dest="path", help="for CMAKE_PREFIX_PATH")
    which.add_argument(
        "--pkg-config-path", action="store_const", const=pkg_config_path, dest="path", help="for PKG_CONFIG_PATH"
    )
    path = parser.parse_args().path
    try:
        print(path())
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
