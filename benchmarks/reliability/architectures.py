"""What `compress` does with every architecture of the installed transformers.

    python benchmarks/reliability/architectures.py [--quick] [--json FILE] [TYPE ...]

A tiny random model of every causal language model type is compressed by 20 %, verified, loaded by transformers with
`pgsvd_vllm.hf`, and run. A type passes if that works, or if `compress` refuses it with a reason before it writes
anything. Types of which no set of common sizes builds a tiny model are not counted.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import pgsvd_vllm.hf  # noqa: E402, F401
from benchmarks.reliability.record import Row, at_most, figure, write  # noqa: E402
from pgsvd_vllm.errors import PgsvdError  # noqa: E402
from pgsvd_vllm.format.reader import check_data, open_checkpoint  # noqa: E402
from pgsvd_vllm.offline.calibration.gram import advance  # noqa: E402
from pgsvd_vllm.offline.compress import compress  # noqa: E402
from pgsvd_vllm.offline.model.batch import text_batches  # noqa: E402
from pgsvd_vllm.offline.model.layerwise import LayerStream  # noqa: E402
from pgsvd_vllm.offline.model.source import ModelSource  # noqa: E402
from pgsvd_vllm.offline.options import CompressOptions  # noqa: E402
from tests.conftest import save_tokenizer  # noqa: E402

COMMAND = "python benchmarks/reliability/architectures.py --json docs/reliability/architectures.json"
BAR = "written, or a reason"
REFUSED = "refused"
QUICK = ("llama", "phimoe", "bamba", "jamba", "gemma4_text", "kimi_linear", "olmo_hybrid", "deepseek_v3", "mamba2")
# Relative difference of logits in float32.
SAME = 1e-4
# Parameters of a model that counts as tiny.
TINY = 30_000_000
VOCABULARY = 258
SIZES = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.08},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512},
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "global_head_dim": 32},
}
# Other names of the sizes.
NAMES = {
    **{"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 512, "d_model": 64, "d_ff": 96, "d_kv": 32},
    **{"decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "ffn_dim": 96, "dim_ff": 96, "dff": 96, "n_inner": 96},
    **{"decoder_layers": 4, "encoder_layers": 2, "decoder_attention_heads": 2, "encoder_attention_heads": 2},
    **{"embedding_size": 64, "num_layers": 4, "max_seq_len": 512, "n_layers": 4, "n_heads": 2, "num_kv_heads": 1},
    **{"is_decoder": True, "moe_shared_expert_intermediate_size": 48, "dense_intermediate_size": 96},
}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "n_shared_experts": 1,
    **{"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "expert_ffn_hidden_size": 48, "moe_topk": 2, "zero_expert_num": 1, "top_k": 2},
}
# Latent, linear and recurrent attention.
ATTENTION = {
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
    **{"qk_head_dim": 64, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16},
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    **{"linear_num_heads": 2, "linear_head_dim": 32},
    **{"linear_conv_kernel_dim": 4, "lru_width": 64, "attention_window_size": 32, "sliding_window": 32},
}
STATE_SPACE = {
    **{"mamba_num_heads": 4, "mamba_n_heads": 4, "n_mamba_heads": 2, "num_heads": 4, "mamba_d_head": 32},
    **{"mamba_head_dim": 32, "mamba_headdim": 32, "mamba_d_state": 16, "ssm_state_size": 16, "state_size": 16},
    **{"mamba_n_groups": 1, "n_groups": 1, "mamba_ngroups": 1, "mamba_expand": 2, "expand": 2, "mamba_chunk_size": 16},
    **{"chunk_size": 16, "mamba_d_conv": 4, "mamba_d_ssm": 128, "mamba_dt_rank": 8, "time_step_rank": 8},
}
# Sizes of one type; None leaves one out.
CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1}
OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 8, "n_head": 4, "num_attention_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": CONV,
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "layer_types": None},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
}
HEADS = {"num_key_value_heads": 2, "num_attention_heads": 2}
STEPS = (
    *(SIZES | NAMES | EXPERTS | ATTENTION | STATE_SPACE, SIZES | NAMES | EXPERTS | ATTENTION),
    *(SIZES | EXPERTS | ATTENTION | STATE_SPACE, SIZES | EXPERTS | ATTENTION, SIZES | EXPERTS, SIZES | STATE_SPACE),
    *(SIZES | EXPERTS | ATTENTION | STATE_SPACE | HEADS, SIZES | EXPERTS | ATTENTION | HEADS),
    *(SIZES | ATTENTION, SIZES, SIZES | NAMES | EXPERTS, SIZES | NAMES, NAMES, {"vocab_size": VOCABULARY}),
)


def build(kind: str) -> PreTrainedModel | None:
    """A tiny random model of a type in float32; None if no set of sizes builds one whose forward pass runs."""
    parts = getattr(CONFIG_MAPPING[kind], "sub_configs", {})
    for step in STEPS:
        sizes = {name: value for name, value in (step | OWN.get(kind, {})).items() if value is not None}
        try:
            nested: dict[str, Any] = {"text_config": sizes} if "text_config" in parts else {}
            config = AutoConfig.for_model(kind, **sizes, **nested)
            with torch.device("meta"):
                count = AutoModelForCausalLM.from_config(config).num_parameters()
            if count > TINY:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                model(input_ids=torch.arange(2, 34)[None], **no_cache(model))
            return model
        except Exception:  # classes refuse sizes in many ways; the next set may fit
            continue
    return None


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The arguments of a forward pass without a cache."""
    return {"use_cache": False} if model.can_generate() else {}


