"""A ManagedDataDist that only notes what it was asked: for what Python checks and passes on, not for what happens."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple, cast

import vllm_datadist_connector
from vllm_datadist_connector import _native

STUB = ast.parse((Path(vllm_datadist_connector.__file__).parent / "_native.pyi").read_text(encoding="utf-8"))


def _parameters_of_methods() -> dict[str, list[str]]:
    (managed,) = (node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == "ManagedDataDist")
    return {
        method.name: [argument.arg for argument in method.args.args[1:]]
        for method in managed.body
        if isinstance(method, ast.FunctionDef)
    }


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class RecordingEngine:
    """Every method of the stub, each with the stub's parameters. `answers[name]` is returned, or called if callable."""

    PARAMETERS = _parameters_of_methods()

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers: dict[str, Any] = {
            "register_cache": (0, 7),
            "allocate_cache": lambda num_tensors, **_: (0, 8, [4096 * (i + 1) for i in range(num_tensors)]),
            "has_links": True,
        }

    def __getattr__(self, name: str) -> Any:
        parameters = self.PARAMETERS[name]

        def record(*args: Any, **kwargs: Any) -> Any:
            if len(args) > len(parameters) or not kwargs.keys() <= set(parameters[len(args) :]):
                raise TypeError(f"{name}{args} {kwargs}: the stub has {parameters}")
            call = Call(name, dict(zip(parameters, args, strict=False)) | kwargs)
            self.calls.append(call)
            answer = self.answers.get(name, 0)
            return answer(**call.arguments) if callable(answer) else answer

        return record

    @property
    def native(self) -> _native.ManagedDataDist:
        return cast("_native.ManagedDataDist", self)

    def only_call(self) -> Call:
        (call,) = self.calls
        return call
