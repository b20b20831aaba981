"""What the package exports, where, and what importing it does to the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_datadist_connector import llm_datadist

V2 = {
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
}
LEGACY = {"TensorDesc", "Tensor", "KvCacheManager"}


def run(program: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names() -> None:
    assert set(llm_datadist.v2_list) == V2
    assert set(llm_datadist.__all__) == V2 | LEGACY
    assert len(llm_datadist.__all__) == len(V2 | LEGACY)


@pytest.mark.parametrize("name", sorted(V2 | LEGACY))
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(llm_datadist, name)
    assert value.__doc__


def test_other_names_are_not() -> None:
    assert not hasattr(llm_datadist, "CacheManager")
    with pytest.raises(AttributeError, match="NoSuchName"):
        llm_datadist.NoSuchName  # noqa: B018


def test_submodules() -> None:
    run(
        "from vllm_datadist_connector.llm_datadist import configs, data_type, status, LLMRole, LLMException, DataType\n"
        "from vllm_datadist_connector.llm_datadist.utils import log, utils\n"
        "from vllm_datadist_connector.llm_datadist.v2 import cache_manager, config, llm_datadist\n"
        "from vllm_datadist_connector.llm_datadist.v2 import llm_types, llm_utils\n"
        "assert configs.LLMRole is LLMRole\n"
        "assert configs.LLMConfig is config.LLMConfig is configs.LlmConfig\n"
        "assert status.LLMException is LLMException\n"
        "assert data_type.DataType is DataType\n"
        "assert cache_manager.CacheManager\n"
        "assert llm_datadist.LLMDataDist and llm_datadist._shutdown_handler\n"
        "assert llm_types.Cache and llm_utils\n"
    )


def test_the_legacy_names_are_lazy_and_no_array_library_is_loaded() -> None:
    run(
        "import sys\n"
        "from vllm_datadist_connector import llm_datadist\n"
        "assert not sys.modules.keys() & {'numpy', 'torch', 'vllm'}\n"
        "assert 'Tensor' not in vars(llm_datadist)\n"
        "assert llm_datadist.Tensor and llm_datadist.KvCacheManager and llm_datadist.TensorDesc\n"
        "assert not sys.modules.keys() & {'numpy', 'torch', 'vllm'}\n"
    )


@pytest.mark.parametrize(("before", "after"), [({}, "0"), ({"AUTO_USE_UC_MEMORY": "1"}, "1")])
def test_import_sets_one_environment_variable(before: dict[str, str], after: str) -> None:
    program = "import os, vllm_datadist_connector.llm_datadist\nprint(os.environ['AUTO_USE_UC_MEMORY'])"
    assert run(program, **before) == f"{after}\n"


def test_names_of_the_enumerations() -> None:
    assert [(role.name, role.value) for role in llm_datadist.LLMRole] == [("PROMPT", 1), ("DECODER", 2), ("MIX", 3)]
    assert [(place.name, place.value) for place in llm_datadist.Placement] == [("HOST", 0), ("DEVICE", 1)]
    assert str(llm_datadist.Placement.HOST) == "Placement.HOST"
    assert {kind.name: kind.value for kind in llm_datadist.Memtype} == {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}
    assert {state.name: state.value for state in llm_datadist.RegisterMemStatus} == {
        "OK": 0,
        "PREPARING": 1,
        "FAILED": 2,
    }
