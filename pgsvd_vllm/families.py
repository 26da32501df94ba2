"""Every table and every test on names: of model families, of their modules and of tensors."""

from enum import Enum
from typing import Literal

Kind = Literal["linear", "expert", "lm_head"]
# Dual encoders that vLLM serves: the class of their whole model in transformers.
DUAL_ENCODERS = ("CLIPModel", "SiglipModel")
# Part of the name of every MoE expert's projections.
EXPERTS = ".experts."
# Patterns of transformers' rules for stacking experts: a tensor of any expert, of the first one, and the parameters of
# a module that has stacked them.
ONE_EXPERT, FIRST_EXPERT = r"experts\.\*\.(\w+)\.weight$", r"experts\.0\.{leaf}\."
STACKED_EXPERTS = {"gate_up_proj", "down_proj"}
# Model type -> paths of projections that vLLM does not load in factors: for BLOOM it reorders the rows of every tensor
# of this name, V's as well; InternVL's vision attention does not use vLLM's linear layers.
STAYS_DENSE = {"bloom": "*.query_key_value", "internvl": "*.vision_tower.*.attention.*"}
# Model types whose projector vLLM builds from its own linear layers; the projector of other types stays dense. Each
# type is a row of tests/e2e/vision_models.py.
SERVED_PROJECTORS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
# Model types with a row in docs/models.md, whose tests compress, serve and compare them.
TESTED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "granite", "stablelm"),
    *("cohere", "starcoder2", "smollm3", "glm4", "opt", "gpt2", "gpt_bigcode", "gpt_neox", "falcon", "bloom"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "ministral3", "olmo3", "exaone4", "seed_oss"),
    *("ernie4_5", "hunyuan_v1_dense", "gpt_oss", "gemma4_text", "deepseek_v3", "apertus", "glm4_moe", "lfm2"),
    *("nemotron_h", "granitemoehybrid", "falcon_h1", "qwen3_next", "qwen3_5_text"),
    *("clip", "siglip", "llava", "llava_next", "llava_onevision", "internvl", "mistral3", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "qwen3_5", "idefics3", "smolvlm", "gemma3"),
)
# The merged gate and up layer and the activation in the MLPs of vLLM's models.
GATE_UP, ACTIVATION = "gate_up_proj", "act_fn"
# vLLM's MLPs whose forward passes the gate and up layer's output to the activation and to nothing else -> the hash of
# that forward (`serving.layers.fused_silu.source_hash`), read in vLLM 0.32 and 0.33, where it is the same.
SILU_MLPS = {
    "vllm.model_executor.models.llama.LlamaMLP": "372698f456c565a1",
    "vllm.model_executor.models.qwen2.Qwen2MLP": "ed8f76673b96ed75",
    "vllm.model_executor.models.mistral.MistralMLP": "fac73f565ecc23b4",
    "vllm.model_executor.models.internlm2.InternLM2MLP": "830ac8d59ce18837",
    "vllm.model_executor.models.granite.GraniteMLP": "ed8f76673b96ed75",
    "vllm.model_executor.models.qwen2_moe.Qwen2MoeMLP": "bfdd0a984a5ccabc",
    "vllm.model_executor.models.deepseek_v2.DeepseekV2MLP": "ed8f76673b96ed75",
    "vllm.model_executor.models.solar.SolarMLP": "ed8f76673b96ed75",
    "vllm.model_executor.models.exaone.ExaoneGatedMLP": "fd2e384250436e49",
}
# The parts of merged layers by their usual names.
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], GATE_UP: ["gate_proj", "up_proj"]}
# Checkpoint modules that stand for several partitions of vLLM's merged layer -> how many: Qwen3.5's gated delta nets.
PARTITIONS = {"in_proj_qkv": 3}
# Model types whose fused QKV interleaves queries, key and value by key/value head; vLLM reorders the rows of tensors
# with an `output_dim` while it loads them.
INTERLEAVED_QKV = ("falcon",)
MERGED_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
# Endings of the names of row-parallel layers and of replicated ones; all others are column-parallel.
ROW_PARALLEL = (
    *(".o_proj", ".out_proj", ".down_proj", ".c_proj", ".dense", ".dense_4h_to_h", ".fc2", ".w2", ".wo", ".proj"),
    *("_projector.linear_2", ".merger.mlp.2"),
)
REPLICATED = (".modality_projection.proj", ".q_a_proj", ".kv_a_proj_with_mqa")
# Parts of the names of layers that vLLM may run on a stream of their own, or on the tokens that choose them alone.
SIDE_STREAM = ("shared_expert", "share_expert", "shared_mlp", EXPERTS)


class Split(Enum):
    """The dimension of a linear layer that vLLM shards over tensor-parallel ranks."""

    NONE = "replicated"
    OUTPUTS = "column-parallel"
    INPUTS = "row-parallel"


def module_kind(name: str, lm_head: str | None) -> Kind:
    """The kind of a module of a checkpoint; `lm_head` is the name of the factored LM head, if there is one."""
    if name == lm_head:
        return "lm_head"
    return "expert" if EXPERTS in name else "linear"


def split_of(name: str) -> Split:
    """How vLLM shards a layer of this name."""
    dotted = f".{name}"
    if dotted.endswith(REPLICATED):
        return Split.NONE
    return Split.INPUTS if dotted.endswith(ROW_PARALLEL) else Split.OUTPUTS


def may_run_on_side_stream(name: str) -> bool:
    """Whether a collective in a layer of this name might meet another layer's."""
    return any(part in name for part in SIDE_STREAM)
