"""The one grammar of all commands: key=value, and --json for results as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

JSON = "--json"


def take_json(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --json, and whether it was there."""
    return [word for word in arguments if word != JSON], JSON in arguments


def with_json_key(arguments: Sequence[str] | None) -> list[str]:
    """The arguments (default: the command line's) of a command whose config has the key `json`: --json sets it."""
    words, as_json = take_json(sys.argv[1:] if arguments is None else arguments)
    return [*words, "json=true"] if as_json else words


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `parser` from `arguments` (default: the command line's), written key=value or --key value; flags
    take true and false. A word whose key is no option stays what it is. SystemExit for a mistake, as of argparse."""
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        key, equals, value = word.partition("=")
        option = f"--{key.replace('_', '-')}"
        action = _options(parser).get(option) if equals else None
        if action is None:
            words.append(word)
        elif action.nargs == 0:
            if value not in ("true", "false"):
                parser.error(f"{word} is not of the right type; it must be true or false")
            words += [option] if value == "true" else []
        elif action.nargs in ("+", "*"):
            words += [option, *value.removeprefix("[").removesuffix("]").split(",")]
        else:
            words.append(f"{option}={value}")
    return parser.parse_args(words)


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser and of its subcommands."""
    found = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _options(command)
    return found
