"""Everything that is taken from vLLM, in the sources of every supported version; private names in one place alone."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")

from pgsvd_vllm.families import ACTIVATION, GATE_UP, SILU_MLPS
from pgsvd_vllm.serving.layers.fused_silu import source_hash
from tests.support.vllm_sources import Found, Sources, installed, next_version, nodes, parsed

PACKAGE = ROOT / "pgsvd_vllm"
COMPAT = PACKAGE / "serving" / "vllm_compat"
# vLLM's modules of configuration, platform, collectives, and of the classes that plugins derive from or register.
PUBLIC_MODULES = {
    *("vllm", "vllm.config", "vllm.platforms"),
    *("vllm.distributed.communication_op", "vllm.distributed.parallel_state"),
    *("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding"),
    *("vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.quantization"),
    *("vllm.model_executor.layers.quantization.base_config", "vllm.model_executor.model_loader"),
    "vllm.model_executor.model_loader.default_loader",
}
# Attributes that vLLM does not offer to plugins.
PRIVATE_ATTRIBUTES = {
    *("static_forward_context", "no_compile_layers", "additional_config", "compilation_config", "hf_text_config"),
    *("hf_to_vllm_mapper", "orig_to_new_renaming", "act_fn", "cpu_linear", "handler_tensor", "_C", "__class__"),
    *("_prepare_weights", "_map_global_expert_id_to_local_expert_id", "w13_weight", "w2_weight"),
    *("_set_cudagraph_sizes", "cudagraph_capture_sizes", "cudagraph_mode"),
    *("ckpt_gate_proj_name", "ckpt_up_proj_name", "ckpt_down_proj_name", "stage_name", "forward_cuda"),
}
# What an MLP's forward may use: nothing else sees the gate and up layer's outputs.
OF_AN_MLP = {GATE_UP, ACTIVATION, "down_proj", "w2", "c_proj", "expert_gate"}
LAYERS = "vllm.model_executor.layers"
# Functions and methods that are called, or whose calls by vLLM are answered -> their parameters.
SIGNATURES = {
    f"{LAYERS}.utils:dispatch_cpu_unquantized_gemm": "layer remove_weight",
    "vllm._custom_ops:weight_packed_linear_cpu": "x packed_weight n bias",
    "vllm._custom_ops:onednn_mm": "dnnl_handler x bias",
    "vllm.utils.torch_utils:direct_register_custom_op": (
        "op_name op_func mutates_args fake_impl target_lib dispatch_key tags"
    ),
    "vllm.utils.torch_utils:_encode_layer_name": "layer_name",
    "vllm.utils.torch_utils:_resolve_layer_name": "layer_name",
    "vllm.config:VllmConfig._set_cudagraph_sizes": "self",
    "vllm.config:CUDAGraphMode.mixed_mode": "self",
    "vllm.config:CUDAGraphMode.has_full_cudagraphs": "self",
    "vllm.config:ModelConfig.get_num_attention_heads": "self parallel_config arch_config",
    "vllm.config:ModelConfig.get_head_size": "self",
    "vllm.forward_context:get_forward_context": "",
    "vllm.forward_context:is_forward_context_available": "",
    "vllm.distributed.communication_op:tensor_model_parallel_all_reduce": "input_",
    "vllm.distributed.communication_op:tensor_model_parallel_all_gather": "input_ dim",
    "vllm.distributed.parallel_state:get_tp_group": "",
    "vllm.distributed.parallel_state:get_tensor_model_parallel_world_size": "",
    f"{LAYERS}.linear:split_tensor_along_last_dim": "tensor num_partitions contiguous_split_chunks",
    "vllm.model_executor.model_loader.reload:record_metadata_for_reloading": "model",
    f"{LAYERS}.quantization:register_quantization_config": "quantization",
    "vllm.model_executor.model_loader:register_model_loader": "load_format",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": (
        "self model_name_or_path subfolder revision fall_back_to_pt allow_patterns_overrides"
    ),
    "vllm.model_executor.model_loader.weight_utils:download_safetensors_index_file_from_hf": (
        "model_name_or_path index_file cache_dir subfolder revision"
    ),
    "vllm.distributed.parallel_state:get_world_group": "",
    f"{LAYERS}.quantization.base_config:QuantizationConfig.maybe_update_config": ("self model_name hf_config revision"),
    "vllm.model_executor.models.utils:StageMissingLayer.__init__": "self stage_name module",
    f"{LAYERS}.activation:SiluAndMul.forward_cuda": "self x",
    f"{LAYERS}.activation:SiluAndMul.forward_native": "x",
    f"{LAYERS}.fused_moe:RoutedExperts._map_global_expert_id_to_local_expert_id": "self expert_id",
    f"{LAYERS}.fused_moe:RoutedExperts.weight_loader": (
        "self param loaded_weight weight_name shard_id expert_id return_success"
    ),
}
# Classes -> attributes that are set or read on their instances.
ATTRIBUTES = {
    "vllm.config:VllmConfig": (
        "additional_config compilation_config lora_config load_config parallel_config quant_config model_config "
        "scheduler_config attention_config speculative_config"
    ),
    "vllm.config:CompilationConfig": (
        "static_forward_context mode cudagraph_mode cudagraph_capture_sizes max_cudagraph_capture_size compile_sizes"
    ),
    "vllm.config:CUDAGraphMode": "PIECEWISE",
    "vllm.config:AttentionConfig": "flash_attn_max_num_splits_for_cuda_graph",
    "vllm.config:SchedulerConfig": "max_num_batched_tokens",
    "vllm.config:ParallelConfig": "tensor_parallel_size pipeline_parallel_size",
    "vllm.config:LoadConfig": "load_format download_dir model_loader_extra_config",
    "vllm.config:ModelConfig": "hf_config hf_text_config model revision runner_type",
    "vllm.forward_context:ForwardContext": "no_compile_layers",
    "vllm.distributed.parallel_state:GroupCoordinator": "cpu_group world_size local_rank",
    "vllm.model_executor.models.utils:StageMissingLayer": "stage_name",
    "vllm.model_executor.models.utils:WeightsMapper": "orig_to_new_renaming apply_dict",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader": "enable_weights_track",
    "vllm._custom_ops:CPUDNNLGEMMHandler": "handler_tensor n k",
    f"{LAYERS}.activation:SiluAndMul": "op",
    f"{LAYERS}.linear:LinearBase": "quant_method prefix input_size output_size params_dtype tp_rank tp_size",
    f"{LAYERS}.linear:ColumnParallelLinear": "output_partition_sizes input_size_per_partition bias",
    f"{LAYERS}.linear:QKVParallelLinear": "num_kv_head_replicas total_num_kv_heads total_num_heads head_size",
    f"{LAYERS}.linear:RowParallelLinear": (
        "input_is_parallel reduce_results skip_bias_add return_bias bias input_size_per_partition"
    ),
    f"{LAYERS}.vocab_parallel_embedding:ParallelLMHead": (
        "num_embeddings_per_partition embedding_dim num_embeddings_padded weight_loader quant_method"
    ),
    f"{LAYERS}.fused_moe:RoutedExperts": (
        "ckpt_gate_proj_name ckpt_up_proj_name ckpt_down_proj_name moe_config activation apply_router_weight_on_input"
    ),
    f"{LAYERS}.fused_moe:FusedMoEConfig": (
        "num_logical_experts moe_parallel_config has_bias is_lora_enabled tp_rank tp_size"
    ),
    f"{LAYERS}.fused_moe:FusedMoEParallelConfig": "use_ep",
    f"{LAYERS}.quantization.base_config:QuantizationConfig": "packed_modules_mapping",
}
# Methods whose source is copied -> the hash of the source that was read.
COPIED = {f"{LAYERS}.linear:RowParallelLinear.forward": "6d129f93bbc9ce6e"}


@pytest.fixture(scope="module", params=["installed", "0.33"])
def sources(request: pytest.FixtureRequest) -> Sources:
    if request.param == "installed":
        return Sources(installed())
    try:
        return Sources(next_version())
    except subprocess.CalledProcessError as error:
        pytest.skip(f"vLLM 0.33 cannot be downloaded: {error.stderr[-300:]}")


def private_uses(source: str) -> set[str]:
    """The names private to vLLM that a file touches."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            assert node.module is not None
            private = node.module not in PUBLIC_MODULES
            found |= {alias.name for alias in node.names if private or alias.name.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_ATTRIBUTES:
            found.add(node.value)
    return found


def test_only_vllm_compat_touches_private_names() -> None:
    # hf/ swaps classes of transformers; families.py is the home of names of modules, "act_fn" among them.
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "hf" and path.stem != "families"]
    found = {str(path.relative_to(ROOT)): private_uses(path.read_text(encoding="utf-8")) for path in files}
    found = {path: names for path, names in found.items() if names}
    assert set(found) <= {str(path.relative_to(ROOT)) for path in COMPAT.glob("*.py")}, found
    # The rule sees the names that it is about.
    assert {"_encode_layer_name", "static_forward_context", "_C", "__class__"} <= set().union(*found.values())


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of every `from vllm... import name` of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                yield from ((node.module, alias.name) for alias in node.names)


