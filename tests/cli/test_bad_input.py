"""Invalid input of every kind: exit status 2, one line that names the fault, and no files left."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgsvd_vllm.cli import main
from tests.cli.refusal import FAST, Refusal, listing, the_line
from tests.conftest import run_cli, save_tiny_model


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test damages."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(folder: Path, **change: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- in a process of its own -------------------------------------------------------------------------


def test_cli_process_reports_truncated_weights(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    done = run_cli("compress", model, "-o", tmp_path / "out", "--ratio", "0.2")
    line = the_line(done.returncode, done.stderr)
    assert str(file) in line
    assert "truncated" in line
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_cli_process_reports_a_nan_weight(model: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(model, lambda t: t[name][5, 7].fill_(float("nan")))
    done = run_cli("compress", model, "-o", tmp_path / "out", *FAST)
    line = the_line(done.returncode, done.stderr)
    assert name in line
    assert "model.safetensors" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_cli_process_reports_an_unknown_option() -> None:
    done = run_cli("compress", "x", "-o", "y", "--rank", "3")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pgsvd-vllm")
    assert done.stderr.splitlines()[-1].endswith("error: unrecognized arguments: --rank 3")
    assert "Traceback" not in done.stderr


def test_cli_process_survives_a_closed_pipe(tiny_compressed: Path) -> None:
    code = "import sys; from pgsvd_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code, "inspect", str(tiny_compressed)]
    # With Python's buffer, which is longer than the text.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd="/", env=env, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# -- the model --------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused(refused: Refusal, tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "./absent", "a/b/c", __file__, "x" * 300, "no-such/model"):
        refused(name, culprits=(f"MODEL {name}: ",))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, culprits=(str(empty), "config.json"))


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BertForSequenceClassification", "ViTModel"])
def test_an_unsupported_architecture_is_refused(refused: Refusal, model: Path, name: str) -> None:
    edit_config(model, architectures=[name], model_type=name.partition("F")[0].lower())
    refused(model, culprits=(name, "config.json", "causal"))


@pytest.mark.parametrize("value", [None, [], "", {}, [1], [None], 5, "LlamaForCausalLM"])
def test_a_malformed_architecture_is_refused(refused: Refusal, model: Path, value: object) -> None:
    edit_config(model, architectures=value)
    refused(model, culprits=("config.json", "architecture"))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "nonsense"},
        {"hidden_size": "many"},
        {"hidden_size": 127},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 4},
        {"intermediate_size": 321},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_weights_is_refused(
    refused: Refusal, model: Path, change: dict[str, object]
) -> None:
    edit_config(model, **change)
    refused(model, culprits=(str(model),))


def test_a_config_that_is_not_a_json_object_is_refused(refused: Refusal, model: Path) -> None:
    for text in ("", "[]", "{", "[" * 100_000):
        (model / "config.json").write_text(text)
        refused(model, culprits=(str(model / "config.json"),))


@pytest.mark.parametrize("section", [{"quant_method": "awq"}, {"quant_method": "pgsvd"}, {}, [], "x", 1])
def test_a_quantized_model_is_refused(refused: Refusal, model: Path, section: object) -> None:
    edit_config(model, quantization_config=section)
    refused(model, culprits=(str(model), "already compressed or quantized"))


def test_a_null_quantization_section_is_accepted(model: Path, tmp_path: Path) -> None:
    edit_config(model, quantization_config=None)
    assert main(["compress", str(model), "-o", str(tmp_path / "out"), "--dry-run", *FAST]) == 0


def test_a_compressed_model_is_refused(refused: Refusal, tiny_compressed: Path) -> None:
    refused(tiny_compressed, culprits=(str(tiny_compressed), "already compressed", "pgsvd"))


def test_other_weight_formats_are_refused(refused: Refusal, model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(model, culprits=(str(model), ".bin", "save_pretrained"))


def test_garbage_weights_are_refused(refused: Refusal, model: Path) -> None:
    for content in (b"", b"garbage", b"\0" * 100):
        (model / "model.safetensors").write_bytes(content)
        refused(model, culprits=(str(model / "model.safetensors"),))


def test_an_index_with_a_missing_shard_is_refused(refused: Refusal, model: Path) -> None:
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(model, culprits=(str(model / "model-00001-of-00001.safetensors"),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_are_not_finite_are_refused(refused: Refusal, model: Path, name: str, value: float) -> None:
    edit_tensors(model, lambda t: t[name][3, 3].fill_(value))
    refused(model, culprits=(name, str(model / "model.safetensors"), "NaN or infinity"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_or_misshapen_tensor_is_refused(refused: Refusal, model: Path, name: str) -> None:
    assert name in load_file(model / "model.safetensors")
    edit_tensors(model, lambda t: t.update({name: t[name][:-1].clone()}))
    refused(model, culprits=(name,))
    edit_tensors(model, lambda t: t.pop(name))
    refused(model, culprits=(name, "missing"))


def test_a_missing_or_misshapen_lm_head_is_refused(refused: Refusal, tmp_path: Path) -> None:
    # The LM head takes no part in calibration, but a missing one must still be an error.
    model = save_tiny_model(tmp_path / "model", tie=False, layers=1)
    edit_tensors(model, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :-1].clone()}))
    refused(model, culprits=("lm_head.weight", "(258, 127)"))
    edit_tensors(model, lambda t: t.pop("lm_head.weight"))
    refused(model, culprits=("lm_head.weight", "missing"))


# -- the tokenizer and the text ----------------------------------------------------------------------


def test_a_missing_tokenizer_is_refused(refused: Refusal, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(model, culprits=(str(model), "tokenizer"))


@pytest.mark.parametrize("content", ["", "{}", "[]", "nonsense"])
def test_a_broken_tokenizer_is_refused(refused: Refusal, model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    refused(model, culprits=(str(model), "tokenizer"))


def test_a_tokenizer_of_another_model_is_refused(refused: Refusal, model: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:50].clone()

    edit_tensors(model, shrink)
    edit_config(model, vocab_size=50)
    refused(model, culprits=(str(model), "50 embeddings", "tokenizer"))


def test_too_little_calibration_text_is_refused(refused: Refusal, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Three lines\nare not enough\nto calibrate on.\n")
    refused(tiny_model, "--dataset", text, culprits=("--dataset", str(text), "too little"))
    # Enough for one window, but fewer tokens than a projection has inputs.
    refused(tiny_model, "--dataset", text, "--max-seq-length", "16", culprits=(str(text), "320 inputs"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", b'{"body": "no text"}\n'),
        ("data.jsonl", b"not json\n"),
        ("data.jsonl", b""),
        ("data.jsonl", b'{"text": ""}\n'),
        ("data.txt", b""),
        ("data.txt", b"\xff\xfe\x00"),
    ],
)
def test_malformed_calibration_text_is_refused(
    refused: Refusal, tiny_model: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(tiny_model, "--dataset", path, culprits=("--dataset", str(path)))


def test_an_unknown_dataset_is_refused(refused: Refusal, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("wikitext-103", tmp_path / "absent.jsonl", tmp_path, "x" * 300):
        refused(tiny_model, "--dataset", name, culprits=(f"--dataset {name}", "python-docs"))


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "nan", "inf"])
@pytest.mark.parametrize("option", ["--ratio", "--tolerance"])
def test_a_share_out_of_range_is_refused(refused: Refusal, tiny_model: Path, option: str, value: str) -> None:
    refused(tiny_model, f"{option}={value}", culprits=(option, "between 0 and 1"))


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--num-calibration-samples", "0"], "--num-calibration-samples 0"),
        (["--max-seq-length", "-5"], "--max-seq-length -5"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--device", ""], "--device"),
        (["--ignore", "*.no_proj"], "--ignore *.no_proj"),
        (["--ignore", "*"], "--ignore"),
        (["--refine", "-2"], "--refine -2"),
        (["--refine", "0k"], "--refine 0 tokens"),
        (["--refine", "inf"], "--refine inf"),
        (["--baseline", "svd", "--sensitivity", "uniform"], "--baseline"),
        (["--baseline", "asvd", "--tolerance", "0.2"], "--baseline"),
    ],
)
def test_invalid_option_values_are_refused(
    refused: Refusal, tiny_model: Path, options: list[str], culprit: str
) -> None:
    refused(tiny_model, *options, culprits=(culprit,))


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--ratio", "abc"], "--ratio"),
        (["--ratio", "0.2", "--tolerance", "0.1"], "--tolerance"),
        (["--dtype", "int8"], "--dtype"),
        (["--refine", "long"], "--refine"),
        (["--refine", "infk"], "--refine"),
        (["--refine", "nanM"], "--refine"),
        (["--baseline", "gptq"], "--baseline"),
        (["--form", "cores"], "--form"),
        (["--frobnicate"], "--frobnicate"),
        (["--num-calibration-samples", "many"], "--num-calibration-samples"),
    ],
)
def test_argparse_refuses_invalid_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], culprit: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compress", "model", "-o", str(tmp_path / "out"), *options])
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert errors.startswith("usage:")
    assert "error:" in errors.splitlines()[-1]
    assert culprit in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["compress"], ["compress", "model"], ["explode"], ["inspect"]])
def test_argparse_refuses_incomplete_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: pgsvd-vllm")


# -- the output --------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_unchanged(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tiny_compressed: Path, tmp_path: Path
) -> None:
    full, empty, file, link = (tmp_path / n for n in ("full", "empty", "file", "link"))
    full.mkdir()
    (full / "precious").write_text("x")
    empty.mkdir()
    file.write_text("y")
    link.symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for output in (full, empty, file, link, tiny_compressed, Path("/"), Path(".")):
        line = the_line(main(["compress", str(tiny_model), "-o", str(output)]), capsys.readouterr().err)
        assert f"--output-dir {output}: already exists" in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize("value", ["", " ", "\n"])
@pytest.mark.parametrize("option", ["-o", "--output-dir", "--calibration", "--dataset", "--ignore"])
def test_an_empty_argument_is_refused(refused: Refusal, tiny_model: Path, option: str, value: str) -> None:
    refused(tiny_model, option, value, culprits=(f"{option}: is empty",))
    if option.startswith("--"):
        refused(tiny_model, f"{option}={value}", culprits=(f"{option}: is empty",))


@pytest.mark.parametrize("command", ["inspect", "verify", "tune", "profile"])
def test_other_commands_refuse_an_empty_folder(
    capsys: pytest.CaptureFixture[str], tiny_compressed: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tiny_compressed)  # the folder of an empty name
    options = ["-o", "file"] if command == "profile" else []
    line = the_line(main([command, "", *options]), capsys.readouterr().err)
    assert line.endswith("MODEL or DIR: is empty; give it a value")


def test_an_empty_latency_table_is_refused(refused: Refusal, tiny_model: Path) -> None:
    refused(tiny_model, "--objective", "latency", "--costs", "", culprits=("--costs", "is empty"))


def test_an_empty_model_name_is_refused(refused: Refusal, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model)  # the folder of an empty name
    for name in ("", " "):
        refused(name, culprits=("MODEL", "is empty"))


def test_an_output_inside_the_model_is_refused(refused: Refusal, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(model)
    for name in ("out", "a/b/out", "../model/out", "a/../out"):
        refused(model, "-o", model / name, culprits=("--output-dir", "inside MODEL", str(model)))
        refused(model, "--calibration", model / name, culprits=("--calibration", "inside MODEL"))
    link = model.with_name("link")
    link.symlink_to(model)
    refused(link, "-o", model / "out", culprits=("--output-dir", "inside MODEL"))
    monkeypatch.chdir(model)
    refused(".", "-o", "out", culprits=("--output-dir out", "inside MODEL ."))
    for output in (model, Path("."), model.parent, Path("/"), model.parent / "absent" / ".."):
        line = refused(model, "-o", output, culprits=("already exists", "choose another folder"))
        assert "remove" not in line  # the model would be lost
    assert listing(model) == before


@pytest.mark.parametrize("name", ["out", "out/calibration", "out.partial", "out.partial/layers"])
def test_a_calibration_folder_in_the_outputs_way_is_refused(refused: Refusal, tiny_model: Path, name: str) -> None:
    refused(tiny_model, "--calibration", refused.folder / name, culprits=("--calibration", "choose another"))


def test_a_companion_that_cannot_be_copied_is_refused(refused: Refusal, model: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to("/etc/hostname")
    refused(model, culprits=(str(model / "generation_config.json"), "link", "put the file itself there"))


def test_an_unwritable_output_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    outputs = ["/proc/nothing/out", "/sys/x", str(tmp_path / "file" / "out"), str(tmp_path / ("x" * 250))]
    for output in outputs:
        line = the_line(main(["compress", str(tiny_model), "-o", output, *FAST]), capsys.readouterr().err)
        assert f"--output-dir {output}: cannot be written" in line
        folder = f"{output}{'x' * 6}"  # DIR.partial has a longer name than DIR
        arguments = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--calibration", folder, *FAST]
        line = the_line(main(arguments), capsys.readouterr().err)
        assert f"--calibration {folder}: cannot be written" in line
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_lm_head_that_is_not_finite_leaves_no_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # The LM head takes no part in calibration: all tensors are read before it begins.
    folder = save_tiny_model(tmp_path / "model", tie=False, layers=1)
    edit_tensors(folder, lambda t: t["lm_head.weight"][0, 0].fill_(float("nan")))
    line = the_line(main(["compress", str(folder), "-o", str(tmp_path / "out"), *FAST]), capsys.readouterr().err)
    assert "lm_head.weight" in line
    assert "--resume" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
