"""compress --recipe: a checkpoint's own recipe makes it again; the command line replaces it; mistakes are named."""

import hashlib
from pathlib import Path

import pytest
import yaml

from pgsvd_vllm.cli import build_parser, main
from pgsvd_vllm.cli.recipe import with_recipe
from pgsvd_vllm.errors import InputError
from pgsvd_vllm.offline.options import CompressOptions
from pgsvd_vllm.offline.output.recipe import OPTIONS, recipe_of, write_recipe

NAME = "pgsvd_recipe.yaml"
FEW = ["--num-calibration-samples", "20", "--max-seq-length", "48"]


def weights(folder: Path) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))).hexdigest()


def test_a_recipe_makes_the_checkpoint_again(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("".join(f"Line {i} of a text about {i % 7} things.\n" for i in range(2000)), encoding="utf-8")
    given = ["compress", str(tiny_model), *FEW]
    options = ["--target-loss", "0.5", "--refine", "2k", "--seed", "3", "--no-sequential", "--form", "factors"]
    data = ["--dataset", str(text), "--ignore", "*.o_proj", "*.k_proj", "--dtype", "float32"]
    assert main([*given, *options, *data, "-o", str(tmp_path / "first")]) == 0
    recipe = tmp_path / "first" / NAME
    held = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert held == {
        **{"target-loss": 0.5, "form": "factors", "serve-on": "cpu", "sequential": False, "seed": 3},
        **{"num-calibration-samples": 20, "max-seq-length": 48, "dtype": "float32", "refine": "2.0k"},
        **{"dataset": ["./own.txt"], "ignore": ["*.o_proj", "*.k_proj"]},
    }
    assert str(tmp_path) not in recipe.read_text(encoding="utf-8")
    # The recipe names the text without its folder.
    again = ["compress", str(tiny_model), "--recipe", str(recipe), "--dataset", str(text)]
    assert main([*again, "-o", str(tmp_path / "second")]) == 0
    assert weights(tmp_path / "second") == weights(tmp_path / "first")
    assert (tmp_path / "second" / NAME).read_bytes() == recipe.read_bytes()


def test_the_command_line_replaces_what_it_gives(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target-bytes: 4G\nseed: 3\nsequential: false\ndataset: [a.txt, self]\nbits: 8\nrefine: 500k\n")
    given = ["MODEL", "-o", "DIR", "--ratio", "0.3", "--dataset", "b.txt", "--seed", "0"]
    found = build_parser().parse_args(["compress", *with_recipe(given, recipe)])
    # A target replaces another one, and an option its own value even where it is the default.
    assert (found.ratio, found.target_bytes, found.dataset, found.seed) == (0.3, None, ["b.txt"], 0)
    assert (found.sequential, found.bits, found.refine) == (False, "8", (None, 500_000))
    found = build_parser().parse_args(["compress", *with_recipe(["MODEL", "-o", "DIR"], recipe)])
    assert (found.target_bytes, found.dataset, found.seed) == (4_000_000_000, ["a.txt", "self"], 3)


def test_every_field_of_the_options_is_in_a_recipe_or_belongs_to_a_run(tmp_path: Path) -> None:
    """A new option must not be missing from recipes by accident."""
    of_runs = {
        "model",
        "output",
        "calibration",
        "device",
        "memory_budget",
        "executor",
        "address",
        "resume",
        "revision",
        "trust_remote_code",
        "command",
    }
    others = {"refine", "refine_tokens", "costs", "dataset", "ignore", "include"}
    assert set(CompressOptions.__dataclass_fields__) == {*OPTIONS, *of_runs, *others}
    shares = {"vision": 0.1, "language": 0.3}
    options = CompressOptions(
        "M", tmp_path, ratio=shares, refine=1.5, costs=tmp_path / "t.json", include=("experts",), chat_template=True
    )
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of(options)), encoding="utf-8")
    found = build_parser().parse_args(["compress", *with_recipe(["MODEL", "-o", "DIR"], path)])
    assert (found.ratio, found.refine, found.include, found.chat_template) == (shares, (1.5, None), ["experts"], True)
    assert (found.objective, found.costs) == ("latency", Path("t.json"))


