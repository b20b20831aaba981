"""Stub files by which a type checker knows `llm_datadist` and `llm_datadist_v1`: it runs no import hooks.

They are written where the user wants them: mypy takes no stubs for other names from the folder of installed packages.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

from vllm_datadist_connector.llm_datadist import aliases

_RUNTIME_ONLY = frozenset({"__main__", "aliases", "stubs"})


def write_stubs(folder: Path) -> None:
    """OSError if the folder cannot be made or written."""
    for alias, target in aliases.NAMES.items():
        root = Path(__file__).parent.joinpath(*target.split(".")[2:])
        _write(folder / alias / "__init__.pyi", target)
        for module in pkgutil.walk_packages([str(root)], f"{target}."):
            names = module.name.removeprefix(f"{target}.").split(".")
            if names[0] not in _RUNTIME_ONLY:
                path = folder.joinpath(alias, *names)
                _write(path / "__init__.pyi" if module.ispkg else path.with_suffix(".pyi"), module.name)


def _write(path: Path, module: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from {module} import *\n", encoding="utf-8")
