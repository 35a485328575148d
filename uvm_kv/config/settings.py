"""What follows from the declarations of settings (`uvm_kv.setting`): errors for values that are not allowed and for
settings that a job ignores, and the settings that a job heeds, which its run id and its comparisons are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING

from uvm_kv.config.names import unknown
from uvm_kv.config.schema import ConfigSchema
from uvm_kv.setting import RULE, Role, Rule
from uvm_kv.types import OUR_ENGINE


@dataclass(frozen=True)
class Setting:
    path: str
    default: Any
    """`omegaconf.MISSING` where a group must choose."""
    rule: Rule


@cache
def settings() -> Mapping[str, Setting]:
    """Every declared setting of a job by its dotted path."""
    return {it.path: it for it in _declared(ConfigSchema, "")}


def _declared(schema: type, prefix: str) -> Iterator[Setting]:
    it: Field[Any]
    for it in fields(schema):
        if (rule := it.metadata.get(RULE)) is not None:
            yield Setting(prefix + it.name, it.default, rule)
        elif it.default_factory is not NO_DEFAULT and is_dataclass(it.default_factory):
            yield from _declared(it.default_factory, f"{prefix}{it.name}.")


def value_at(config: ConfigSchema, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def axis(path: str) -> str:
    """A path as it is typed: the option of a group is given to the group."""
    return path.removesuffix(".kind").removesuffix(".name")


def typed(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_values(config: ConfigSchema) -> None:
    """ValueError for a value outside what its setting allows."""
    values = [(it, value) for it in settings().values() if (value := value_at(config, it.path)) is not None]
    for it, value in values:
        if it.rule.allowed and value not in it.rule.allowed:
            raise unknown(it.path, str(value), [str(name) for name in it.rule.allowed])
    for it, value in values:
        if (bounds := it.rule.bounds()) is not None and not it.rule.admits(value):
            raise ValueError(f"{it.path}={value}; it must be {bounds}")


def check_heeded(config: ConfigSchema) -> None:
    """ValueError for a setting that is not at its default, and that the job ignores."""
    for it in settings().values():
        given = value_at(config, it.path)
        for other, users in it.rule.heeded.items():
            if given != it.default and other not in it.rule.lenient and _current(config, other) not in users:
                by = f"{axis(other)}={_current(config, other)}"
                raise ignored(it.path, given, by, f"{axis(other)}={' or '.join(users)}")


def ignored(path: str, given: Any, by: str, users: str) -> ValueError:
    """The error for a setting that is ignored `by` what is given, and heeded by `users`."""
    return ValueError(f"{path}={typed(given)} is ignored by {by} (it is used by {users}); remove it")


def _current(config: ConfigSchema, path: str) -> str:
    """The value of another setting; a replayed job is of its recording's runner."""
    recorded = config.replay.recorded_runner if path == "runner" else None
    return str(recorded or value_at(config, path))


GROUPS = {"hardware.managed.": {"memory.kind": ("managed",)}, "hardware.power.": {"runner": ("sim",)}}
"""Groups of hardware quantities by the beginning of their paths, with what a job heeds them for."""


def heeded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job, by dotted path, without those that it ignores."""
    current = {path: str(value) for path, value in values.items()}
    current.setdefault("engine", OUR_ENGINE)
    current["runner"] = str(values.get("replay.recorded_runner") or values["runner"])
    found = {}
    for path, value in values.items():
        it = settings().get(path)
        group = next((rule for start, rule in GROUPS.items() if path.startswith(start)), {})
        if all(current[other] in users for other, users in (it.rule.heeded if it is not None else group).items()):
            found[path] = value
    return found


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults of their settings. So a new setting changes only the runs that it is
    given to."""
    known = settings()
    return {path: value for path, value in values.items() if path not in known or value != known[path].default}


def is_variant(path: str) -> bool:
    """Whether a difference in the value at this path tells variants of a mechanism apart."""
    it = settings().get(path)
    return it is not None and it.rule.role is Role.VARIANT


def table() -> str:
    """All settings of a job as a table in Markdown: docs/settings.md."""
    lines = ["| setting | default | values | used with | a difference makes |", "|---|---|---|---|---|"]
    for it in settings().values():
        default = "" if it.default == MISSING else f"`{typed(it.default)}`"
        values = ", ".join(f"`{typed(value)}`" for value in it.rule.allowed) or it.rule.bounds() or ""
        users = "; ".join(f"`{axis(other)}={' or '.join(names)}`" for other, names in it.rule.heeded.items())
        lines.append(f"| `{axis(it.path)}` | {default} | {values} | {users} | {it.rule.role.value} |")
    return "\n".join(lines) + "\n"
