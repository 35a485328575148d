"""Prompt files: what a line may say, and which line is at fault where it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uvm_kv.workload.prompts import Prompt, read_prompts


def encode(text: str) -> list[int]:
    return [ord(character) % 50 for character in text]


def read(tmp_path: Path, content: str | bytes, *, tokenizer: bool = True) -> list[Prompt]:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(file, encode=encode if tokenizer else None, vocab_size=50, output_tokens=7)


def test_text_and_ids_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = ['{"prompt": "ab"}', "", '{"prompt_ids": [3, 0, 49], "output_tokens": 2}', "   ", '{"prompt": "c"}']
    assert read(tmp_path, "\n".join(lines)) == [
        Prompt(1, (47, 48), 7),
        Prompt(3, (3, 0, 49), 2),
        Prompt(5, (49,), 7),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_line_ends_and_byte_order_mark(end: str, tmp_path: Path) -> None:
    content = "\ufeff" + '{"prompt_ids": [1]}' + (end or "\n") + '{"prompt_ids": [2]}' + end
    assert [p.ids for p in read(tmp_path, content)] == [(1,), (2,)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b"])
def test_a_character_that_is_a_line_end_only_to_unicode(character: str, tmp_path: Path) -> None:
    """JSON allows it raw inside a string (but for control characters, which are escaped)."""
    text = json.dumps({"prompt": f"a{character}b"}, ensure_ascii=character == "\u000b")
    prompts = read(tmp_path, text + "\n" + '{"prompt_ids": [2]}')
    assert [len(p.ids) for p in prompts] == [3, 1]
    assert prompts[1].line == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{prompt: 1}", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt_ids": [' + b"1" * 5000 + b"]}", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'["a"]', "give either"),
        (b'"a"', "give either"),
        (b"{}", "give either"),
        (b'{"prompt": "a", "prompt_ids": [1]}', "give either"),
        (b'{"prompt": "a", "tokens": 3, "max": 4}', "max, tokens is unknown; allowed: prompt, prompt_ids, output"),
        (b'{"prompt": ""}', "the prompt has no token"),
        (b'{"prompt_ids": []}', "the prompt has no token"),
        (b'{"prompt": 5}', "prompt is 5; it must be text"),
        (b'{"prompt": null}', "prompt is None; it must be text"),
        (rb'{"prompt": "\ud800"}', "it must be text"),
        (b'{"prompt_ids": "1 2"}', "must be a list of whole numbers"),
        (b'{"prompt_ids": [1, 2.5]}', "must be a list of whole numbers"),
        (b'{"prompt_ids": [true]}', "must be a list of whole numbers"),
        (b'{"prompt_ids": [1, 50]}', "token id 50 is not below the vocabulary of 50"),
        (b'{"prompt_ids": [-1]}', "token id -1 is not below the vocabulary of 50"),
        (b'{"prompt_ids": [1], "output_tokens": -3}', "output_tokens is -3; it must be a whole number of at least 1"),
        (b'{"prompt_ids": [1], "output_tokens": 0}', "output_tokens is 0"),
        (b'{"prompt_ids": [1], "output_tokens": 1.5}', "output_tokens is 1.5"),
        (b'{"prompt_ids": [1], "output_tokens": true}', "output_tokens is True"),
        (b'{"prompt_ids": [1], "output_tokens": "4"}', "output_tokens is '4'"),
        (b'{"prompt_ids": [1], "output_tokens": null}', "output_tokens is None"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:20],
)
def test_an_error_names_the_line(line: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 3: ") as error:
        read(tmp_path, b'{"prompt_ids": [1]}\n\n' + line + b'\n{"prompt_ids": [1]}\n')
    assert message in str(error.value)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: the model has no tokenizer; give prompt_ids"):
        read(tmp_path, '{"prompt": "a"}', tokenizer=False)
    assert read(tmp_path, '{"prompt_ids": [1]}', tokenizer=False)


def test_a_tokenizer_may_not_leave_the_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="line 1: token id 97 is not below the vocabulary of 50"):
        read_prompts(file, encode=lambda text: [ord(c) for c in text], vocab_size=50, output_tokens=7)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_prompt(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts=.*prompts.jsonl holds no prompt"):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_prompts(path, encode=None, vocab_size=50, output_tokens=7)
