"""Runs a program that says `import llm_datadist` unchanged, against this package.

    python -m vllm_datadist_connector.llm_datadist SCRIPT [ARGS]
    python -m vllm_datadist_connector.llm_datadist -m MODULE [ARGS]

argv, sys.path, __main__, exit codes and tracebacks are those that python itself would give; Python processes that the
program starts find the package as well.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

from vllm_datadist_connector.llm_datadist import aliases

_SHIM: Final = str(Path(__file__).parent / "shim")
_USAGE: Final = "usage: python -m vllm_datadist_connector.llm_datadist (SCRIPT | -m MODULE) [ARGS]"
_OWN_FRAMES: Final = frozenset({__file__, runpy.__file__, "<frozen runpy>"})


def _print_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook without the frames between python and the program."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _OWN_FRAMES:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _prepare(first_path: str) -> None:
    aliases.install()
    sys.excepthook = _print_exception
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = first_path
    sys.path.append(_SHIM)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_SHIM, inherited] if inherited else [_SHIM])


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
    elif arguments[:1] == ["-m"] and len(arguments) > 1:
        _prepare(str(Path.cwd()))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif not arguments or arguments[0].startswith("-"):
        _refuse(_USAGE)
    elif not Path(arguments[0]).exists():
        _refuse(f"can't open file {arguments[0]!r}: no such file")
    else:
        _prepare(str(Path(arguments[0]).resolve().parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
