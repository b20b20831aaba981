"""The kinds of tiny model: what each is like, how it is made, and what `vllm serve` needs to be told to serve it.

Only making one needs torch and transformers: the table is read by tests and tools that have neither. The sizes are the
smallest that vLLM's CPU build takes (heads of 32 values at least, say) and that two ranks can share out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 512
# More tokens than any test or demo sends; every kind has rotary positions, or none, and needs no table.
MAX_POSITIONS = 32768
# Shorter than the usual prompts of a test, longer than one block of 128 tokens.
SLIDING_WINDOW = 256


@dataclass(frozen=True)
class Kind:
    """One kind of model."""

    make: Callable[[], Any]  # its weights come from torch's generator, which the caller has seeded
    dtype: str = "float32"
    arguments: tuple[str, ...] = ()  # of `vllm serve`, beside the dtype


def common(**settings: Any) -> dict[str, Any]:
    """What all kinds have in common: the vocabulary, and weights large enough for every token to matter."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **settings,
    }


def remember(model: Any) -> Any:
    """Lets recurrent states fade over a thousand tokens, not over ten as by default: the oldest one must matter."""
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            parameter.data.fill_(-7.0)
    return model


def qwen3() -> Any:
    """Dense attention with 4 KV heads, which TP 1, 2 and 4 share out evenly; 8 KiB of float32 KV per token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    make: Any = Qwen3ForCausalLM
    return make(Qwen3Config(**common(head_dim=64)))


def deepseek() -> Any:
    """Latent attention: one KV head of 512 + 64 values, the same on every rank; experts after the first layer."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **common(
            head_dim=64,
            num_key_value_heads=8,
            q_lora_rank=96,
            kv_lora_rank=512,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            topk_method="noaux_tc",  # vLLM loads the routing bias of no other
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            scoring_func="sigmoid",
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
    )
    make: Any = DeepseekV3ForCausalLM
    return make(config)


def gemma3() -> Any:
    """Two layers with a sliding window to one without, twice: three KV cache groups of two layers each."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **common(
            head_dim=64,
            num_hidden_layers=6,
            sliding_window=SLIDING_WINDOW,
            query_pre_attn_scalar=64,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )
    )
    make: Any = Gemma3ForCausalLM
    return make(config)


def gemma4() -> Any:
    """Like gemma3, but the layers without a window have heads of twice the size: blocks of different sizes."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **common(
            head_dim=64,
            global_head_dim=128,
            num_hidden_layers=6,
            sliding_window=SLIDING_WINDOW,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )
    )
    make: Any = Gemma4ForCausalLM
    return make(config)


def gpt_oss() -> Any:
    """Sliding and full attention in turn, with sinks, and experts in every layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **common(
            head_dim=64,
            intermediate_size=256,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )
    make: Any = GptOssForCausalLM
    return make(config)


def qwen3_next() -> Any:
    """Three layers of linear attention (gated delta rule) to one of full attention, and experts in every layer."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **common(
            head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=4,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        )
    )
    make: Any = Qwen3NextForCausalLM
    return remember(make(config))


def falcon_h1() -> Any:
    """Attention and Mamba 2 side by side in every layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **common(
            head_dim=64,
            mamba_d_ssm=512,
            mamba_n_heads=8,
            mamba_d_head=64,
            mamba_n_groups=2,
            mamba_d_state=32,
            mamba_chunk_size=64,
        )
    )
    make: Any = FalconH1ForCausalLM
    return remember(make(config))


def granite_hybrid() -> Any:
    """Three layers of Mamba 2 to one of attention, without positions."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **common(
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size=128,
            shared_intermediate_size=128,
            mamba_n_heads=8,
            mamba_d_head=64,
            mamba_n_groups=2,
            mamba_d_state=32,
            mamba_chunk_size=64,
            layer_types=["mamba", "mamba", "mamba", "attention"],
        )
    )
    make: Any = GraniteMoeHybridForCausalLM
    return remember(make(config))


# The CPU build's own rotary op is wrong for latent attention. A host with AMX would choose another attention, which is
# not exact and has blocks of another size.
LATENT = (
    "--compilation-config",
    '{"custom_ops":["all","-rotary_embedding"]}',
    "--attention-backend",
    "CPU_MLA",
)

# With prefix caching the CPU build's Mamba 2 is asked for states inside the prompt, which it does not keep: IndexError.
MAMBA_2 = ("--no-enable-prefix-caching",)

# In float32 the answer to a prompt does not depend on the batch that it came in, nor on the chunks it was read in.
KINDS = {
    "qwen3": Kind(qwen3),
    "deepseek": Kind(deepseek, arguments=LATENT),
    "gemma3": Kind(gemma3),
    "gemma4": Kind(gemma4),
    "gpt-oss": Kind(gpt_oss),
    "qwen3-next": Kind(qwen3_next, dtype="bfloat16"),  # its kernels take nothing else; near ties are not exact
    "falcon-h1": Kind(falcon_h1, arguments=MAMBA_2),
    "granite-hybrid": Kind(granite_hybrid, arguments=MAMBA_2),
}
