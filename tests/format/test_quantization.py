"""Quantized matrices in the checkpoint format: packing, values, and what readers refuse."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from pgsvd_vllm.errors import CheckpointError
from pgsvd_vllm.format.lowrank import dequantized, reconstruct
from pgsvd_vllm.format.quantization import FP8, INT8, KNOWN, Scheme, dequantize, int4, pack, parse_scheme, unpack
from pgsvd_vllm.format.reader import check_data, open_checkpoint
from pgsvd_vllm.format.schema import FactoredModule, parse_modules, row_of
from pgsvd_vllm.format.writer import TensorWriter

ROWS, COLUMNS, RANK = 24, 64, 32
SCHEMES = {scheme.key: scheme for scheme in KNOWN}
MODULES = {
    "model.a": FactoredModule(RANK, "factors", schemes={"weight_v": int4(32), "weight_u": int4(32)}),
    "model.b": FactoredModule(8, "pivot", schemes={"weight_p": INT8, "weight_c": INT8}),
    "model.c": FactoredModule(0, "dense", schemes={"weight": FP8}),
    "model.d": FactoredModule(4, "factors", schemes={"weight_v": int4(64)}),
}


def values_of(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random quantized values, the least and the largest among them."""
    low, high = scheme.bounds
    values = torch.randint(int(low), int(high) + 1, (rows, columns), generator=torch.Generator().manual_seed(seed))
    values[0, 0], values[0, 1] = int(low), int(high)
    return values.to(torch.float8_e4m3fn if scheme.type == "float" else torch.int8)


