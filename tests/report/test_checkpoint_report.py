"""The report of a checkpoint is one page that shows its numbers and needs nothing from the network."""

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pgsvd_vllm.cli import main
from pgsvd_vllm.errors import escaped
from pgsvd_vllm.format.reader import open_checkpoint
from pgsvd_vllm.format.schema import REPORT_NAME
from pgsvd_vllm.report.charts import Series, lines
from pgsvd_vllm.report.content import content_of
from tests.conftest import save_tiny_model
from tests.e2e.checkpoints import truncated, write_checkpoint


class Page(HTMLParser):
    """Rows of tables, tooltips and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self.headings: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open == "title":
            self.notes.append(data.strip())
        elif self._open == "h2":
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_every_projection_is_in_the_table_and_the_heat_map(tiny_compressed: Path, tmp_path: Path) -> None:
    assert main(["report", str(tiny_compressed), "-o", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    report = json.loads((tiny_compressed / REPORT_NAME).read_text())
    table = {row[0]: row[1:] for row in page.rows if len(row) == 6}
    assert {row["name"] for row in report["modules"]} == table.keys() - {"projection"}
    for row in report["modules"]:
        size, rank, kept, _, error = table[row["name"]]
        assert size == f"{row['out_features']} x {row['in_features']}"
        assert rank == ("dense" if row["rank"] is None else str(row["rank"]))
        assert error == ("-" if row["rank"] is None else f"{row['error']:.1%}")
        assert sum(note.startswith(f"{row['name']} (") and f"{float(kept[:-1]):.0f}% kept" in note
                   for note in page.notes) == 1  # fmt: skip
    assert "What another size would cost" in page.headings
    assert sum("removed: " in note for note in page.notes) >= len(report["front"])


def test_bytes_are_those_of_the_files(tiny_compressed: Path) -> None:
    checkpoint = open_checkpoint(tiny_compressed)
    content = content_of(checkpoint, [])
    others = [name for name in checkpoint.tensors if "_proj." not in name]
    assert len(others) == 8  # embeddings and norms
    assert content.other_bytes == sum(checkpoint.tensors[name].nbytes for name in others)
    for p in content.projections:
        stored = [info.nbytes for name, info in checkpoint.tensors.items() if name.startswith(f"{p.name}.")]
        assert p.nbytes == sum(stored) > 0
    assert content.itemsize == 4
    assert content.removed == pytest.approx(0.25, abs=5e-3)


def copied(checkpoint: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy with one JSON file changed."""
    shutil.copytree(checkpoint, folder)
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_sizes_do_not_need_a_dtype_in_the_config(key: str | None, tiny_compressed: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        dtype = config.pop("dtype")
        config.update({} if key is None else {key: dtype})

    folder = copied(tiny_compressed, tmp_path / "copy", "config.json", change)
    assert content_of(open_checkpoint(folder), []).itemsize == 4


@pytest.mark.parametrize(
    ("name", "change", "culprit"),
    [
        (REPORT_NAME, lambda r: r["modules"].pop(), "does not describe this checkpoint"),
        (REPORT_NAME, lambda r: r["modules"][0].update(error="x"), "malformed report"),
        (REPORT_NAME, lambda r: r.update(front=[{"size": 1}]), "malformed front"),
        (REPORT_NAME, lambda r: r.update(front=[1]), "malformed front"),
        ("config.json", lambda c: c["quantization_config"].update(tolerance=None), "config.json: malformed"),
    ],
    ids=["stale", "error", "front-key", "front-type", "tolerance"],
)
def test_a_damaged_description_is_named(
    name: str,
    change: Callable[[dict[str, Any]], object],
    culprit: str,
    tiny_compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(tiny_compressed, tmp_path / "copy", name, change)
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 2
    assert culprit in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_names_with_markup_and_dollars_are_shown_as_they_are() -> None:
    names = ["$a_b$", "<script>", "a&b"]
    chart = lines([Series(name, [(0.1, 1.0)], [f"note {name}"]) for name in names], ("x", "y"))
    assert all(html.escape(name, quote=False) in chart for name in names)
    assert escaped("a\x00b\x1b[31m\n") == "a\\x00b\\x1b[31m\n"


def test_the_page_loads_nothing(tiny_compressed: Path, tmp_path: Path) -> None:
    main(["report", str(tiny_compressed), "-o", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    found = {url for url in re.findall(r"https?://[^\"'\s<]+", text) if "www.w3.org" not in url}
    assert found == set()
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert len(text) < 2_000_000
    identities = re.findall(r'\bid="([^"]+)"', text)
    assert len(identities) == len(set(identities))


def test_measurements_and_answers_are_shown(tiny_compressed: Path, tmp_path: Path) -> None:
    measured = {
        "rows": [{"name": "text <b>", "unit": "perplexity", "count": 4, "value": 12.5, "base": 10.0, "recovery": 0.8,
                  "low": 0.75, "high": 0.85, "ok": True}],
        "answers": [{"prompt": "What?", "compressed": "This\nand that", "base": "That"}],
    }  # fmt: skip
    (tmp_path / "e.json").write_text(json.dumps(measured))
    arguments = ["report", str(tiny_compressed), "-o", str(tmp_path / "page.html"), "--evaluation"]
    assert main([*arguments, str(tmp_path / "e.json")]) == 0
    rows = Page((tmp_path / "page.html").read_text()).rows
    assert ["text <b>", "perplexity", "12.5", "10", "80.0%", "75.0% to 85.0%"] in rows
    assert ["What?", "This\nand that", "That"] in rows


def test_measurements_go_into_the_model_card(tiny_compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_compressed, tmp_path / "own"))
    before = (folder / "README.md").read_text()
    assert "Predicted loss on the calibration text: " in before
    assert "Not measured yet." in before
    for value, cell in ((12.5, "12.5"), (13.5, "13.5")):  # the second time it replaces the first
        name = "a|b\n<!-- end of quality -->"
        rows = [{"name": name, "unit": "perplexity", "count": 4, "value": value, "base": 10.0, "recovery": 0.8,
                 "low": 0.75, "high": 0.85, "ok": True},
                {"name": "arc", "unit": "acc", "count": 4, "value": None, "ok": False}]  # fmt: skip
        measured = {"model": "own", "rows": rows, "answers": []}
        (tmp_path / "e.json").write_text(json.dumps(measured))
        assert main(["report", str(folder), "--evaluation", str(tmp_path / "e.json")]) == 0
        card = (folder / "README.md").read_text()
        first = f"| a\\|b &lt;!-- end of quality --> | perplexity | 10 | {cell} | 80.0% | 75.0% to 85.0% |\n"
        assert f"{first}| arc | acc |  |  |  |  |\n" in card
    assert "Not measured yet." not in card
    assert "12.5" not in card
    assert card.count("| perplexity |") == 1
    assert card.partition("<!-- quality -->")[0] == before.partition("<!-- quality -->")[0]
    assert card.partition("<!-- end of quality -->")[2] == before.partition("<!-- end of quality -->")[2]
    # Another place for the page, or a card of one's own, leaves the folder as it is.
    (folder / "README.md").write_text("my own card")
    given = ["report", str(folder), "--evaluation", str(tmp_path / "e.json")]
    assert main(given) == 0
    assert main([*given, "-o", str(tmp_path / "page.html")]) == 0
    assert (folder / "README.md").read_text() == "my own card"


def test_figures_of_another_model_stay_out_of_the_card(
    tiny_compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_compressed, tmp_path / "own"))
    before = (folder / "README.md").read_text()
    rows = [{"name": "text", "unit": "perplexity", "value": 12.5}]
    (tmp_path / "e.json").write_text(json.dumps({"model": "org/other", "rows": rows, "answers": []}))
    assert main(["report", str(folder), "--evaluation", str(tmp_path / "e.json")]) == 0
    assert "is left as it is: --evaluation is of org/other, not of own" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize("value", ['{"rows": [1]}', '{"rows": [{"name": "a"}], "answers": []}', "{}", "[]", "no JSON"])
def test_another_file_is_refused(
    value: str, tiny_compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.json").write_text(value)
    arguments = ["report", str(tiny_compressed), "-o", str(tmp_path / "page.html"), "--evaluation"]
    assert main([*arguments, str(tmp_path / "e.json")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_without_a_report_of_errors(tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path / "dense", layers=1)
    folder = write_checkpoint(dense, tmp_path / "out", lambda _, weight: truncated(weight, 20))
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text())
    assert sum(len(row) == 6 and row[2] == "20" for row in page.rows) == 7
    # The page does not make the checkpoint invalid.
    assert main(["verify", str(folder)]) == 0


def test_charts_are_the_same_every_time() -> None:
    series = [Series("one", [(0.1, 1.0), (0.2, 2.0)], ["a", "b"])]
    assert lines(series, ("x", "y")) == lines(series, ("x", "y"))
