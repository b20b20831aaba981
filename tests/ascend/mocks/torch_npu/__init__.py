"""Stands in for torch_npu, and for what else only an Ascend image has: enough to import vllm-ascend and to allocate.

The device `npu` is a name; memory is the host's. Whoever uses a kernel gets a MagicMock, and wrong numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch

ABSENT = ("torch_npu", "acl", "torchvision", "triton")


class _Module(ModuleType):
    """Has everything."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0.25.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Absent(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


sys.meta_path.append(_Absent())  # behind the finders of what is there
sys.modules[__name__].__class__ = _Module
torch.utils.rename_privateuse1_backend("npu")
npu = _Module("torch.npu")
npu.current_device = lambda: 0
sys.modules["torch.npu"] = torch.npu = npu
torch.distributed.is_hccl_available = lambda: True
