"""What a real runner serves: a model folder with its tokenizer, and the token ids of every request."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uvm_kv.config.names import CONF_DIR
from uvm_kv.config.schema import ConfigSchema
from uvm_kv.hw.hf_config import has_own_code
from uvm_kv.hw.host import available_host_bytes
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.kvcache.spec import KVCacheSpec
from uvm_kv.workload.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from uvm_kv.sched.request import Request


@dataclass(frozen=True)
class Serving:
    folder: Path | None
    """None: random weights of the config's geometry, by its seed."""
    prompts: list[Prompt] | None
    """None: random token ids of the workload's lengths."""
    tokenizer: Any | None
    stop_tokens: frozenset[int]
    chat_template: str | None = None
    """Whether text prompts went through the model's chat template, in words; None where there are none."""

    def fingerprint(self) -> str:
        """Hashes of what is served: the model's files and the prompts, by content."""
        from uvm_kv.runner.torch import content_digest

        if self.folder is None:
            return "random weights"  # The geometry and the seed stand beside this.
        weights = sorted((f.name, content_digest(f)) for f in self.folder.iterdir() if f.is_file())
        text = json.dumps([weights, self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()


def model_folder(config: ConfigSchema) -> Path:
    """The folder whose weights a real runner loads; a GGUF file is dequantized once."""
    from uvm_kv.runner.torch import materialize, smollm2_path

    if config.model.name == "smollm2_135m" and config.model.path is None:
        return materialize(smollm2_path())
    if config.model.path is None:
        raise ValueError(
            f"runner={config.runner} has no weights of model={config.model.name}; give model=hf model.path=DIR, "
            f"model=smollm2_135m, or model.weights=random"
        )
    path = Path(config.model.path)
    if not path.exists():
        raise ValueError(f"model.path={path}: there is no such folder or file")
    folder = materialize(path)
    if has_own_code(str(folder)):
        raise ValueError(
            f"model.path={path}: auto_map in config.json names code of the folder's own, which is never run here; only "
            f"models of transformers are served (if the model is one of them, take auto_map out of a copy)"
        )
    return folder


def prepare(config: ConfigSchema, folder: Path | None, geometry: ModelGeometry) -> Serving:
    """Tokenizer, stop tokens and prompts. With a prompts file the workload's lengths give way to the file's."""
    from uvm_kv.runner.torch import check_expressible, load_tokenizer

    workload = config.workload
    if folder is None:
        check_expressible(geometry)
    if config.prompts is None:
        if config.chat_template != ConfigSchema.chat_template:
            raise ValueError(f"chat_template={config.chat_template} is ignored without prompts=FILE; remove it")
        return Serving(folder, None, None, frozenset())
    if folder is None:
        raise ValueError(f"prompts={config.prompts} with model.weights=random, which has no tokenizer and no answers")
    path = Path(config.prompts)
    if not path.is_file() and not path.is_absolute():
        path = CONF_DIR.parent / path
    if not path.is_file():
        raise ValueError(f"prompts={config.prompts}: there is no such file")
    if workload.name != "prompts":
        raise ValueError(
            f"prompts={config.prompts} with workload={workload.name}, which has its own lengths; use workload=prompts"
        )
    given = {"prompt_tokens": workload.prompt_tokens, "lengths": workload.lengths, "path": workload.path}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"workload.{name}={value} is ignored with prompts={config.prompts}; remove one of them")
    if workload.arrival not in (None, "all_at_once", "poisson"):
        raise ValueError(
            f"workload.arrival={workload.arrival} with prompts={config.prompts}; allowed are all_at_once and poisson "
            f"(a closed loop would cut the outputs of its first requests short)"
        )
    if (workload.arrival == "poisson") != (workload.request_rate is not None):
        raise ValueError(
            f"workload.arrival={workload.arrival} with workload.request_rate={workload.request_rate}; a rate in "
            f"requests per second goes with workload.arrival=poisson, and only with it"
        )
    tokenizer = load_tokenizer(folder)
    encode = None if tokenizer is None else PromptEncoder(tokenizer, config.chat_template)
    assert workload.output_tokens is not None
    prompts = read_prompts(
        path,
        encode=encode,
        vocab_size=geometry.vocab_size,
        output_tokens=workload.output_tokens,
    )[: workload.num_requests]
    workload.num_requests = len(prompts)
    workload.arrival = workload.arrival or "all_at_once"
    used = None if encode is None or not encode.num_texts else encode.description
    return Serving(folder, prompts, tokenizer, _stop_tokens(folder), used)


class PromptEncoder:
    """Text -> token ids: as a user's message in the tokenizer's chat template, or as it is.

    `mode`: auto uses the template where the tokenizer has one; none leaves it out.
    """

    def __init__(self, tokenizer: Any, mode: str) -> None:
        self._tokenizer = tokenizer
        self.num_texts = 0
        has_template = bool(getattr(tokenizer, "chat_template", None))
        self._templated = mode == "auto" and has_template
        if self._templated:
            self.description = "the model's chat template"
        else:
            self.description = "none: " + ("chat_template=none" if has_template else "the tokenizer has no template")

    def __call__(self, text: str) -> list[int]:
        self.num_texts += 1
        if not self._templated:
            return list(self._tokenizer(text)["input_ids"])
        message = [{"role": "user", "content": text}]
        try:
            encoded = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # Templates are programs of their authors.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the model's chat template fails ({reason[0]}); use chat_template=none") from error
        return list(encoded["input_ids"])


def _stop_tokens(folder: Path) -> frozenset[int]:
    """End-of-sequence ids of the model, as `generate` would stop at them. ValueError for a file that says no ids."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        if not file.is_file():
            continue
        try:
            raw = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"model.path={folder}: {file.name} cannot be read ({error})") from None
        if not isinstance(raw, dict):
            raise ValueError(f"model.path={folder}: {file.name} is {str(raw)[:40]!r}; it must be an object")
        ids = raw.get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ValueError(f"model.path={folder}: eos_token_id is {str(ids)[:40]} in {file.name}; it must be ids")
            return frozenset(ids)
    return frozenset()


def random_ids(num_tokens: int, vocab_size: int, entropy: list[int]) -> tuple[int, ...]:
    rng = np.random.default_rng(entropy)
    return tuple(rng.integers(0, vocab_size, num_tokens).tolist())


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the system can give without swapping: files that it caches count as free, where it tells of them."""
    available = available_host_bytes(meminfo)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def tier_bytes(config: ConfigSchema, spec: KVCacheSpec, lengths: list[int]) -> tuple[int, int]:
    """Default sizes of both tiers: what the `batch_size` longest requests need, at most half of free memory in all."""
    longest = sorted(lengths, reverse=True)[: config.batch_size]
    needed = sum(spec.num_blocks(tokens) for tokens in longest) * spec.block_bytes
    device = config.memory.device_kv_bytes or needed
    host = config.memory.host_kv_bytes
    if host is None:
        host = 0 if config.memory.kind == "device" else needed
    free = free_host_bytes()
    if device + host > free // 2:
        raise ValueError(
            f"the KV tiers would take {device + host} bytes, more than half of the {free} bytes of free memory; lower "
            f"batch_size, memory.device_kv_bytes or memory.host_kv_bytes"
        )
    return device, host


def outputs(requests: list[Request], tokenizer: Any | None) -> list[dict[str, Any]]:
    """One object a request, in the order of the prompts: ids in and out, and the text where there is a tokenizer."""
    rows = []
    for request in sorted(requests, key=lambda r: r.id):
        row: dict[str, Any] = {
            "request_id": request.id,
            "prompt_ids": list(request.prompt_ids or ()),
            "output_ids": request.token_ids,
        }
        if tokenizer is not None:
            row["text"] = tokenizer.decode(request.token_ids, skip_special_tokens=True)
        rows.append(row)
    return rows
