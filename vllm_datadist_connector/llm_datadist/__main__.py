"""Runs a program that says `import llm_datadist` unchanged, against this package.

    python -m vllm_datadist_connector.llm_datadist SCRIPT [ARGS]
    python -m vllm_datadist_connector.llm_datadist -m MODULE [ARGS]

A type checker finds the package by stubs, which this writes to FOLDER (MYPYPATH for mypy, stubPath for pyright):

    python -m vllm_datadist_connector.llm_datadist --stubs FOLDER

argv, sys.path, __main__, exit codes and tracebacks are those that python itself would give; Python processes that the
program starts find the package as well.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Final, NoReturn

from vllm_datadist_connector.llm_datadist import aliases, stubs

_SHIM: Final = str(Path(__file__).parent / "shim")
_USAGE: Final = "usage: python -m vllm_datadist_connector.llm_datadist (SCRIPT | -m MODULE) [ARGS] | --stubs FOLDER"
_OWN_FRAMES: Final = frozenset(
    {
        __file__,
        runpy.__file__,
        "<frozen runpy>",
        "<frozen importlib._bootstrap>",
        "<frozen importlib._bootstrap_external>",
    }
)


class _ScriptLoader(SourceFileLoader):
    """Unlike that of a module, a script's code is not cached beside it."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the loader's signature
        return self.source_to_code(self.get_data(self.path), self.path)


def _print_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """sys.excepthook without the frames between python and the program."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _OWN_FRAMES:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _prepare(first_path: str, argv: list[str]) -> None:
    aliases.install()
    sys.excepthook = _print_exception
    sys.argv = argv
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = first_path
    sys.path.append(_SHIM)  # where multiprocessing's children look, which get a copy of this
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([_SHIM, inherited] if inherited else [_SHIM])


def _run_script(argv: list[str]) -> None:
    """Not runpy.run_path: it replaces argv[0], and drops __main__ while threads of the program may still use it."""
    path = Path(argv[0]).absolute()
    _prepare(str(path.resolve().parent), argv)
    loader = _ScriptLoader("__main__", str(path))
    module = ModuleType("__main__")
    module.__file__ = str(path)
    module.__loader__ = loader
    sys.modules["__main__"] = module
    loader.exec_module(module)


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE)
    elif argv[:1] == ["--stubs"] and len(argv) == 2:
        stubs.write_stubs(Path(argv[1]))
    elif argv[:1] == ["-m"] and len(argv) > 1:
        _prepare(str(Path.cwd()), argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif not argv or argv[0].startswith("-"):
        _refuse(_USAGE)
    elif not Path(argv[0]).is_file():
        _refuse(f"can't open file {argv[0]!r}: no such file")
    else:
        _run_script(argv)


if __name__ == "__main__":
    main()
