"""The files that are downloaded from the hub, and the public name of a model in a checkpoint's description."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import InputError
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


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for models that it does not give."""

    def do_GET(self) -> None:
        codes = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "other": (404, "RevisionNotFound")}
        status, code = next((codes[name] for name in codes if f"/{name}/" in self.path), (500, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", [("inspect",), ("compress", "-o", "out")], ids=lambda given: given[0])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["someone/gated"], "MODEL someone/gated: its owner grants access on request; .* hf auth login"),
        (["someone/private"], "MODEL someone/private: no such folder, and .* if it is private, .* hf auth login"),
        (["someone/other", "--revision", "v9"], "--revision v9: MODEL someone/other has no such branch"),
    ],
    ids=["gated", "private", "revision"],
)
def test_what_the_hub_refuses_is_explained(
    command: tuple[str, ...], arguments: list[str], expected: str, hub: str, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    program = "import sys; from pgsvd_vllm.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, command[0], *arguments, *command[1:]],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(expected, line), line


def test_a_revision_of_the_cache_is_found(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--tiny"
    for number, name in enumerate(("main", "v1")):
        shutil.copytree(tiny_model, repository / "snapshots" / (str(number) * 40))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(str(number) * 40, encoding="ascii")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_folder("someone/tiny").name == "0" * 40
    assert resolve_folder("someone/tiny", revision="v1").name == "1" * 40
    with pytest.raises(InputError, match="MODEL someone/tiny: no such folder, and the hub does not provide it"):
        resolve_folder("someone/tiny", revision="v2")
    with pytest.raises(InputError, match=f"`revision` v1: is for an id of the hub; MODEL {tiny_model} is a folder"):
        resolve_folder(str(tiny_model), revision="v1")


def test_commands_read_checkpoints_of_the_cache(
    tmp_path: Path, tiny_compressed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--compressed"
    shutil.copytree(tiny_compressed, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="ascii")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for command in ("inspect", "verify", "report"):
        assert main([command, "someone/compressed"]) == 0
    printed = capsys.readouterr().out
    assert "someone/compressed: good: " in printed
    assert "wrote report.html" in printed
    assert (tmp_path / "report.html").is_file()
