"""Files of config options, ours and the user's own: checked before Hydra composes them, and who gave which number of a
hardware profile. A mistake in a file is a ValueError of one line, which begins with the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uvm_kv.config import names
from uvm_kv.config.names import check_value, find_option, groups, keys_of, operators, schema_of, unknown_key
from uvm_kv.config.schema import HardwareSchema, HintsSchema

COMMAND_LINE = "given on the command line"
NO_SOURCE = "given by {}, no source"
NUMBERS = ("gpu", "link", "managed", "power", "operators")
"""The groups of numbers of a hardware profile, each of which needs a source."""
NAMED_BY_FILE = {"hardware": "hardware.name", "mechanism": "mechanism"}
"""Groups whose option must bear the name of its file, and the key of that name."""
PACKAGES = {"link": "hardware", "mechanism": "_global_", "experiment": "_global_"}
"""Where Hydra puts the keys of a group whose options fill in those of others."""
MAX_SHOWN = 60
"""Characters of a value that an error repeats."""


@dataclass(frozen=True)
class OptionFile:
    group: str
    name: str
    path: Path
    settings: dict[str, Any]
    """What it sets, below the root of the config."""
    bases: tuple[str, ...]
    """Options of the same group that it begins with."""
    choices: dict[str, str]
    """Options of other groups that it chooses."""

    @property
    def hardware(self) -> dict[str, Any]:
        hardware = self.settings.get("hardware")
        return hardware if isinstance(hardware, dict) else {}

    @property
    def sources(self) -> dict[str, str]:
        """By dotted path, without those that are blank."""
        given = self.hardware.get("sources") or {}
        return {str(path): str(text) for path, text in given.items() if str(text or "").strip()}


def read_option(group: str, name: str, folders: Iterable[Path] = ()) -> OptionFile:
    """ValueError for an option that does not exist, or a file that is not YAML or not a mapping."""
    path = find_option(group, name, folders)
    if path is None:
        raise names.unknown_option(group, name, [*groups().get(group, ()), *_own_names(group, folders)])
    try:
        text = path.read_text(encoding="utf-8")
        tree = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: it must hold keys and values, such as `name: {name}`")
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    where = package[1] if package else group
    needed = PACKAGES.get(group, where)
    if where != needed:
        raise ValueError(
            f"{path}: write `# @package {needed}` as its first line, for a {group} fills in keys of others"
        )
    tree.pop("hydra", None)
    bases, choices = _defaults(tree.pop("defaults", None), group, path)
    settings: dict[str, Any] = {str(key): value for key, value in tree.items()}
    for part in reversed([] if where == "_global_" else where.split(".")):
        settings = {part: settings}
    return OptionFile(group, name, path, settings, bases, choices)


def _own_names(group: str, folders: Iterable[Path]) -> list[str]:
    return [file.stem for folder in folders for file in (folder / group).glob("*.yaml")]


def _defaults(entries: Any, group: str, path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """(bases, choices) of a defaults list."""
    bases, choices = [], {}
    if entries is not None and not isinstance(entries, list):
        raise ValueError(f"{path}: defaults must be a list, such as `defaults: [rtx3090, _self_]`")
    plain = [entry for entry in entries or [] if isinstance(entry, str)]
    if plain and plain[-1] != "_self_":
        raise ValueError(
            f"{path}: what it begins with would win over the file itself; end defaults with _self_: "
            f"`defaults: [{', '.join(entry for entry in plain if entry != '_self_')}, _self_]`"
        )
    for entry in entries or []:
        if isinstance(entry, str):
            if entry != "_self_":
                bases.append(entry.removeprefix(f"/{group}/"))
        elif isinstance(entry, dict):
            for key, value in entry.items():
                other = str(key).removeprefix("override ").removeprefix("optional ").strip().removeprefix("/")
                if value is not None:
                    choices[other.partition("@")[0]] = str(value)
        else:
            raise ValueError(f"{path}: {entry!r} in defaults is not a name; write `defaults: [rtx3090, _self_]`")
    return tuple(bases), choices


def read_chain(group: str, name: str, folders: Sequence[Path] = (), below: tuple[str, ...] = ()) -> list[OptionFile]:
    """An option after those that it begins with: later ones win. ValueError for a file that begins with itself."""
    if name in below:
        raise ValueError(f"{find_option(group, name, folders)}: its defaults lead back to {name} itself")
    option = read_option(group, name, folders)
    for base in option.bases:
        if find_option(group, base, folders) is None:
            allowed = [*groups().get(group, ()), *_own_names(group, folders)]
            raise ValueError(f"{option.path}: its defaults: {names.unknown_option(group, base, allowed)}")
    chain = [file for base in option.bases for file in read_chain(group, base, folders, (*below, name))]
    return [*chain, option]


def check_files(overrides: Iterable[Override], folders: Sequence[Path]) -> None:
    """ValueError for a mistake in a file of an option that the overrides choose."""
    for override in overrides:
        group = override.key_or_group
        if group in groups() and not override.is_delete():
            for name in names.values_of(override):
                if name != "null":
                    check_option(group, name.strip("'\""), folders)


def check_option(group: str, name: str, folders: Sequence[Path] = ()) -> None:
    """ValueError for an unknown key or option, a wrong type or a missing number in an option's file or those below."""
    chain = read_chain(group, name, folders)
    for option in chain:
        if option.path.is_relative_to(names.CONF_DIR) and group not in ("hardware", "link"):
            continue  # Ours, which the tests compose.
        _check_settings(option)
        _check_name(option)
        for other, choice in option.choices.items():
            if other in groups():
                check_option(other, choice, folders)
    if group == "hardware":
        _check_complete(chain)


