"""Request: one sequence from arrival to its last token."""

from __future__ import annotations

from enum import Enum, auto


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    SWAPPED = auto()
    FINISHED = auto()
    CANCELLED = auto()


class Request:
    """`num_computed` tokens hold KV; `num_tokens` = prompt + generated. A step computes up to num_tokens of them and,
    when it reaches num_tokens, yields one more. The last token of an output is never computed."""

    __slots__ = (
        "id",
        "prompt_tokens",
        "output_tokens",
        "arrival_ns",
        "measured",
        "prompt_ids",
        "stop_tokens",
        "num_filled_tokens",
        "status",
        "num_computed",
        "num_tokens",
        "num_slots",
        "num_preemptions",
        "admitted_ns",
        "first_token_ns",
        "finish_ns",
        "token_ids",
    )

    def __init__(
        self,
        id: int,
        prompt_tokens: int,
        output_tokens: int,
        arrival_ns: int = 0,
        *,
        measured: bool = True,
        prompt_ids: tuple[int, ...] | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        num_filled_tokens: int = 0,
    ) -> None:
        """`measured` is False for requests that only bring the system into its steady state: no latency is taken.
        `num_filled_tokens` of the prompt already hold KV, which nobody computed, when it is first admitted."""
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(f"request {id}: {prompt_tokens} prompt and {output_tokens} output tokens; both need >= 1")
        assert 0 <= num_filled_tokens < prompt_tokens, "the last token's KV is what the first step computes"
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrival_ns = arrival_ns
        self.measured = measured
        self.prompt_ids = prompt_ids
        self.stop_tokens = stop_tokens
        self.status = Status.WAITING
        self.num_filled_tokens = self.num_computed = num_filled_tokens
        self.num_tokens = prompt_tokens
        self.num_slots = 0
        """Tokens that its blocks will hold by its end, of which the last is never computed; 0 while it has none."""
        self.num_preemptions = 0
        self.admitted_ns: int | None = None
        self.first_token_ns: int | None = None
        self.finish_ns: int | None = None
        self.token_ids: list[int] = []

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_tokens

    @property
    def max_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens
