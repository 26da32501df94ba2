"""The files that are downloaded from the hub, and the public name of a model in a checkpoint's description."""

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from pgsvd_vllm.offline.model.hub import HUB_IGNORED, hub_patterns, public_name, resolve_folder

FILES = [
    *("config.json", "model-00001-of-00002.safetensors", "tokenizer.model.v3", "merges.txt", "qwen.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/rag.jinja", "README.md"),
]
OTHERS = [
    *("pytorch_model.bin", "tf_model.h5", "consolidated.pth", "consolidated.safetensors", "original/params.json"),
    *("adapter_model.safetensors", "model.gguf", "onnx/model.onnx"),
]
CODE = ["modeling_own.py", "configuration_own.py"]


@pytest.mark.parametrize(("trusted", "expected"), [(False, FILES), (True, [*FILES, *CODE])])
def test_a_download_has_all_that_compression_copies(trusted: bool, expected: list[str]) -> None:
    found = filter_repo_objects(
        [*FILES, *OTHERS, *CODE], allow_patterns=hub_patterns(trusted), ignore_patterns=list(HUB_IGNORED)
    )
    assert sorted(found) == sorted(expected)


def test_a_model_of_the_hub_cache_is_found(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("0" * 40, encoding="ascii")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_folder("someone/tiny") == snapshot
    assert public_name(str(snapshot)) == "someone/tiny"


def test_names_are_public(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert public_name(str(tmp_path / "tiny")) == "tiny"
    assert public_name(f"{tmp_path}/tiny/../tiny/") == "tiny"
    assert public_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert public_name("wikitext2") == "wikitext2"
