"""One tiny random model per architecture that works; a row is a test and a line of docs/models.md."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 258
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.08}
SIZES = COMMON | {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = SIZES | {"intermediate_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 512}
HEADS = GQA | {"head_dim": 32}
GEMMA = HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 16}
GPT2 = COMMON | {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

LATENT = {
    **{"num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32},
    **{"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
STATES = {
    **{"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4},
    **{"mamba_chunk_size": 16},
}
LINEAR_ATTENTION = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
BF16 = {"dtype": "bfloat16"}  # vLLM's CPU kernel for gated delta nets takes nothing else


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        name: what people call the models.
        config: class of transformers.
        options: its arguments.
        note: its particularity, for docs/models.md.
        core: whether `make test` tests it; `make test-all` tests them all.
        dense: leaf names of projections that stay dense.
        like_transformers: whether vLLM's tokens of the dense model are those of transformers; where they are not,
            factored models are compared with the reconstructed dense model in vLLM.
        experts: whether it is an MoE model, whose experts are compressed as well.
        engine: options of vLLM's engine: those that its float32 needs, or another dtype.
    """

    name: str
    config: str
    options: dict[str, Any]
    note: str = ""
    core: bool = False
    dense: frozenset[str] = field(default_factory=frozenset)
    like_transformers: bool = True
    experts: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = (
    Architecture("Llama 2, 3", "LlamaConfig", GQA | {"rope_theta": 500000.0}),
    Architecture("Mistral", "MistralConfig", GQA | {"sliding_window": 16}, "sliding window", core=True),
    Architecture("Qwen2, Qwen2.5", "Qwen2Config", GQA, "biases"),
    Architecture("Qwen3", "Qwen3Config", HEADS, "query and key norms"),
    Architecture("Gemma 2", "Gemma2Config", GEMMA, "soft caps"),
    Architecture("Gemma 3, text", "Gemma3TextConfig", GEMMA, "sliding and global attention layers"),
    Architecture("Phi-1, Phi-2", "PhiConfig", GQA, "parallel attention and MLP"),
    Architecture("Phi-3, Phi-4", "Phi3Config", GQA, "fused QKV, and fused gate and up", core=True),
    Architecture("OLMo 2", "Olmo2Config", GQA),
    Architecture("Granite", "GraniteConfig", GQA),
    Architecture("StableLM", "StableLmConfig", GQA),
    Architecture("Cohere Command R", "CohereConfig", GQA),
    Architecture("StarCoder 2", "Starcoder2Config", GQA),
    Architecture("SmolLM3", "SmolLM3Config", GQA),
    Architecture("GLM-4", "Glm4Config", HEADS, "fused gate and up"),
    Architecture(
        "OPT",
        "OPTConfig",
        SIZES | {"ffn_dim": 320, "max_position_embeddings": 512, "word_embed_proj_dim": 128},
    ),
    Architecture("GPT-2", "GPT2Config", GPT2, "transposed weights", core=True),
    Architecture("GPT-BigCode, StarCoder", "GPTBigCodeConfig", GPT2, "multi-query attention"),
    Architecture(
        "GPT-NeoX, Pythia",
        "GPTNeoXConfig",
        SIZES | {"intermediate_size": 320, "max_position_embeddings": 512},
        "fused QKV, interleaved by head",
    ),
    Architecture(
        "Falcon",
        "FalconConfig",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        "fused QKV, interleaved by group",
        core=True,
    ),
    Architecture(
        "BLOOM",
        "BloomConfig",
        COMMON | {"hidden_size": 128, "n_layer": 3, "n_head": 4},
        "fused QKV stays dense: vLLM reorders every tensor of that name",
        dense=frozenset({"query_key_value"}),
    ),
    Architecture(
        "Mixtral",
        "MixtralConfig",
        GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "experts with `--include experts`",
        core=True,
        experts=True,
    ),
    Architecture(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        GQA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 128},
        "experts with `--include experts`, the shared one without",
        experts=True,
    ),
    Architecture(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        HEADS | EXPERTS | {"num_experts": 4},
        "experts with `--include experts`",
        experts=True,
    ),
    Architecture(
        "DeepSeek-V2, V2-Lite",
        "DeepseekV2Config",
        GQA
        | EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
        },
        "latent attention; vLLM gets a dense kv_b_proj; experts with `--include experts`",
        core=True,
        experts=True,
        like_transformers=False,
        # On processors with AMX vLLM's default backend takes no float32.
        engine={"attention_backend": "CPU_MLA"},
    ),
    Architecture("Ministral 3", "Ministral3Config", HEADS),
    Architecture("OLMo 3", "Olmo3Config", GQA | {"sliding_window": 16}, "sliding and global attention layers"),
    Architecture("EXAONE 4", "Exaone4Config", GQA | {"sliding_window": 16}, "sliding and global attention layers"),
    Architecture("Seed-OSS", "SeedOssConfig", HEADS, "biases"),
    Architecture("ERNIE 4.5", "Ernie4_5Config", HEADS, core=True),
    Architecture("Hunyuan, dense", "HunYuanDenseV1Config", HEADS, "query and key norms"),
    Architecture(
        "gpt-oss",
        "GptOssConfig",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
        "attention; its experts stay dense",
    ),
    Architecture(
        "Gemma 4, text",
        "Gemma4TextConfig",
        HEADS
        | {"global_head_dim": 32, "sliding_window": 16, "vocab_size_per_layer_input": VOCABULARY}
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        "without layers that share keys and values",
    ),
    Architecture(
        "DeepSeek-V3",
        "DeepseekV3Config",
        GQA | EXPERTS | LATENT | {"q_lora_rank": 64},
        "latent attention; vLLM gets a dense kv_b_proj; experts with `--include experts`",
        experts=True,
        like_transformers=False,
        engine={"attention_backend": "CPU_MLA"},
    ),
    Architecture("Apertus", "ApertusConfig", GQA, "MLP without a gate"),
    Architecture(
        "GLM-4.5 MoE",
        "Glm4MoeConfig",
        HEADS
        | EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "experts with `--include experts`, the shared one without",
        experts=True,
    ),
    Architecture(
        "LFM2",
        "Lfm2Config",
        GQA
        | {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
        # vLLM reads these; published configurations have them.
        | {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 320, "block_multiple_of": 64}
        | {"block_ffn_dim_multiplier": 1.0},
        "short convolutions",
        like_transformers=False,
    ),
    Architecture(
        "Nemotron-H",
        "NemotronHConfig",
        HEADS
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "expand": 2}
        | {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
        "state-space layers",
    ),
    Architecture(
        "Granite 4, hybrid",
        "GraniteMoeHybridConfig",
        GQA
        | STATES
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 320, "num_local_experts": 0}
        | {"mamba_expand": 2, "position_embedding_type": "nope"},
        "state-space layers",
    ),
    Architecture("Falcon-H1", "FalconH1Config", GQA | STATES | {"mamba_d_ssm": 256}, "attention beside state spaces"),
    Architecture(
        "Qwen3-Next",
        "Qwen3NextConfig",
        HEADS | EXPERTS | LINEAR_ATTENTION | {"num_experts": 4, "shared_expert_intermediate_size": 64},
        "linear and full attention layers; experts with `--include experts`",
        experts=True,
        engine=BF16,
    ),
    Architecture(
        "Qwen3.5, text", "Qwen3_5TextConfig", HEADS | LINEAR_ATTENTION, "linear and full attention layers", engine=BF16
    ),
)


def save_model(architecture: Architecture, folder: Path) -> Path:
    """A random model in float32 with a byte tokenizer."""
    import transformers

    from tests.conftest import save_tokenizer

    assert save_tokenizer(folder) == VOCABULARY
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.options)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder
