"""The report of a checkpoint is one page that shows its numbers and needs nothing from the network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pgsvd_vllm.cli import main
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


def test_bytes_add_up(tiny_compressed: Path) -> None:
    checkpoint = open_checkpoint(tiny_compressed)
    content = content_of(checkpoint, [])
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    assert sum(p.nbytes for p in content.projections) + content.other_bytes == stored
    assert content.chosen == pytest.approx(1 - sum(p.numel for p in content.projections)
                                           / sum(p.out_features * p.in_features for p in content.projections),
                                           abs=2e-3)  # fmt: skip


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


@pytest.mark.parametrize("value", ['{"rows": [1]}', '{"rows": [{}]}', "[]", "no JSON"])
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