def _check_settings(option: OptionFile) -> None:
    schema = schema_of()
    keys = keys_of(schema)
    if option.group not in keys and option.group not in names.NOT_A_KEY:
        raise ValueError(f"{option.path}: {option.group} is not a group of the config")
    for key, value in _leaves(option.settings):
        try:
            if key.startswith("hardware.sources."):
                _check_source(key.removeprefix("hardware.sources."), value, keys)
            elif key not in keys:
                raise unknown_key(key, keys)
            else:
                check_value(schema, key, value, _short(value))
        except ValueError as error:
            raise ValueError(f"{option.path}: {error}") from None


def _check_source(path: str, value: Any, keys: set[str]) -> None:
    known = {key.removeprefix("hardware.") for key in keys if key.startswith("hardware.")}
    if isinstance(value, dict | list):
        raise ValueError(f"sources.{path} is not a text; write the path in one, such as `gpu.memory_bytes: data sheet`")
    if path not in known:
        raise unknown_key(path, {key for key in known if key.split(".")[0] in NUMBERS})


def _check_name(option: OptionFile) -> None:
    key = NAMED_BY_FILE.get(option.group)
    if key is None:
        return
    given = dict(_leaves(option.settings)).get(key)
    if given != option.name:
        said = "it has no name" if given is None else f"it says {key.rpartition('.')[2]}: {_short(given)}"
        raise ValueError(
            f"{option.path}: {said}, so that results would bear another's; write "
            f"`{key.rpartition('.')[2]}: {option.name}`, as the file is called"
        )