def defined(file: Path) -> set[str]:
    """The names that a module has, as far as its text tells."""
    names: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # modules that import on demand name their exports
    return names


def test_imported_names_exist(sources: Sources) -> None:
    wanted = set(imports())
    assert len(wanted) > 15
    missing = []
    for module, name in sorted(wanted):
        file = sources.file(module)
        if file is None or (name not in defined(file) and sources.file(f"{module}.{name}") is None):
            missing.append(f"{module}.{name}")
    assert missing == []


def definition(sources: Sources, path: str) -> ast.FunctionDef:
    """A function, or a method of a class or its bases, by `module:name` or `module:Class.name`."""
    module, _, name = path.partition(":")
    first, _, method = name.partition(".")
    found = sources.find(module, first)
    assert found is not None, path
    node = sources.method(found, method) if method else found.node
    assert isinstance(node, ast.FunctionDef), path
    return node


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_those_that_were_read(path: str, sources: Sources) -> None:
    assert parameters(definition(sources, path)) == SIGNATURES[path].split()


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes_set_or_read_exist(path: str, sources: Sources) -> None:
    found = sources.find(*path.split(":"))
    assert found is not None
    assert set(ATTRIBUTES[path].split()) - sources.attributes(found) == set()


@pytest.mark.parametrize("path", COPIED)
def test_copied_sources_are_those_that_were_read(path: str, sources: Sources) -> None:
    assert source_hash(ast.unparse(definition(sources, path))) == COPIED[path]