def test_local_files_are_not_taken_for_other_data_sets(tmp_path: Path) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "self").write_text("text")
    names = (str(tmp_path / "c4"), str(tmp_path / "self"), "self", "owner/name:main")
    held = recipe_of(CompressOptions("M", tmp_path / "o", dataset=names))
    assert held["dataset"] == ["./c4", "./self", "self", "owner/name:main"]


def test_the_name_of_a_model_stays_in_its_comment(tmp_path: Path) -> None:
    folder = tmp_path / "a\nratio: 0.9 #"
    folder.mkdir()
    write_recipe(tmp_path, CompressOptions(str(folder), tmp_path / "o"), None)
    assert yaml.safe_load((tmp_path / NAME).read_text()) == {"ratio": 0.2}


def test_a_recipe_stands_before_the_end_of_options(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 3\nignore: ['*.o_proj']\nrefine: 20\n")
    found = build_parser().parse_args(["compress", *with_recipe(["-o", "DIR", "--", "MODEL"], recipe)])
    assert (found.model, found.seed, found.ignore, found.refine) == ("MODEL", 3, ["*.o_proj"], (20.0, None))


def test_options_that_another_one_makes_useless_are_left_out(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("objective: latency\ncosts: t.json\nsensitivity: measured\n")
    given = ["MODEL", "-o", "DIR", "--objective", "size", "--baseline", "svd"]
    found = build_parser().parse_args(["compress", *with_recipe(given, recipe)])
    assert (found.objective, found.costs, found.sensitivity, found.baseline) == ("size", None, None, "svd")


def test_an_error_says_that_a_recipe_takes_part(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("ratio: 2\n")
    given = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--recipe", str(recipe)]
    assert main(given) == 2
    assert (
        "--ratio 2.0: must lie between 0 and 1, it is the share to remove (with the options of --recipe"
        in capsys.readouterr().err
    )
    assert main([*given, "--ratio", "0.3", "--dataset", "python-docs", "--max-seq-length", "64", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratios: 0.2", "ratios is no option that a recipe may hold; did you mean ratio?"),
        ("trust-remote-code: true", "trust-remote-code is no option that a recipe may hold"),
        ("calibration: /etc", "calibration is no option that a recipe may hold"),
        ("memory-budget: 1G", "memory-budget is no option that a recipe may hold"),
        ("ratio: 0.2\nseed: 1\nratio: 0.9", "ratio is given twice"),
        ("ratio: {vision: 0.1, language: 0.3, vision: 0.2}", "vision is given twice"),
        ("ratio: much", "argument --ratio: invalid shares value: 'much'"),
        ("bits: 5", "argument --bits: invalid choice: '5'"),
        ("ratio: 0.2\ntarget-loss: 0.1", "not allowed with argument"),
        ("ratio:", "ratio has no value"),
        ("ratio: true", "ratio takes no true"),
        ("seed: false", "seed takes no false"),
        ("refine: true", "refine takes no true"),
        ("ratio: [0.1, 0.2]", "ratio takes one value, not a list"),
        ("a: 2024-13-45", "is not YAML"),
        (f"seed: {'1' * 5000}", "is not YAML"),
        ("dataset: []", "dataset holds no list of names"),
        ("- ratio", "must hold options of compress by name, such as ratio: 0.2"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    if text is not None:
        recipe.write_text(text, encoding="utf-8")
    assert main(["compress", "MODEL", "-o", str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert f"--recipe {recipe}: " in error
    assert message in error
    assert len(error.splitlines()) == 1


def test_empty_values_of_a_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    for text, name in (("dataset: ''", "--dataset"), ("costs: ''", "--costs"), ("ignore: ['']", "--ignore")):
        recipe.write_text(text)
        assert main(["compress", "MODEL", "-o", str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
        assert f"{name}: is empty" in capsys.readouterr().err


def test_an_empty_recipe_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n", encoding="utf-8")
    assert with_recipe(["MODEL", "-o", "DIR"], tmp_path / "r.yaml") == ["MODEL", "-o", "DIR"]
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        with_recipe(["MODEL", "-o", "DIR"], tmp_path / "r.yaml")
