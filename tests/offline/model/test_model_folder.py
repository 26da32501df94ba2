"""Folders that hold no dense safetensors model: one line that says what they hold and what to do."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pgsvd_vllm.errors import InputError, PgsvdError
from pgsvd_vllm.offline.model.hub import resolve_folder
from pgsvd_vllm.offline.model.source import ModelSource

LLAMA = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BASE = json.dumps({"base_model_name_or_path": "someone/base"})


def make(folder: Path, files: dict[str, str]) -> Path:
    """Write files, which may lie in folders of their own."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def message(folder: Path, files: dict[str, str]) -> str:
    """The message of the error that a folder of these files raises; it names the folder and is short."""
    with pytest.raises(PgsvdError) as caught:
        ModelSource(make(folder, files))
    text = str(caught.value)
    assert str(folder) in text
    assert len(text.replace(str(folder), "")) < 400
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("files", "culprits"),
    [
        (["adapter_model.safetensors"], ["adapter", "someone/base", "merge_and_unload"]),
        (["model-Q4_K_M.gguf"], ["GGUF", "gguf_file"]),
        (["pytorch_model.bin"], ["pytorch_model.bin", "save_pretrained"]),
        (["pytorch_model-00001-of-00002.bin"], [".bin", "save_pretrained"]),
        (["model_index.json", "text_encoder/config.json"], ["diffusers"]),
        (["pgsvd-00001-of-00001.safetensors"], ["compressed", "dense"]),
        (["run.json", "layers/00000.safetensors"], ["unfinished", "`resume`"]),
        (["params.json", "consolidated.00.pth"], ["params.json", "convert"]),
        (["params.json", "consolidated.safetensors"], ["params.json", "convert"]),
        (["modules.json", "0_Transformer/config.json"], ["sentence-transformers"]),
        (["tf_model.h5"], ["TensorFlow"]),
        (["flax_model.msgpack"], ["Flax"]),
        (["onnx/model.onnx"], ["ONNX"]),
        (["gptq_model-4bit-128g.safetensors", "quantize_config.json"], ["quantized", "dense"]),
        ([".cache/huggingface/download/x.incomplete"], ["interrupted", "repeat"]),
        (["zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], ["training checkpoint"]),
        (["model.pth"], ["save_pretrained"]),
        (["model-00001-of-00002.safetensors"], ["model.safetensors.index.json", "download"]),
        (["model.fp16.safetensors"], ["variant", "rename"]),
        (["notes.md"], ["model.safetensors"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_contents_are_named(tmp_path: Path, files: list[str], culprits: list[str]) -> None:
    contents = dict.fromkeys(files, "")
    if files[0].startswith("adapter"):
        contents["adapter_config.json"] = BASE
    for config in (True, False):  # some tools save config.json with everything
        folder = tmp_path / str(config)
        text = message(folder, contents | ({"config.json": LLAMA} if config else {}))
        if not config:
            assert "no config.json" in text or "adapter" in text
        if config or files != ["notes.md"]:
            assert [word for word in culprits if word not in text] == []


@pytest.mark.parametrize("below", ["checkpoint-500", "snapshots/0123", "0_Transformer"])
def test_the_model_in_a_folder_below_is_named(tmp_path: Path, below: str) -> None:
    text = message(tmp_path / "out", {f"{below}/config.json": LLAMA, "trainer_state.json": "{}"})
    assert str(tmp_path / "out" / below) in text


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
)
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    files = {"config.json": LLAMA}
    if name.startswith("model-"):
        files["model.safetensors.index.json"] = index
    text = message(tmp_path, {**files, name: POINTER})
    assert text.startswith(str(tmp_path / name))
    assert "git lfs pull" in text


@pytest.mark.parametrize(
    ("config", "culprits"),
    [
        ("", ["not valid JSON"]),
        ("[]", ["JSON object"]),
        ("{}", ["architectures", "LlamaForCausalLM"]),
        ('{"model_type": "llama"}', ["architectures", "LlamaForCausalLM"]),
        ('{"model_type": "llama", "architectures": [""]}', ["architectures"]),
        ('{"architectures": ["LlamaForCausalLM"]}', ["model_type"]),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": ""}', ["model_type"]),
        ("\ufeff" + LLAMA, ["byte-order mark", "UTF-8"]),
        (LLAMA.replace("}", ', "dtype": "int8"}'), ["'int8'", "bfloat16"]),
        (LLAMA.replace("}", ', "torch_dtype": "float8_e4m3fn"}'), ["'float8_e4m3fn'", "bfloat16"]),
        (LLAMA.replace("}", ', "dtype": "load"}'), ["'load'", "bfloat16"]),
        (LLAMA.replace("}", ', "dtype": ["bfloat16"]}'), ["bfloat16"]),
    ],
)
def test_a_malformed_config_is_named(tmp_path: Path, tiny_model: Path, config: str, culprits: list[str]) -> None:
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    text = message(tmp_path, {"config.json": config})
    assert text.startswith(str(tmp_path / "config.json"))
    assert [word for word in culprits if word not in text] == []


def test_a_pipe_in_place_of_a_config_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(it is a pipe or a device\)"):
        ModelSource(tmp_path)


def test_a_utf16_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LLAMA, encoding="utf-16")
    assert "UTF-16" in message(tmp_path, {})


def test_a_missing_shard_of_an_interrupted_download_is_named(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    files = {"config.json": LLAMA, "model.safetensors.index.json": index}
    assert "interrupted" not in message(tmp_path, files)
    text = message(tmp_path, {".cache/huggingface/download/a.incomplete": ""})
    assert "model-00001-of-00001.safetensors" in text
    assert "interrupted" in text


def test_shards_beside_a_single_file_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_model / name)
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.symlink_to(tiny_model / "model.safetensors")
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        names = list(file.keys())
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    ModelSource(make(tmp_path, {"model.safetensors.index.json": json.dumps(index)}))
    index = {"weight_map": dict.fromkeys(names, shard.name)}
    assert "both model.safetensors and" in message(tmp_path, {"model.safetensors.index.json": json.dumps(index)})


@pytest.mark.parametrize(
    ("model", "culprit"),
    [
        ("", "is empty"),
        (" \t", "is empty"),
        ("https://huggingface.co/someone/model", "hub id"),
        (__file__, "no such folder, it is a file"),
    ],
)
def test_a_model_that_is_no_folder_is_named(model: str, culprit: str) -> None:
    with pytest.raises(InputError, match=f"^MODEL.*{culprit}"):
        resolve_folder(model)


def as_another_user(action: Callable[[], object]) -> str:
    """The message of the InputError that an action raises in a process without the rights of root."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
        except PgsvdError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return file.read()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_a_file_without_read_permission_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = make(Path(root), {"config.json": LLAMA, "model.safetensors": ""})
        folder.chmod(0o755)
        (folder / name).chmod(0)
        text = as_another_user(lambda: ModelSource(folder))
        assert text == f"{folder / name}: cannot be read (Permission denied)"