def outcome(kind: str, folder: Path) -> tuple[str, bool] | None:
    """What `compress` does with a type, and whether that passes; None if the type has no tiny model."""
    model, out = build(kind), folder / "out"
    if model is None:
        return None
    try:
        model.save_pretrained(folder / "model")
    except Exception as error:  # a fault of transformers, before `compress`
        return f"{REFUSED} by transformers, which cannot save it: {_line(error)}", True
    save_tokenizer(folder / "model")
    options = CompressOptions(
        str(folder / "model"), out, ratio=0.2, num_calibration_samples=16, max_seq_length=64, device="cpu"
    )
    try:
        compress(options)
        check_data(open_checkpoint(out))
    except PgsvdError as error:
        reason = " ".join(str(error).split()).replace(f"{folder}/", "")
        return f"{REFUSED}: {reason}", not (folder / "out.partial").exists()
    except Exception as error:  # the bar: there is none
        return f"internal error: {_line(error)}", False
    try:
        difference = layerwise_difference(model, folder / "model")
        if difference > SAME:
            return f"written, but layer by layer its logits differ by {difference:.1e}", False
        return _run(out)
    except Exception as error:  # the bar: transformers runs what is written
        return f"written, but transformers does not run it: {_line(error)}", False


@torch.no_grad()
def layerwise_difference(model: PreTrainedModel, folder: Path) -> float:
    """Largest difference of the logits if the layers run one by one as in calibration, relative to the largest."""
    ids = torch.arange(2, 34)[None]
    expected = model(input_ids=ids, **no_cache(model)).logits
    source = ModelSource(folder)
    stream = LayerStream(source, text_batches(ids), torch.device("cpu"), torch.float32)
    for index in range(len(source.layers)):
        stream.enter(index, stream.flow)
        list(advance(stream, index, (), collect=False))
    source.load_lm_head(stream.device, stream.dtype)
    found = stream.output(0, stream.flow.kept[0]).logits
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _run(folder: Path) -> tuple[str, bool]:
    """Run a written checkpoint in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finite = bool(torch.isfinite(model(input_ids=torch.arange(2, 34)[None], **no_cache(model)).logits).all())
    factored = len(open_checkpoint(folder).modules)
    return f"{factored} projections factored" if finite else "written, but its logits are not finite", finite


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def summary(rows: list[Row]) -> list[Row]:
    """The numbers of types that were written, refused, and failed."""
    refused = [row for row in rows if row["ok"] and str(row["value"]).startswith(REFUSED)]
    failed = [row for row in rows if not row["ok"]]
    return [
        figure(f"model types tried, of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}", len(rows)),
        figure("written, and run by transformers", len(rows) - len(refused) - len(failed)),
        figure("refused with a reason", len(refused)),
        at_most("internal errors and wrong results", len(failed), 0),
    ]


def main() -> int:
    """Try the types, print, write; the status is 0 where every row passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} types instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows of other types in this file are kept")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kinds = arguments.types or (QUICK if arguments.quick else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    rows: list[Row] = []
    unbuilt: list[str] = []
    for kind in kinds:
        folder = Path(tempfile.mkdtemp())
        try:
            found = outcome(kind, folder)
        finally:
            shutil.rmtree(folder)
        if found is None:
            unbuilt.append(kind)
            continue
        rows.append(Row(case=kind, value=found[0], bar=BAR, ok=found[1]))
        print(f"{'ok  ' if found[1] else 'FAIL'} {kind}: {found[0]}", flush=True)
    print(f"no tiny model: {', '.join(unbuilt) or 'none'}")
    if arguments.json:
        old = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"] if arguments.json.exists() else []
        rows += [row for row in old if row["bar"] == BAR and row["case"] not in kinds]
        write(arguments.json, COMMAND, [*summary(rows), *sorted(rows, key=lambda row: row["case"])])
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
