"""Everything that depends on names: of model families, of their modules and of tensors."""

# Model type -> paths of projections that vLLM does not load in factors: of BLOOM it reorders the rows of every tensor
# that has this name, V's as well; InternVL's vision attention is none of its own linear layers.
STAYS_DENSE = {"bloom": "*.query_key_value", "internvl": "*.vision_tower.*.attention.*"}
# Types of models whose projector is known to be served in factors, as vLLM makes it of its own linear layers; that of
# others stays dense. Each is a row of tests/e2e/vision_models.py.
SERVED_PROJECTORS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
# Read in vLLM 0.32; classes derived from them may do something else, and are left alone.
VLLM_MODELS = "vllm.model_executor.models"
SILU_MLPS = {
    f"{VLLM_MODELS}.{name}"
    for name in (
        *("llama.LlamaMLP", "qwen2.Qwen2MLP", "mistral.MistralMLP", "internlm2.InternLM2MLP", "granite.GraniteMLP"),
        *("qwen2_moe.Qwen2MoeMLP", "deepseek_v2.DeepseekV2MLP", "solar.SolarMLP", "exaone.ExaoneGatedMLP"),
    )
}
# The parts of merged layers by their usual names.
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Models whose fused QKV has the queries, the key and the value of one key/value head after the other, which vLLM
# puts in its own order while it loads tensors with an `output_dim`.
INTERLEAVED_QKV = ("falcon",)
MERGED_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
)
# Ends of names. These are cut by inputs, those below not at all, all others by outputs.
ROW_PARALLEL = (
    *(".o_proj", ".out_proj", ".down_proj", ".c_proj", ".dense", ".dense_4h_to_h", ".fc2", ".w2", ".wo", ".proj"),
    *("_projector.linear_2", ".merger.mlp.2"),
)
REPLICATED = (".modality_projection.proj", ".q_a_proj", ".kv_a_proj_with_mqa")


def may_run_on_side_stream(name: str) -> bool:
    """Whether vLLM may run a layer of this name on a stream of its own, where its collective would meet others', or
    only where tokens choose it."""
    return any(part in name for part in ("shared_expert", "share_expert", "shared_mlp", ".experts."))
