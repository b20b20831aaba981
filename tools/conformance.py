#!/usr/bin/env python3
"""Checks docs/conformance.md against the sources: nothing in it is invented, nothing of the API is left out.

A row is | what | implemented in | tested by | note |. `path::symbol` must be declared there, a test must exist, and
every name of the public API must stand between backticks in the first column of some row.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path("docs/conformance.md")
HEADERS = Path("native/include/llm_datadist")
PYTHON_API = Path("vllm_datadist_connector/llm_datadist")
EXAMPLES = Path("docs/examples/cpp")
HEADER_ROW = ("what", "implemented in", "tested by", "note")
# The manager is not exported at the top level, but documented all the same.
BESIDE_ALL = ("CacheManager",)

_SPAN = re.compile(r"`([^`]+)`")
_CPP_NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', flags=re.DOTALL)
_CPP_NO_TYPES = {"return", "else", "throw", "case", "delete", "goto", "new"}
_GTEST = re.compile(r"^TEST(?:_F|_P)?\(\s*(\w+)\s*,\s*(\w+)\s*\)", flags=re.MULTILINE)


@dataclass(frozen=True)
class Row:
    line: int
    what: tuple[str, ...]
    implemented: tuple[str, ...]
    tested: tuple[str, ...]


@dataclass
class Table:
    """The rows of all tables of the document, and the lines that are no row though they look like one."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_table(text: str) -> Table:
    table = Table()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("|") or set(line) <= set("|-: "):
            continue
        cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1]))
        if cells == HEADER_ROW:
            continue
        if len(cells) != len(HEADER_ROW):
            table.problems.append(f"line {number}: {len(cells)} cells; a row has {len(HEADER_ROW)}")
            continue
        what, implemented, tested = (tuple(_SPAN.findall(cell)) for cell in cells[:3])
        table.rows.append(Row(number, what, implemented, tested))
        if not implemented:
            table.problems.append(f"line {number}: {cells[0]} is implemented nowhere")
        if not tested:
            table.problems.append(f"line {number}: {cells[0]} is tested nowhere")
    return table


# ---- what a row refers to ----


