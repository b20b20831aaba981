"""A process that makes an endpoint of a provider, as a vLLM worker does, and tells what came of it in one line of JSON.

Apart from the doctor's, because another vendor's library may end it, and because what is loaded stays loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys

_LIBRARIES = re.compile(r"/[^\s]*/lib(?:llm_datadist|llm_engine|cann_hixl|metadef|hcomm|jemalloc)[^/\s]*\.so[^\s]*")


def mapped() -> list[str]:
    """Files of the libraries that matter and are loaded in this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return sorted({found[0] for line in maps if (found := _LIBRARIES.search(line))})


def probe(provider: str) -> dict[str, object]:
    told: dict[str, object] = {}
    if provider != "engine" and importlib.util.find_spec("torch_npu") is not None:
        try:
            importlib.import_module("torch_npu")
        except Exception as error:
            told["torch_npu"] = f"{type(error).__name__}: {error}"
    told["before"] = mapped()
    try:
        native = importlib.import_module("vllm_datadist_connector._native")
        told["capabilities"] = native.LlmDataDist(1, 3, provider).capabilities._asdict()
    except Exception as error:
        told["error"] = str(error)
    told["after"] = mapped()
    return told


if __name__ == "__main__":
    # What a library prints must not come between.
    answer = os.dup(1)
    os.dup2(2, 1)
    os.write(answer, json.dumps(probe(sys.argv[1])).encode() + b"\n")
