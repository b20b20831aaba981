"""Makes `import llm_datadist` and `import llm_datadist_v1`, with their submodules, find this package.

A program that cannot be started by `python -m vllm_datadist_connector.llm_datadist`, a notebook say, calls install()
first:

    from vllm_datadist_connector.llm_datadist import aliases
    aliases.install()
    import llm_datadist

An aliased module is the very module object of this package: there is one LLMException, whichever name it came by.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_PACKAGE: Final = __name__.rpartition(".")[0]
NAMES: Final = {"llm_datadist": _PACKAGE, "llm_datadist_v1": f"{_PACKAGE}.v1"}
"""What each alias stands for."""


class _AliasLoader(Loader):
    def __init__(self, target: str) -> None:
        self._target = target

    def exec_module(self, module: ModuleType) -> None:
        """Puts the target in the place of the empty module that the import system has made."""
        sys.modules[module.__name__] = importlib.import_module(self._target)


class _AliasFinder(MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the import system's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if root not in NAMES:
            return None
        name = ".".join(part for part in (NAMES[root], rest) if part)
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        is_package = spec.submodule_search_locations is not None
        return ModuleSpec(fullname, _AliasLoader(name), origin=spec.origin, is_package=is_package)


def install() -> None:
    """From now on those imports find this package, even where another one has the name. Idempotent."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
