"""Our hooks fit the connector interface of the oldest, newest and installed vLLM, and no hook is a misspelt one."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import vllm
from newest_vllm import NEWEST_SOURCES

from vllm_datadist_connector.connector import DataDistConnector

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tools") not in sys.path:
    sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import OLDEST  # noqa: E402
from connector_signatures import (  # noqa: E402
    Member,
    Parameter,
    dump_interface,
    load_interface,
    read_interface,
    signature_of,
)

STORED = dict(load_interface(path) for path in sorted((ROOT / "tests" / "data").glob("kv_connector_*.json")))
INTERFACES = {**STORED, **dict([read_interface(Path(vllm.__file__).parents[1])])}
OURS = frozenset(base.__name__ for base in DataDistConnector.__mro__)
"""SupportsHMA binds only those who derive from it."""
BASES = {
    version: {name: member for each, members in classes.items() if each in OURS for name, member in members.items()}
    for version, classes in INTERFACES.items()
}
HOOKS = sorted(name for name in vars(DataDistConnector) if not name.startswith("_"))


def kind_of(name: str) -> str:
    member = inspect.getattr_static(DataDistConnector, name)
    return next(
        (kind for kind in ("classmethod", "staticmethod", "property") if type(member).__name__ == kind), "method"
    )


def parameters_of(name: str) -> tuple[Parameter, ...]:
    if kind_of(name) == "property":
        return ()
    parameters = signature_of(getattr(DataDistConnector, name))
    return parameters[1:] if kind_of(name) == "method" else parameters


def check_call_compatible(ours: tuple[Parameter, ...], theirs: tuple[Parameter, ...]) -> None:
    """The same parameters under the same names in the same order, so that positional and keyword calls arrive."""
    shared = {each.name for each in theirs}
    assert [(each.name, each.kind) for each in ours if each.name in shared] == [(e.name, e.kind) for e in theirs]
    for each, base in zip((each for each in ours if each.name in shared), theirs, strict=True):
        assert each.has_default or not base.has_default, f"{each.name} may be left out by the caller"
    extra = [each for each in ours if each.name not in shared]
    assert all(each.has_default or each.kind.startswith("VAR_") for each in extra)
    # An extra one in between would take what the caller means for the next.
    positional = [each.name for each in ours if each.kind.startswith("POSITIONAL")]
    assert positional[: len(shared)] == [each.name for each in theirs if each.kind.startswith("POSITIONAL")]


def test_the_stored_interfaces_are_those_of_the_oldest_and_the_newest_vllm() -> None:
    assert list(STORED) == [OLDEST.vllm, NEWEST_SOURCES.vllm]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_one(name: str) -> None:
    assert any(name in members for members in BASES.values()), "vLLM never calls it"


@pytest.mark.parametrize("version", BASES)
@pytest.mark.parametrize("name", ["__init__", *HOOKS])
def test_hooks_take_what_vllm_passes(version: str, name: str) -> None:
    base = BASES[version].get(name)
    if base is not None:
        assert kind_of(name) == base.kind
        check_call_compatible(parameters_of(name), base.parameters)


@pytest.mark.parametrize("version", BASES)
def test_every_abstract_hook_is_there(version: str) -> None:
    abstract = {name for name, member in BASES[version].items() if member.abstract}
    assert len(abstract) >= 7
    assert abstract <= set(HOOKS)


@pytest.mark.parametrize("version", BASES)
def test_finished_loads_and_requests_are_answered(version: str) -> None:
    """Hooks with a default that would lose something: failed loads, or the lease of a finished request."""
    needed = {"get_transfer_results"} if "get_transfer_results" in BASES[version] else {"get_finished"}
    if "get_transfer_results" not in BASES[version]:
        needed.add("get_block_ids_with_load_errors")
    needed |= {"request_finished", "request_finished_all_groups"} & BASES[version].keys()
    assert needed <= set(HOOKS)


def positional(*names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, "POSITIONAL_OR_KEYWORD", has_default=False) for name in names)


KEYWORDS = Parameter("kwargs", "VAR_KEYWORD", has_default=False)
OPTION = Parameter("option", "POSITIONAL_OR_KEYWORD", has_default=True)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (positional("a"), positional("a", "b")),
        (positional("b", "a"), positional("a", "b")),
        (positional("other"), positional("a")),
        (positional("a", "b"), positional("a")),
        (positional("a"), (*positional("a"), KEYWORDS)),
        (positional("option"), (OPTION,)),
        ((OPTION, *positional("a")), positional("a")),
    ],
)
def test_what_is_not_call_compatible(ours: tuple[Parameter, ...], theirs: tuple[Parameter, ...]) -> None:
    with pytest.raises(AssertionError):
        check_call_compatible(ours, theirs)


def test_what_is_call_compatible() -> None:
    check_call_compatible((*positional("a"), OPTION, KEYWORDS), positional("a"))
    check_call_compatible((*positional("a"), KEYWORDS), (*positional("a"), KEYWORDS))


SOURCE = """
class Base(ABC):
    def __init__(self, one): ...
    @property
    def prop(self): ...
    @classmethod
    def made(cls, a, /, b=1, *args, c, d=2, **more): ...
    @abstractmethod
    def must(self): ...
    def _hidden(self): ...
"""


def test_reader_and_introspection_agree(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "distributed" / "kv_transfer" / "kv_connector" / "v1"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text(SOURCE)
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '1.2.3'\n")
    version, interface = read_interface(tmp_path)
    assert version == "1.2.3"
    members = interface["Base"]
    assert set(members) == {"__init__", "prop", "made", "must"}
    assert members["prop"] == Member("property", False, ())
    assert members["must"] == Member("method", True, ())

    class Same:
        @classmethod
        def made(cls, a: int, /, b: int = 1, *args: int, c: int, d: int = 2, **more: int) -> None: ...

    assert members["made"] == Member("classmethod", False, signature_of(Same.made))
    stored = tmp_path / "stored.json"
    stored.write_text(dump_interface(version, interface))
    assert load_interface(stored) == (version, interface)
