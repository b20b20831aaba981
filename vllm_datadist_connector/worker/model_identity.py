"""What a model is, in values that peers can compare: its effective configuration, and an identity of its weights.

A drafter for speculative decoding is no part of it: what it proposes is verified.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import transformers
import vllm

from vllm_datadist_connector.checkpoint import CheckpointError, identify_bytes, identify_tensors, local_directory
from vllm_datadist_connector.protocol.contract import DUMMY, MAX_SETTING_NAME, MAX_SETTING_VALUE, MAX_SETTINGS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT: Final = frozenset(
    {
        # Names, places and versions; architectures and dtype are compared as vLLM has resolved them.
        *("_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "transformers_weights"),
        *("dtype", "torch_dtype", "tokenizer_class", "id2label", "label2id", "num_labels", "problem_type"),
        *("finetuning_task", "task_specific_params", "prefix", "custom_pipelines", "library_name"),
        # What comes after the KV cache, or only in training.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("begin_suppress_tokens", "suppress_tokens", "generation_config", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "router_aux_loss_coef"),
        *("return_dict_in_generate", "chunk_size_feed_forward", "gradient_checkpointing", "initializer_range"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
        *("final_logit_softcapping", "_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
        # How text is generated, which configurations of older releases list.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    }
)
"""Keys of a transformers configuration, at any depth, that cannot matter for the KV cache."""

_LONG_ROPES: Final = frozenset({"longrope", "su"})

_TENSOR_FORMATS: Final = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "bitsandbytes", "runai_streamer"}
)
"""Load formats that read safetensors files where there are some."""
_OTHER_FILES: Final = {"auto": "*.bin", "hf": "*.bin", "npcache": "*.bin", "pt": "*.pt"}


def software() -> str:
    """Names what decides which settings a configuration lists."""
    # Builds of one release for different devices list the same.
    return f"vllm {vllm.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def settings_of(model_config: ModelConfig) -> dict[str, str]:
    """The model's effective configuration (after --hf-overrides and vLLM's own changes): names of leaves to values."""
    found = {name: _text(value) for name, value in _leaves(model_config.hf_config.to_dict())}
    found["vllm.dtype"] = str(model_config.dtype)
    found["vllm.quantization"] = str(model_config.quantization)
    found["vllm.disable_sliding_window"] = str(bool(getattr(model_config, "disable_sliding_window", False)))
    original = _short_rope_length(model_config.hf_text_config.to_dict())
    if original:
        # vLLM takes the long factors for every token, of any prompt, if its longest prompt needs them.
        found["vllm.uses_long_rope_factors"] = str(model_config.max_model_len > original)
    if len(found) <= MAX_SETTINGS:
        return found
    names = sorted(found)
    rest = {name: found.pop(name) for name in names[MAX_SETTINGS - 1 :]}
    return {**found, "further settings": _text(rest)}


def identify_weights(vllm_config: VllmConfig, given: str) -> str:
    """`scheme:identity`; empty if nothing tells, which is said. Never raises: it must not cost a start.

    Args:
        given: what the operator says that they are, or nothing.
    """
    if given:
        return f"given:{given}"
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    load_format = str(getattr(load_config.load_format, "value", load_config.load_format))
    if load_format == "dummy":
        # Among each other nobody minds what they are: they depend on the sharding.
        return f"{DUMMY}:"
    if remote := getattr(model_config, "model_weights", None):
        return _unknown(f"they come from {remote}")
    try:
        place = local_directory(model_config.model, model_config.revision, load_config.download_dir)
        return _identify_files(place, load_format)
    except Exception as error:
        return _unknown(str(error))


def _unknown(reason: str) -> str:
    logger.warning(
        "weights have no identity (%s): peers cannot tell whether theirs are the same; where they may not be, give"
        " 'weights_id' in kv_connector_extra_config, on both ends the same for the same weights",
        reason,
    )
    return ""


def _identify_files(place: Path, load_format: str) -> str:
    if place.is_file():
        return f"file:{identify_bytes([place])}"
    if load_format in _TENSOR_FORMATS:
        files = set(place.glob("*.safetensors"))
        consolidated = set(place.glob("consolidated*.safetensors"))
        listed = _listed_in(place / "model.safetensors.index.json") if load_format != "mistral" else set()
        # Mistral's own files have other names for the same tensors, and may lie beside the usual ones.
        usual = files & listed or files - consolidated
        if usual and load_format != "mistral":
            return f"tensors:{identify_tensors(usual)}"
        if consolidated:
            return f"consolidated:{identify_tensors(consolidated)}"
    if pattern := _OTHER_FILES.get(load_format):
        return f"files:{identify_bytes(place.glob(pattern))}"
    raise CheckpointError(f"load format {load_format!r}")


def _listed_in(index: Path) -> set[Path]:
    """The files that an index names: others are copies."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return set()
    return {index.parent / name for name in names}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if key in _WITHOUT_EFFECT:
            continue
        if isinstance(value, Mapping) and value and len(name) < MAX_SETTING_NAME // 2:
            yield from _leaves({str(inner): each for inner, each in value.items()}, f"{name}.")
        else:
            yield (name if len(name) <= MAX_SETTING_NAME else _digest(name)), value


def _text(value: Any) -> str:
    """One text for equal values, whole where it is short: 10000 and 10000.0 are the same rope base."""
    text = json.dumps(_canonical(value), sort_keys=True, default=str)
    return text if len(text) <= MAX_SETTING_VALUE else _digest(text)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _canonical(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value


def _digest(text: str) -> str:
    return f"#{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


def _short_rope_length(config: Mapping[str, Any]) -> int:
    """Tokens up to which a rope of two sets of factors uses the short ones; 0 for other ropes."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if (rope.get("rope_type") or rope.get("type")) in _LONG_ROPES:
            name = "original_max_position_embeddings"
            return int(rope.get(name) or config.get(name) or 0)
    return 0