def derived() -> Iterator[tuple[ast.ClassDef, str, str]]:
    """Our classes, and module and name of each base that is vLLM's, directly or through another class of ours."""
    classes = []
    for path in sorted((PACKAGE / "serving").rglob("*.py")):
        origin = {
            alias.name: node.module or ""
            for node in nodes(path)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
            for alias in node.names
        }
        for ours in parsed(path).body:
            for base in ours.bases if isinstance(ours, ast.ClassDef) else []:
                if isinstance(base, ast.Name) and isinstance(ours, ast.ClassDef):
                    classes.append((ours, base.id, origin.get(base.id)))
    direct = {ours.name: (module, base) for ours, base, module in classes if module is not None}
    for ours, base, module in classes:
        if module is not None:
            yield ours, module, base
        elif base in direct:
            yield ours, *direct[base]


def overrides(sources: Sources) -> Iterator[tuple[str, ast.FunctionDef, ast.FunctionDef]]:
    """Our method and vLLM's of every method that a class of ours overrides."""
    for ours, module, base in derived():
        parent = sources.find(module, base)
        assert isinstance(parent, Found), f"{ours.name}: {base}"
        for method in ours.body:
            theirs = sources.method(parent, method.name) if isinstance(method, ast.FunctionDef) else None
            if theirs is not None and isinstance(method, ast.FunctionDef):
                yield f"{ours.name}.{method.name}", method, theirs


def test_overrides_take_the_arguments_of_vllm(sources: Sources) -> None:
    names, wrong = set(), []
    for name, ours, theirs in overrides(sources):
        names.add(name)
        mine, wanted = parameters(ours), parameters(theirs)
        if ours.args.vararg is not None or theirs.args.vararg is not None or name.endswith(".__init__"):
            continue
        fixed = [one for one in wanted if one in mine or ours.args.kwarg is None]
        if mine[: len(fixed)] != fixed or (theirs.args.kwarg is not None and ours.args.kwarg is None):
            wrong.append(f"{name}{mine}, vLLM's {wanted}")
    assert wrong == []
    known = ("PgsvdLinearMethod.apply", "PgsvdConfig.get_quant_method", "PgsvdModelLoader.load_weights")
    known += ("IndexedLoader._prepare_weights", "PgsvdConfig.maybe_update_config")
    assert {*known, "FactoredMoEMethod.create_weights", "InnerReduceRowParallelLinear.forward"} <= names


@pytest.mark.parametrize("name", sorted(SILU_MLPS))
def test_known_mlps_pass_the_outputs_to_silu_alone(name: str, sources: Sources) -> None:
    module, _, kind = name.rpartition(".")
    forward = definition(sources, f"{module}:{kind}.forward")
    used = [n for n in ast.walk(forward) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"]
    assert {attribute.attr for attribute in used} <= OF_AN_MLP
    assert [attribute.attr for attribute in used].count(ACTIVATION) == 1
    assert source_hash(ast.unparse(forward)) == SILU_MLPS[name]
    found = sources.find(module, kind)
    assert found is not None
    assert {GATE_UP, ACTIVATION} <= sources.attributes(found)
