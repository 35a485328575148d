"""Text prompts go through the model's chat template, unless it has none or the user says so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.jobs import resolved
from uvm_kv.job.serving import PromptEncoder


class Tokenizer:
    """One id per character."""

    def __init__(self, template: str | None, error: str | None = None) -> None:
        self.chat_template = template
        self._error = error

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        assert options == {"add_generation_prompt": True, "return_dict": True}
        if self._error is not None:
            raise TypeError(self._error)
        (message,) = messages
        return self(f"<{message['role']}>{message['content']}<assistant>")


@pytest.mark.parametrize(
    ("template", "mode", "text", "said"),
    [
        ("...", "auto", "<user>hi<assistant>", "the model's chat template"),
        ("...", "none", "hi", "none: chat_template=none"),
        (None, "auto", "hi", "none: the tokenizer has no template"),
        (None, "none", "hi", "none: the tokenizer has no template"),
    ],
)
def test_a_text_prompt(template: str | None, mode: str, text: str, said: str) -> None:
    encode = PromptEncoder(Tokenizer(template), mode)
    assert encode.num_texts == 0
    assert "".join(map(chr, encode("hi"))) == text
    assert (encode.num_texts, encode.description) == (1, said)


def test_a_template_that_fails_is_answered_in_a_line() -> None:
    encode = PromptEncoder(Tokenizer("...", error="no roles\nhere"), "auto")
    with pytest.raises(ValueError, match=r"chat template fails \(no roles\); use chat_template=none"):
        encode("hi")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="chat_template 'yes' is unknown; allowed: auto, none"):
        resolved("chat_template=yes")
