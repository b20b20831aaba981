#!/usr/bin/env python3
"""Reads the signatures of vLLM's KV connector interface without importing vLLM.

    tools/connector_signatures.py WHEEL_OR_SITE_PACKAGES > tests/data/kv_connector_VERSION.json

For the unit test that holds our connector to the interfaces of the oldest and the newest vLLM, neither installed there.
Facts only: names, kinds of parameters, which of them have defaults, what is abstract.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INTERFACE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
VERSION = "vllm/_version.py"
NOT_METHODS = ("classmethod", "staticmethod", "property")


class Parameter(NamedTuple):
    name: str
    kind: str
    """Name of a kind of inspect.Parameter."""
    has_default: bool


class Member(NamedTuple):
    kind: str
    """method, classmethod, staticmethod or property."""
    abstract: bool
    parameters: tuple[Parameter, ...]
    """Without self or cls."""


Interface = dict[str, dict[str, Member]]
"""Members by class and name."""


def read_interface(source: Path | zipfile.Path) -> tuple[str, Interface]:
    """(vLLM's version, its interface) of a folder that vLLM is installed in, or of an opened wheel."""
    version = _version((source / VERSION).read_text(encoding="utf-8"))
    module = ast.parse((source / INTERFACE).read_text(encoding="utf-8"))
    found = {node.name: dict(_members(node)) for node in module.body if isinstance(node, ast.ClassDef)}
    return version, {name: members for name, members in found.items() if members}


def load_interface(path: Path) -> tuple[str, Interface]:
    """What dump_interface() wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["vllm"], {
        name: {
            member: Member(kind, abstract, tuple(Parameter(*each) for each in parameters))
            for member, (kind, abstract, parameters) in members.items()
        }
        for name, members in stored["classes"].items()
    }


def dump_interface(version: str, interface: Interface) -> str:
    """JSON with one line per member, so that a difference of two versions can be read."""
    classes = []
    for name, members in interface.items():
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(member)}" for key, member in members.items())
        classes.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    body = ",\n".join(classes)
    return f'{{\n "vllm": {json.dumps(version)},\n "classes": {{\n{body}\n }}\n}}\n'


def signature_of(function: object) -> tuple[Parameter, ...]:
    """The same facts of a function that is at hand: as looked up in an instance or, for class methods, in the class."""
    if not callable(function):
        raise TypeError(f"{function!r} has no signature")
    return tuple(
        Parameter(each.name, each.kind.name, each.default is not inspect.Parameter.empty)
        for each in inspect.signature(function).parameters.values()
    )


def _version(text: str) -> str:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "__version__" in names:
                return str(node.value.value)
    raise ValueError(f"{VERSION} assigns no __version__")


def _members(node: ast.ClassDef) -> Iterator[tuple[str, Member]]:
    for function in node.body:
        if not isinstance(function, ast.FunctionDef) or (function.name[0] == "_" and function.name != "__init__"):
            continue
        decorators = [ast.unparse(each) for each in function.decorator_list]
        kind = next((each for each in decorators if each in NOT_METHODS), "method")
        parameters = tuple(_parameters(function.args))
        yield (
            function.name,
            Member(kind, "abstractmethod" in decorators, parameters[0 if kind == "staticmethod" else 1 :]),
        )


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [(each.arg, "POSITIONAL_ONLY") for each in arguments.posonlyargs]
    positional += [(each.arg, "POSITIONAL_OR_KEYWORD") for each in arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for index, (name, kind) in enumerate(positional):
        yield Parameter(name, kind, index >= first_default)
    if arguments.vararg is not None:
        yield Parameter(arguments.vararg.arg, "VAR_POSITIONAL", False)
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(each.arg, "KEYWORD_ONLY", default is not None)
    if arguments.kwarg is not None:
        yield Parameter(arguments.kwarg.arg, "VAR_KEYWORD", False)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    try:
        version, interface = read_interface(zipfile.Path(path) if path.is_file() else path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(dump_interface(version, interface))
    return 0


if __name__ == "__main__":
    sys.exit(main())