@cache
def _source(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(_source(path))


@cache
def _cpp_code(path: Path) -> str:
    return _CPP_NOT_CODE.sub(" ", _source(path))


def _python_names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, also those that stand under an if or a try."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name, statement
        elif isinstance(statement, ast.Assign):
            yield from ((target.id, statement) for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _python_names(statement.body)


def declares_python(path: Path, symbol: str) -> bool:
    body = _module(path).body
    *owners, last = symbol.split(".")
    for owner in owners:
        node = dict(_python_names(body)).get(owner)
        if not isinstance(node, ast.ClassDef):
            return False
        body = node.body
    return last in dict(_python_names(body))


def declares_cpp(path: Path, symbol: str) -> bool:
    """The last name is declared or defined in the file, and the names that qualify it appear there."""
    code = _cpp_code(path)
    *owners, last = symbol.split("::")
    if not all(re.search(rf"\b{re.escape(owner)}\b", code) for owner in owners):
        return False
    name = re.escape(last)
    type_declared = rf"\b(?:class|struct|enum|enum\s+class)\s+(?:[A-Z_]+\s+)?{name}\b"
    enumerated = rf"[{{,]\s*{name}\s*(?:=[^,}};]*)?(?=[,}}])"
    # A type, then the name: a call as a statement has nothing before its name.
    declared = rf"(?:\b(\w[\w>*&\]]*)|[>*&\]]+)[\s*&]+(?:\w+::)*{name}\s*(?=[(\[{{=;:,)])"
    if re.search(rf"{type_declared}|{enumerated}", code):
        return True
    return any(match.group(1) not in _CPP_NO_TYPES for match in re.finditer(declared, code))


def implementation_problem(reference: str) -> str:
    """Why the reference names nothing; empty if it names something."""
    where, separator, symbol = reference.partition("::")
    path = Path(where)
    if not separator or not symbol:
        return f"`{reference}` is not of the form path::symbol"
    if not (ROOT / path).is_file():
        return f"`{reference}`: there is no file {path}"
    declares = declares_python if path.suffix in {".py", ".pyi"} else declares_cpp
    return "" if declares(path, symbol) else f"`{reference}`: {path} declares no {symbol}"


def test_problem(reference: str) -> str:
    """Why there is no such test; empty if there is one."""
    where, separator, name = reference.partition("::")
    path = Path(where)
    if not (ROOT / path).is_file():
        return f"`{reference}`: there is no file {path}"
    if path.suffix == ".cc" and path.parent == EXAMPLES:
        return "" if not separator else f"`{reference}`: an example program is one test"
    if path.suffix == ".cc":
        known = {f"{suite}.{test}" for suite, test in _GTEST.findall(_cpp_code(path))}
        return "" if name in known else f"`{reference}`: {path} has no test {name or 'that is named'}"
    is_test = name.rpartition("::")[2].startswith("test_")
    if is_test and declares_python(path, name.replace("::", ".")):
        return ""
    return f"`{reference}`: {path} has no test {name or 'that is named'}"


# ---- what must have a row ----


def cpp_api() -> Iterator[str]:
    """Methods of LlmDataDist, functions, options, status codes, data types and structs of the public headers."""
    for header in sorted((ROOT / HEADERS).glob("*.h")):
        code = _CPP_NOT_CODE.sub(" ", header.read_text(encoding="utf-8"))
        yield from re.findall(r"\bconstexpr char (OPTION_\w+)\[\]", code)
        yield from re.findall(r"\bconstexpr Status (LLM_\w+) =", code)
        yield from re.findall(r"^LLM_DATADIST_API [^;]*?\b(\w+)\(", code, flags=re.MULTILINE)
        yield from re.findall(r"^\s+(DT_\w+) = ", code, flags=re.MULTILINE)
        types = re.findall(r"^(?:struct|enum class) (\w+)[^;{]*\{", code, flags=re.MULTILINE)
        yield from (f"llm_datadist::{name}" for name in types)  # Python has classes of the same names
        _, _, body = code.partition("class LLM_DATADIST_API LlmDataDist {")
        methods = re.findall(r"^  (?:Status|void) (\w+)\(", body.partition("\n};")[0], flags=re.MULTILINE)
        yield from (f"LlmDataDist::{method}" for method in methods)


def _api_classes() -> dict[str, ast.ClassDef]:
    modules = [_module(path.relative_to(ROOT)) for path in sorted((ROOT / PYTHON_API).rglob("*.py"))]
    return {
        name: node for module in modules for name, node in _python_names(module.body) if isinstance(node, ast.ClassDef)
    }


def exported_names() -> list[str]:
    bound = dict(_python_names(_module(PYTHON_API / "__init__.py").body))
    statement = bound.get("__all__")
    if not isinstance(statement, ast.Assign):
        raise TypeError(f"{PYTHON_API}/__init__.py assigns no __all__")
    return list(ast.literal_eval(statement.value))


def _members(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Public methods, properties, class attributes, and attributes that methods set on self; inherited ones too."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _members(classes[base.id], classes)
    yield from (name for name, _ in _python_names(node.body))
    stored = (part for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store))
    yield from (part.attr for part in stored if isinstance(part.value, ast.Name) and part.value.id == "self")


def python_api() -> Iterator[str]:
    classes = _api_classes()
    for name in (*exported_names(), *BESIDE_ALL):
        yield name
        if name in classes:
            members = dict.fromkeys(_members(classes[name], classes))
            yield from (f"{name}.{member}" for member in members if not member.startswith("_"))


def problems(table: Table) -> list[str]:
    found = list(table.problems)
    for row in table.rows:
        checks = [implementation_problem(reference) for reference in row.implemented]
        checks += [test_problem(reference) for reference in row.tested]
        found += [f"line {row.line}: {problem}" for problem in checks if problem]
    rows = {name for row in table.rows for name in row.what}
    found += [f"`{name}` has no row" for name in dict.fromkeys((*cpp_api(), *python_api())) if name not in rows]
    return found


def main() -> int:
    table = read_table(_source(TABLE))
    found = problems(table)
    for problem in found:
        print(f"{TABLE}: {problem}", file=sys.stderr)
    print(f"{len(table.rows)} rows, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
