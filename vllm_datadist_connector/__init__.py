"""KV-cache transfer between vLLM instances over the LLM-DataDist API.

Importing this package is cheap and safe anywhere: it loads neither vLLM nor torch nor the native library. vLLM finds
the connector through the entry point `plugin:register`.

A clone's folder of this package lies first on the path of a Python that is started in the clone, and holds no built
`_native`: it makes way for the installed package, whole, so that sources are never mixed with a build of others.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.1.0"


def _is_built(init: str) -> bool:
    return any(Path(init).with_name(f"_native{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


if not _is_built(__file__):
    for _entry in sys.path:
        _spec = PathFinder.find_spec(__name__, [_entry])
        if _spec is not None and _spec.loader is not None and _spec.origin is not None and _is_built(_spec.origin):
            sys.modules[__name__] = module_from_spec(_spec)
            _spec.loader.exec_module(sys.modules[__name__])
            break