def _check_complete(chain: list[OptionFile]) -> None:
    """A profile says every number, or begins with one that does."""
    merged = OmegaConf.merge(OmegaConf.structured(HardwareSchema), *(option.hardware for option in chain))
    missing = sorted(key for key in OmegaConf.missing_keys(merged) if key != "name")
    missing += [f"operators.{name}" for name in operators() if name not in merged.operators]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{chain[-1].path}: {', '.join(missing[:3])}{more} are missing; give them, or begin with a card that has "
            f"them: `defaults: [rtx3090, _self_]` (docs/hardware.md)"
        )


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of all values, those of an empty mapping too; the dots within a source's own path stay."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and not path.startswith("hardware.sources."):
            yield from _leaves(value, path + ".")
        else:
            yield path, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def axes_of(mechanism: str, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """What a mechanism means, by dotted path: what its file sets, and the hints that it chooses. ValueError for a file
    that leaves an axis open, whose label would not say what is run."""
    option = read_option("mechanism", mechanism, folders)
    set_by_file = dict(_leaves(option.settings))
    axes = {
        "memory.kind": option.choices.get("memory"),
        "memory.pageable": set_by_file.get("memory.pageable", False),
        "placement.name": option.choices.get("placement"),
        "scheduler.admission": set_by_file.get("scheduler.admission"),
        "scheduler.preemption": set_by_file.get("scheduler.preemption"),
    }
    open_axes = [path.removesuffix(".kind").removesuffix(".name") for path, value in axes.items() if value is None]
    if "hints" not in option.choices:
        open_axes.append("hints")
    if open_axes:
        raise ValueError(
            f"{option.path}: a mechanism must say its {' and '.join(open_axes)}; see conf/mechanism/pinned_swap.yaml"
        )
    hints = read_option("hints", option.choices["hints"], folders).settings.get("hints") or {}
    return axes | {f"hints.{key!s}": value for key, value in OmegaConf.merge(HintsSchema, hints).items()}


def mark_sources(
    hardware: DictConfig,
    overrides: Iterable[Override],
    *,
    choices: Mapping[str, Any],
    folders: Sequence[Path] = (),
) -> None:
    """Give every number of a composed profile the source of whoever set it last: that file's own, or that of a file
    which begins with it; else "given by PROFILE, no source". What the command line changes is said to be given there.

    `choices`: the option of each group, as Hydra chose it.
    """
    last = ("hardware", "link", *(group for group in choices if group not in ("hardware", "link", "experiment")))
    files = [file for group in (*last, "experiment") for file in _setting_hardware(choices, group, folders)]
    setter: dict[str, int] = {}
    for index, file in enumerate(files):
        setter |= dict.fromkeys(_numbers(file.hardware), index)
    for path, index in setter.items():
        own = {key: text for file in files[index:] for key, text in file.sources.items()}
        near = _nearest(path, own)
        source = NO_SOURCE.format(files[index].name) if near is None else own[near]
        covering = _nearest(path, hardware.sources)
        if covering is None or hardware.sources[covering] != source:
            _set(hardware.sources, path, source)
    for override in overrides:
        path = override.key_or_group.removeprefix("hardware.")
        if path != override.key_or_group and path.split(".")[0] in NUMBERS:
            value = override.value()
            changed = dict(_leaves(value, path + ".")) if isinstance(value, dict) else {path: value}
            for leaf in changed:
                _set(hardware.sources, leaf, COMMAND_LINE)


def without_source(sources: Mapping[str, str]) -> dict[str, str]:
    """Numbers that were given with no source, and the option that gave each."""
    head, tail = NO_SOURCE.split("{}")
    return {
        path: text.removeprefix(head).removesuffix(tail)
        for path, text in sources.items()
        if text.startswith(head) and text.endswith(tail)
    }


def _setting_hardware(choices: Mapping[str, Any], group: str, folders: Sequence[Path]) -> list[OptionFile]:
    """The files of a chosen option that set anything of the profile."""
    path = find_option(group, str(choices.get(group)), folders)
    if path is None or (group not in ("hardware", "link", "experiment") and path.is_relative_to(names.CONF_DIR)):
        return []  # Ours of the other groups are about other things.
    return [file for file in read_chain(group, path.stem, folders) if file.hardware]


def _numbers(hardware: Mapping[str, Any]) -> list[str]:
    return [path for path, _ in _leaves(hardware) if path.split(".")[0] in NUMBERS]


def _nearest(path: str, sources: Iterable[Any]) -> str | None:
    """The most specific path among `sources` that covers `path`."""
    covering = [str(key) for key in sources if path == key or path.startswith(f"{key}.")]
    return max(covering, key=len, default=None)


def _set(sources: Any, path: str, text: str) -> None:
    # A path has dots, and one that the profile does not list yet is new to a struct.
    OmegaConf.set_struct(sources, False)
    sources[path] = text
