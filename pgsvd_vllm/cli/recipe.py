"""Reads a recipe, the options of `compress` as a YAML file; an option on the command line replaces the recipe's."""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pgsvd_vllm.cli.flags import refuse_empty
from pgsvd_vllm.errors import InputError

# What belongs to a run and a machine, and what a file from elsewhere must not decide.
NOT_IN_RECIPES = (
    *("help", "recipe", "resume", "dry_run", "output_dir", "revision", "device", "memory_budget"),
    *("executor", "address"),
    *("calibration", "trust_remote_code", "quiet", "log_format"),
)
# Option -> another one that has no use without its value.
NEEDED_BY = {"objective": "costs", "include": "head_tolerance", "tolerance": "sensitivity", "baseline": "sensitivity"}


class _Parser(argparse.ArgumentParser):
    """A parser of `compress` that returns what is given, without defaults, and whose errors name the recipe.

    Args:
        path: of the recipe.
    """

    def __init__(self, path: Path) -> None:
        from pgsvd_vllm.cli import compress
        from pgsvd_vllm.cli.log import add_log

        super().__init__(add_help=False)
        self.path = path
        compress.configure(self)
        add_log(self)
        for action in self._actions:
            action.default = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"--recipe {self.path}: {message}")


def with_recipe(given: Sequence[str], path: Path) -> list[str]:
    """The command line with the options of a recipe that it does not give itself.

    Args:
        given: arguments of `compress`, valid and without the command's name.
        path: of the recipe.

    Raises:
        InputError: the recipe cannot be read, or holds what is no option of `compress` or no value of it.
    """
    parser = _Parser(path)
    options = {
        string.removeprefix("--"): action
        for action in parser._actions
        for string in action.option_strings
        if string.startswith("--") and not string.startswith("--no-") and action.dest not in NOT_IN_RECIPES
    }
    chosen = set(vars(parser.parse_args(list(given))))
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        chosen |= names if names & chosen else set()
    chosen |= {needed for name, needed in NEEDED_BY.items() if name in chosen}
    added: list[str] = []
    every: list[str] = []
    for name, value in _read(path).items():
        action = options.get(name)
        if action is None:
            near = difflib.get_close_matches(name, options, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--recipe {path}: {name} is no option that a recipe may hold{hint}")
        arguments = list(_arguments(path, name, value, action))
        every += arguments
        if action.dest not in chosen:
            added += arguments
    parser.parse_args(["MODEL", "-o", "DIR", *every])
    refuse_empty(["compress", *added])
    # In front: behind a `--` they would be no options.
    return [*added, *given]


def _read(path: Path) -> dict[str, Any]:
    """The options of a recipe; raises InputError if it is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        twice = _named_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        found = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--recipe {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of its encoding, dates and long numbers as well
        raise InputError(f"--recipe {path}: is not YAML ({' '.join(str(error).split())})") from None
    if twice is not None:
        raise InputError(f"--recipe {path}: {twice} is given twice")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"--recipe {path}: must hold options of compress by name, such as ratio: 0.2")
    return found


def _named_twice(recipe: yaml.Node | None) -> str | None:
    """A key that a recipe or the value of one of its options has twice, which YAML's reader overlooks."""
    inside = [value for _, value in recipe.value] if isinstance(recipe, yaml.MappingNode) else []
    for node in (recipe, *inside):
        keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            return twice[0]
    return None


def _arguments(path: Path, name: str, value: Any, action: argparse.Action) -> Iterator[str]:
    """An option of a recipe as arguments."""
    if isinstance(value, bool):
        if action.nargs != 0:
            raise InputError(f"--recipe {path}: {name} takes no {str(value).lower()}")
        if value:
            yield f"--{name}"
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield f"--no-{name}"
    elif isinstance(value, list):
        if not isinstance(action, argparse._AppendAction):
            raise InputError(f"--recipe {path}: {name} takes one value, not a list")
        if not value or not all(isinstance(one, str | int | float) for one in value):
            raise InputError(f"--recipe {path}: {name} holds no list of names")
        for one in value:
            yield f"--{name}={one}"
    elif isinstance(value, dict):
        yield f"--{name}={','.join(f'{key}={one}' for key, one in value.items())}"
    elif isinstance(value, str | int | float):
        yield f"--{name}={value}"
    else:
        raise InputError(f"--recipe {path}: {name} has no value")
