"""Models with random weights in the shape of TinyLlama-1.1B or Llama-2-7B, dense and factored, for speed benchmarks.

    python benchmarks/random_model.py [FORM RATIO]    e.g. pivot 0.4

Random weights have no structure that could determine ranks, so the ranks come from a real model: kept_shares.json holds
the percentage of parameters that the planner keeps of every projection of SmolLM2-135M-Instruct, calibrated as in
benchmarks/quality.py (26 November 2026). Each projection here gets the rank that keeps the share of the projection at
the same relative depth. Folders are created once in the user's cache.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pgsvd_vllm
from pgsvd_vllm.format.schema import FORMAT_VERSION, LOAD_GUARD, QUANT_METHOD, FactoredModule, stored_size
from pgsvd_vllm.format.writer import TensorWriter
from pgsvd_vllm.offline.ranks.stored import RANK_MULTIPLE
from tests.support.reference_model import cache_folder


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    max_position_embeddings: int = 2048

    @property
    def config(self) -> dict[str, int]:
        """The sizes by transformers' names."""
        return {name: value for name, value in vars(self).items() if name != "name"}


TINYLLAMA = Shape("tinyllama", 2048, 5632, 22, 32, 4)
LLAMA_2_7B = Shape("llama-2-7b", 4096, 11008, 32, 32, 32)
SHARES = Path(__file__).with_name("kept_shares.json")


def projections(shape: Shape = TINYLLAMA) -> Iterator[tuple[str, str, float, int, int]]:
    """Name, kind, relative depth, outputs and inputs of every projection."""
    hidden, wide, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    key = hidden // shape.num_attention_heads * shape.num_key_value_heads
    shapes = {"q_proj": (hidden, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, hidden)}
    shapes |= {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    for layer in range(layers):
        for kind, (rows, columns) in shapes.items():
            block = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            yield f"model.layers.{layer}.{block}.{kind}", kind, layer / max(layers - 1, 1), rows, columns


def modules(form: str, ratio: float, shape: Shape = TINYLLAMA) -> dict[str, FactoredModule]:
    """The module table: ranks that keep the shares of SHARES."""
    shares = json.loads(SHARES.read_text(encoding="utf-8"))[form][str(ratio)]
    table = {}
    for name, kind, depth, rows, columns in projections(shape):
        share = shares[kind][round(depth * (len(shares[kind]) - 1))] / 100
        rank = largest_rank(form, rows, columns, share)
        if share < 1 and rank:
            table[name] = FactoredModule(rank, form)
    return table


def largest_rank(form: str, rows: int, columns: int, share: float) -> int:
    """The largest multiple of RANK_MULTIPLE that keeps at most a share of a matrix's parameters; 0 if none does."""
    ranks = range(RANK_MULTIPLE, min(rows, columns), RANK_MULTIPLE)
    fitting = (rank for rank in ranks if stored_size(form, rows, columns, rank) <= share * rows * columns)
    return max(fitting, default=0)


def tensors(table: dict[str, FactoredModule], shape: Shape = TINYLLAMA) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model, bf16, of a size that keeps activations near 1."""
    # A GPU is much faster at it.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, order = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        spread = (3 / size[1]) ** 0.5
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        return made.uniform_(-spread, spread, generator=generator).cpu()

    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    yield "model.embed_tokens.weight", random(vocabulary, hidden)
    yield "lm_head.weight", random(vocabulary, hidden)
    for name, _, _, rows, columns in projections(shape):
        module = table.get(name)
        shapes = {"weight": (rows, columns)} if module is None else module.shapes(rows, columns)
        for suffix, size in shapes.items():
            if suffix == "pivots":
                yield f"{name}.pivots", torch.randperm(rows, generator=order)[: size[0]].sort().values.int()
            else:
                yield f"{name}.{suffix}", random(*size)
    for layer in range(shape.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)


def folder(form: str = "dense", ratio: float = 0.0, shape: Shape = TINYLLAMA) -> Path:
    """The model in a form, made on the first call."""
    table = {} if form == "dense" else modules(form, ratio, shape)
    # Other ranks or another shape are another folder.
    content = json.dumps([shape.config, {name: module.rank for name, module in table.items()}])
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    target = cache_folder() / f"{shape.name}-{form}-{ratio}-{digest}"
    if target.is_dir():
        return target
    unfinished = target.with_name(f"{target.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = LlamaConfig(**shape.config, dtype="bfloat16", architectures=["LlamaForCausalLM"]).to_dict()
    if table:
        writer = TensorWriter(unfinished)
        for name, tensor in tensors(table, shape):
            writer.add(name, tensor)
        writer.close()
        config["transformers_weights"] = LOAD_GUARD
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "modules": {name: {"rank": m.rank, "form": m.form} for name, m in table.items()},
            "tensors": writer.count,
            "method": "random",
            "tolerance": {},
            "base_model": "random",
            "calibration": {"name": "none", "tokens": 0},
            "tool_version": pgsvd_vllm.__version__,
            "command": "benchmarks/random_model.py",
        }
    else:
        save_file(dict(tensors({}, shape)), unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(shape.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(unfinished)
    unfinished.rename(target)
    return target


if __name__ == "__main__":
    print(folder(sys.argv[1], float(sys.argv[2])) if len(sys.argv) > 2 else folder())
