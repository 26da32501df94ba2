"""The files beside a model's weights that its checkpoint gets, and those that stay where they are."""

import json
import os
from pathlib import Path

import pytest

from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.model.companions import MAX_BYTES, companion_data, find_companions

TAKEN = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken"),
    *("generation_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
    *("SYSTEM_PROMPT.txt", "LICENSE.txt", "additional_chat_templates/rag.jinja", "1_Pooling/config.json"),
]
LEFT = [
    # Written by the checkpoint itself, or about weights that it lacks.
    *("config.json", "README.md", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("pgsvd.safetensors.index.json", "pgsvd_report.json", "pgsvd-00001-of-00001.safetensors", "pgsvd_old.json"),
    *("consolidated.safetensors.index.json", "consolidated.json", "params.json", "adapter_config.json", "a.gguf"),
    *("quantize_config.json", "hf_quant_config.json", "trainer_state.json", "eval_results.json"),
    # Private.
    *(".env", ".netrc", ".hidden.json", "hf_token.txt", "token.txt", "credentials.json", "client_secrets.json"),
    *("additional_chat_templates/notes.txt", "additional_chat_templates/.x.json", "setup.py", "data.jsonl"),
]


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}', encoding="utf-8")
    return folder


def found(folder: Path, remote_code: bool = False) -> list[str]:
    return [path.as_posix() for path in find_companions(folder, remote_code)]


def test_only_files_that_a_checkpoint_needs_are_taken(tmp_path: Path) -> None:
    make(tmp_path, [*TAKEN, *LEFT])
    assert sorted(found(tmp_path)) == sorted(TAKEN)
    assert sorted(found(tmp_path, remote_code=True)) == sorted([*TAKEN, "setup.py"])


def test_a_huge_file_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, ["tokenizer.json", "corpus.txt", "rows.json"])
    for name in ("corpus.txt", "rows.json"):
        os.truncate(tmp_path / name, MAX_BYTES + 1)  # sparse
    assert found(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["x.txt", "notes.json", "a.txt"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / ".some-token").write_text("secret", encoding="utf-8")
    folder = make(tmp_path / "model", ["tokenizer.json", "real/vocab.txt"])
    (folder / name).symlink_to(tmp_path / ".some-token")
    (folder / "chain.txt").symlink_to(folder / name)
    (folder / "vocab.txt").symlink_to("real/vocab.txt")
    (folder / "broken.json").symlink_to("nowhere")
    (folder / "circle.json").symlink_to("circle.json")
    os.mkfifo(folder / "pipe.json")
    assert found(folder) == ["tokenizer.json", "vocab.txt"]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "vocab.json"])
def test_a_needed_file_that_is_a_link_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("{}", encoding="utf-8")
    folder = make(tmp_path / "model", ["config.json"])
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{name}: a link that leaves the model's folder; put the file itself"):
        find_companions(folder, False)


@pytest.mark.parametrize("name", ["1_Pooling", "additional_chat_templates"])
def test_a_folder_that_is_a_link_out_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "private", ["a.jinja", "config.json"])
    folder = make(tmp_path / "model", ["tokenizer.json"])
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match=rf"{name}/(a\.jinja|config\.json): a link"):
        find_companions(folder, False)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123"
    make(snapshot.parent.parent / "blobs", ["abc"])
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "token").write_text("secret", encoding="utf-8")
    (snapshot / "x.txt").symlink_to(tmp_path / "token")
    assert found(snapshot) == ["tokenizer.json"]


def test_a_pointer_in_place_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.model: a git-lfs pointer"):
        find_companions(tmp_path, False)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "1_Pooling/config.json", "vocab.JSON"])
@pytest.mark.parametrize("text", ["", '{"a": ', "[" * 100_000], ids=["empty", "cut off", "deep"])
def test_a_companion_that_is_not_json_is_refused(tmp_path: Path, name: str, text: str) -> None:
    make(tmp_path, [name])
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"{name}: not valid JSON .*; repair or delete it"):
        find_companions(tmp_path, False)


def test_references_to_code_go_where_the_code_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    local = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None], "AutoConfig": "configuration_my.MyConfig"}
    remote = {"AutoModel": "someone/code--modeling_my.MyModel"}
    path.write_text(json.dumps({"auto_map": {**local, **remote}, "bos_token": "\u00e9"}), encoding="utf-8")
    assert json.loads(companion_data(path, False)) == {"bos_token": "\u00e9", "auto_map": remote}
    assert companion_data(path, True) == path.read_bytes()
    path.write_text(json.dumps({"auto_map": local}), encoding="utf-8")
    assert json.loads(companion_data(path, False)) == {}
    for text in ('["auto_map"]', "{}"):
        path.write_text(text, encoding="utf-8")
        assert companion_data(path, False) == text.encode()