def tensors_of(name: str, module: FactoredModule) -> dict[str, torch.Tensor]:
    """Random stored tensors of a module with a weight [ROWS, COLUMNS]."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, torch.Tensor] = {}
    for suffix, shape in module.shapes(ROWS, COLUMNS).items():
        scheme = module.schemes.get(suffix)
        if suffix == "pivots":
            found[suffix] = torch.arange(1, 2 * shape[0], 2, dtype=torch.int32)
        elif scheme is None:
            found[suffix] = torch.randn(shape, generator=generator).bfloat16()
        else:
            scale = torch.rand(shape[0], scheme.groups(shape[1]), generator=generator) + 0.5
            found[f"{suffix}_packed"] = pack(values_of(scheme, *shape), scheme)
            found[f"{suffix}_scale"] = scale.bfloat16() if scheme.scale_dtype == "BF16" else scale
    return {f"{name}.{suffix}": tensor for suffix, tensor in found.items()}


def config() -> dict[str, Any]:
    section = {
        "quant_method": "pgsvd",
        "version": 2,
        "schemes": {scheme.key: scheme.section() for scheme in KNOWN},
        "modules": {name: row_of(module) for name, module in MODULES.items()},
    }
    return {"architectures": ["LlamaForCausalLM"], "quantization_config": section}


def tensors() -> dict[str, torch.Tensor]:
    return {key: value for name, module in MODULES.items() for key, value in tensors_of(name, module).items()}


def write(folder: Path, stored: dict[str, torch.Tensor], described: dict[str, Any]) -> Path:
    folder.mkdir()
    writer = TensorWriter(folder)
    for name, tensor in stored.items():
        writer.add(name, tensor)
    writer.close()
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def test_a_quantized_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "c", tensors(), config()))
    assert checkpoint.modules == MODULES
    assert checkpoint.shape("model.a") == (ROWS, COLUMNS, RANK)
    assert checkpoint.shape("model.b") == (ROWS, COLUMNS, 8)
    assert checkpoint.shape("model.c") == (ROWS, COLUMNS, 0)
    assert checkpoint.shape("model.d") == (ROWS, COLUMNS, 4)
    check_data(checkpoint)


@pytest.mark.parametrize("scheme", KNOWN, ids=lambda scheme: scheme.key)
def test_schemes_read_back(scheme: Scheme) -> None:
    assert parse_scheme(json.loads(json.dumps(scheme.section())), "config.json") == scheme


@pytest.mark.parametrize("scheme", KNOWN, ids=lambda scheme: scheme.key)
def test_values_read_back(scheme: Scheme) -> None:
    values = values_of(scheme, 6, 128)
    packed = pack(values, scheme)
    shapes = scheme.shapes(6, 128)
    assert packed.shape == shapes["_packed"]
    assert torch.equal(unpack(packed, scheme).double(), values.double())
    if scheme.num_bits == 4:
        assert torch.equal(packed, pack_to_int32(values, 4))
    scale = torch.rand(shapes["_scale"], dtype=torch.float64) + 0.5
    each = scale.repeat_interleave(128 // shapes["_scale"][1], dim=1)
    assert torch.equal(dequantize(values, scale, torch.float64), values.double() * each)


@pytest.mark.parametrize("name", MODULES)
def test_weights_are_those_of_the_dequantized_matrices(name: str) -> None:
    module = MODULES[name]
    stored = {key.rpartition(".")[2]: tensor for key, tensor in tensors_of(name, module).items()}
    matrices: dict[str, torch.Tensor] = {}
    for suffix in module.matrices:
        scheme = module.schemes.get(suffix)
        if scheme is None:
            matrices[suffix] = stored[suffix].double()
            continue
        values, scale = unpack(stored[f"{suffix}_packed"], scheme).double(), stored[f"{suffix}_scale"].double()
        matrices[suffix] = values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    if module.is_dense:
        weight = matrices["weight"]
    elif module.form == "factors":
        weight = matrices["weight_u"] @ matrices["weight_v"]
    else:
        weight = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask[stored["pivots"].long()] = True
        weight[mask], weight[~mask] = matrices["weight_p"], matrices["weight_c"] @ matrices["weight_p"]
    found = reconstruct(dequantized(stored, module.schemes), name=name)
    assert torch.allclose(found, weight, rtol=1e-12, atol=1e-12)


def _without(name: str) -> Any:
    return lambda stored, section: stored.pop(name)


def _cast(name: str, dtype: torch.dtype) -> Any:
    return lambda stored, section: stored.update({name: stored[name].to(dtype)})


def _cut(name: str) -> Any:
    return lambda stored, section: stored.update({name: stored[name][:, :-1].contiguous()})


def _add(name: str) -> Any:
    return lambda stored, section: stored.update({name: torch.ones(2, 2)})


def _set(*path: str, value: Any) -> Any:
    def change(_stored: dict[str, torch.Tensor], section: dict[str, Any]) -> None:
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value

    return change


FAULTS = {
    "no scale": (_without("model.a.weight_v_scale"), "model.a.weight_v_scale is missing"),
    "no values": (_without("model.c.weight_packed"), "model.c.weight_packed is missing"),
    "values of another dtype": (_cast("model.b.weight_p_packed", torch.int32), "I32, not I8"),
    "scale of another dtype": (_cast("model.b.weight_p_scale", torch.bfloat16), "BF16, not F32"),
    "group scale of another dtype": (_cast("model.a.weight_v_scale", torch.float32), "F32, not BF16"),
    "too few scales": (_cut("model.a.weight_v_scale"), "model.a has"),
    "too few values": (_cut("model.b.weight_c_packed"), "model.b has"),
    "a float factor beside": (_add("model.a.weight_v"), "model.a.weight_v belongs to no module"),
    "a dense weight beside": (_add("model.c.weight"), "both model.c.weight"),
    "a scale beside a float factor": (_add("model.d.weight_u_scale"), "model.d.weight_u_scale belongs to no module"),
    "unknown scheme": (_set("schemes", "int8", value={"weights": {"num_bits": 3}}), "unknown quantization"),
    "a zero point": (_set("schemes", "int8", "weights", "symmetric", value=False), "unknown quantization"),
    "no schemes": (_set("schemes", value=None), "schemes is missing"),
    "a scheme that is not listed": (_set("modules", "model.a", "schemes", "weight_v", value="int2"), "int2"),
    "a scheme of no matrix": (_set("modules", "model.b", "schemes", value={"weight_v": "int8"}), "weight_v"),
    "a dense module without scheme": (_set("modules", "model.c", value={"form": "dense"}), "model.c"),
    "groups that do not fit": (_set("modules", "model.d", "schemes", value={"weight_v": "int4-128"}), "64 columns"),
    "a quantized LM head": (_set("head", value="model.a"), "LM heads cannot be"),
    "version 1": (_set("version", value=1), "model.c"),
    "version 3": (_set("version", value=3), "version 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    stored, described = tensors(), copy.deepcopy(config())
    change(stored, described["quantization_config"])
    with pytest.raises(CheckpointError, match=r".") as caught:
        open_checkpoint(write(tmp_path / "c", stored, described))
    assert message in str(caught.value)


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    stored = tensors()
    stored["model.c.weight_scale"][3, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"model\.c\.weight_scale"):
        check_data(open_checkpoint(write(tmp_path / "c", stored, config())))


def test_rows_of_the_table_read_back() -> None:
    section = config()["quantization_config"]
    assert parse_modules(section, "config.json") == MODULES
