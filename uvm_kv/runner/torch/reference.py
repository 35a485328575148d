"""transformers' own generation: what the runner's tokens and its speed are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from uvm_kv.runner.torch.model import quiet


class Reference:
    """A model with transformers' attention. Its config is a copy: building a model can change the one it is given."""

    def __init__(self, folder: Path, dtype: str) -> None:
        with quiet():
            config = copy.deepcopy(AutoConfig.from_pretrained(str(folder), local_files_only=True))
            self.model = AutoModelForCausalLM.from_pretrained(
                str(folder), config=config, dtype=getattr(torch, dtype), local_files_only=True
            ).eval()
        assert self.model.config._attn_implementation in ("sdpa", "eager")
        # No stop token: every run puts out the same number of tokens.
        self.model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)

    def generate(self, prompts: list[list[int]], num_tokens: int, *, static: bool = False) -> list[list[int]]:
        """Greedy, one batch of prompts of one length."""
        ids = torch.tensor(prompts)
        cache: dict[str, Any] = {"cache_implementation": "static"} if static else {}
        with torch.inference_mode(), quiet():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **cache)
        return [row[ids.shape[1] :].tolist() for row in out]

    def generate_batch(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy, transformers' continuous batching."""
        config = GenerationConfig(pad_token_id=0, do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1)
        with torch.no_grad(), quiet():
            out = self.model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        rows = [list(result.generated_tokens) for result in out.values()]
        if [len(row) for row in rows] != [num_tokens] * len(prompts):
            raise RuntimeError(f"generate_batch gave {[len(row) for row in rows]} tokens for {len(prompts)} prompts")
        return rows
