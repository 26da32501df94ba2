"""The layout keeps its promises: light import, one-way dependencies, no clash with other packages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

GROUND = ("errors", "families")
FORMAT = (*GROUND, "format")
# Room -> (modules of this package that it may import, other packages that it may not). A prefix stands for a room.
# Rooms of offline/ stand on the rooms before them.
OFFLINE_GROUND = ("offline.options", "offline.settings", "offline.records", "offline.linalg")
OFFLINE_ROOMS = (
    *(
        "offline.model",
        "offline.state",
        "offline.data",
        "offline.run_state",
        "offline.executor",
        "offline.calibration",
        "offline.ranks",
    ),
    *(
        "offline.factors",
        "offline.refine",
        "offline.rounding",
        "offline.planning",
        "offline.output",
        "offline.convert",
        "offline.compress",
        "offline.sweep",
        "offline.study",
    ),
)
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "errors": ((), ("torch", "transformers", "vllm")),
    "families": ((), ("torch", "transformers", "vllm")),
    "format": (FORMAT, ("transformers", "vllm")),
    "parallel": ((*FORMAT, "parallel", "kernels.layer_shape", "kernels.quantized_matrix"), ("transformers", "vllm")),
    "hf": ((*FORMAT, "hf"), ("vllm",)),
    "serving": ((*FORMAT, "parallel", "hf", "kernels", "serving"), ()),
    "plugin": (("serving",), ("torch", "transformers")),
    "evaluation": ((*FORMAT, "hf", "offline.data", "offline.model", "evaluation"), ("vllm",)),
    "report": ((*FORMAT, "report"), ("torch", "transformers", "vllm")),
    "cli": ((*FORMAT, "parallel", "hf", "kernels", "serving", "offline", "evaluation", "report", "cli"), ()),
    **dict.fromkeys(
        OFFLINE_GROUND,
        ((*GROUND, "format.quantization", "format.dtypes", "offline.options", "offline.linalg"), ("vllm",)),
    ),
    **{
        room: ((*FORMAT, "hf", *OFFLINE_GROUND, *OFFLINE_ROOMS[: number + 1]), ("vllm",))
        for number, room in enumerate(OFFLINE_ROOMS)
    },
}
BANNED = (
    *(
        r"multipl(y|ied|ies) back",
        r"\brivals?\b",
        r"\bheal(s|ed|er|ing)?\b",
        r"with eyes",
        r"models? that (see|hear)s?\b",
    ),
    *(
        r"by heart",
        r"\boutput heads?\b",
        r"\bmixtures\b",
        r"torch's products",
        r"\b(down|up|dense|library's) products?\b",
        r"numbers a token",
        r"hands? (it |them |each other )?on\b",
    ),
)


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    prefix = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, cwd="/", check=False)


PACKAGE = "pgsvd_vllm"
PRODUCT = sorted(path for name in (PACKAGE, "offline", "kernels") for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    """The module below the package, such as `offline.model.source`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == PACKAGE else parts
    return ".".join(part for part in inside if part != "__init__")


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_importing_the_package_is_light() -> None:
    done = python("import pgsvd_vllm; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_starts_without_torch() -> None:
    """--help is fast, and tqdm, which torch imports, reads its settings after the options are known."""
    done = python("import pgsvd_vllm.cli; print([m for m in ('torch', 'tqdm', 'numpy') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    allowed, refused = RULES[room]
    files = [path for path in PRODUCT if below(module_name(path), (room,))]
    assert files
    wrong = []
    for path in files:
        for name in imported(path):
            inside = name.removeprefix(f"{PACKAGE}.")
            if name.startswith(f"{PACKAGE}.") and not below(inside, allowed):
                wrong.append(f"{module_name(path)} imports {inside}")
            if name.split(".")[0] in refused:
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


def test_every_module_has_a_rule() -> None:
    free = [name for path in PRODUCT if not below(name := module_name(path), (*RULES, "kernels"))]
    assert sorted(free) == ["", *(["offline"] if (ROOT / "offline" / "__init__.py").exists() else [])]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    others = {name for name in imported(path) if not name.startswith("pgsvd_vllm.kernels.")}
    assert {name.split(".")[0] for name in others} - sys.stdlib_module_names <= {"torch", "triton"}


def test_numeric_code_does_not_speak_of_flags() -> None:
    rooms = (
        "offline.model",
        "offline.calibration",
        "offline.ranks",
        "offline.factors",
        "offline.refine",
        "offline.linalg",
    )
    flags = [
        f"{module_name(path)}: {node.value[:60]}"
        for path in PRODUCT
        if below(module_name(path), rooms)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]
    assert flags == []


def test_signatures_are_short() -> None:
    """Six parameters at most, but for what vLLM's interface dictates."""
    dictated = {"create_weights"}
    long = []
    for path in PRODUCT:
        if path.is_relative_to(ROOT / "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in dictated:
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
                if count > 6:
                    long.append(f"{module_name(path)}.{node.name}: {count}")
    assert long == []


def test_offline_has_few_files_outside_its_rooms() -> None:
    assert len(list((ROOT / "offline").glob("*.py"))) <= 6


def written_files() -> list[Path]:
    """Every file of prose or code that the project tracks, but for history."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = done.stdout.split("\n") if done.returncode == 0 else []
    paths = [ROOT / name for name in names if name.endswith((".py", ".md", ".toml")) or name == "Makefile"]
    return [path for path in paths if path.is_file() and "docs/dev/" not in path.as_posix()]


def test_the_fields_own_words_are_used() -> None:
    files = [path for path in written_files() if path != Path(__file__)]
    if not files:
        pytest.skip("not a git checkout: the tracked files are not known")
    pattern = re.compile("|".join(BANNED), re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_lines_of_prose_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in written_files()
        if path.suffix == ".md"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.startswith(("|", "    ")) and "http" not in line
    ]
    assert long == []


def test_a_foreign_kernels_package_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("ORIGIN = 'foreign'\n")
    # The checkout comes first on the path: only the missing __init__.py lets the other package win.
    done = python("import kernels; print(kernels.ORIGIN); import pgsvd_vllm.kernels.numerics", ROOT, tmp_path)
    assert done.stdout.strip() == "foreign", done.stderr
    assert not list((ROOT / "kernels").glob("__init__.py")) + list((ROOT / "offline").glob("__init__.py"))


def test_offline_works_without_vllm(tiny_model: Path, tmp_path: Path) -> None:
    blocker = (
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vllm': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from pgsvd_vllm.cli import main\n"
    )
    command = ["compress", str(tiny_model), "-o", str(tmp_path / "out"), "--tolerance", "0.3"]
    command += ["--num-calibration-samples", "16", "--max-seq-length", "64"]
    done = python(blocker + f"sys.exit(main({command!r}) or main(['verify', {str(tmp_path / 'out')!r}]))")
    assert done.returncode == 0, done.stderr
    assert "all numbers finite" in done.stdout


def folders_below(root: Path, levels: int) -> set[str]:
    """A folder of the repository and those below it that hold files."""
    found = {root.relative_to(ROOT).as_posix()}
    for folder in sorted(root.iterdir()) if levels else ():
        if folder.is_dir() and any(path.suffix in (".py", ".md") for path in folder.rglob("*")):
            found |= folders_below(folder, levels - 1)
    return found


def test_the_architecture_document_names_every_folder() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = document.split("\n```\n")[1].splitlines()
    named = [line.split()[0].rstrip("/") for line in tree]
    assert all(len(line.split()) >= 3 for line in tree)  # says what the folder is for
    # Folders of tests mirror the others: the first level of them is named.
    levels = {"pgsvd_vllm": 9, "offline": 9, "kernels": 9, "benchmarks": 9, "tests": 1, "docs": 9}
    existing = set().union(*(folders_below(ROOT / name, depth) for name, depth in levels.items()))
    assert sorted(named) == sorted(existing)


def test_documents_name_files_that_exist() -> None:
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        # docs/reliability.md quotes messages, which name files of models.
        *(path for path in (ROOT / "docs").glob("*.md") if path.name != "reliability.md"),
    ]
    # docs/architecture.md shortens paths below these.
    bases = [ROOT, *(ROOT / name for name in ("pgsvd_vllm", "offline", "tests", "docs"))]
    # DIR stands for a user's folder.
    pattern = re.compile(r"(?<![\w/.~-])(?!DIR/)(?:[\w-]+/)+[\w-]+\.(?:py|md|json|png)\b")
    named = {(path.name, name) for path in documents for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 50
    assert not [pair for pair in sorted(named) if not any((base / pair[1]).is_file() for base in bases)]
