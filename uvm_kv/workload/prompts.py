"""Prompt files: one JSON object per line, {"prompt": text} or {"prompt_ids": [...]}, with output_tokens optional."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    line: int
    ids: tuple[int, ...]
    output_tokens: int


def read_prompts(
    path: Path, *, encode: Callable[[str], list[int]] | None, vocab_size: int, output_tokens: int
) -> list[Prompt]:
    """Prompts in the order of the file. `encode` turns text into ids; None where the model has no tokenizer.

    ValueError names the file and the line of what cannot be used.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"prompts={path} cannot be read: {error}") from None
    prompts = []
    # Lines end at \n alone: JSON strings may hold what else Unicode calls a line end.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"prompts={path}, line {number}"
        try:
            raw: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(raw, dict) or ("prompt" in raw) == ("prompt_ids" in raw):
            raise ValueError(f'{where}: give either {{"prompt": text}} or {{"prompt_ids": [...]}}')
        unknown = set(raw) - {"prompt", "prompt_ids", "output_tokens"}
        if unknown:
            raise ValueError(
                f"{where}: {', '.join(sorted(unknown))} is unknown; allowed: prompt, prompt_ids, output_tokens"
            )
        count = raw.get("output_tokens", output_tokens)
        if not _is_int(count) or count < 1:
            raise ValueError(f"{where}: output_tokens is {count!r}; it must be a whole number of at least 1")
        prompts.append(Prompt(number, _ids(raw, where, encode, vocab_size), count))
    if not prompts:
        raise ValueError(f"prompts={path} holds no prompt")
    return prompts


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(
    raw: dict[str, Any], where: str, encode: Callable[[str], list[int]] | None, vocab_size: int
) -> tuple[int, ...]:
    if "prompt" in raw:
        text = raw["prompt"]
        if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where}: prompt is {text!r}; it must be text")
        if encode is None:
            raise ValueError(f"{where}: the model has no tokenizer; give prompt_ids")
        ids = encode(text)
    else:
        ids = raw["prompt_ids"]
        if not isinstance(ids, list) or not all(_is_int(i) for i in ids):
            raise ValueError(f"{where}: prompt_ids is {ids!r}; it must be a list of whole numbers")
    beyond = [i for i in ids if not 0 <= i < vocab_size]
    if beyond:
        raise ValueError(f"{where}: token id {beyond[0]} is not below the vocabulary of {vocab_size}")
    if not ids:
        raise ValueError(f"{where}: the prompt has no token")
    return tuple(ids)
