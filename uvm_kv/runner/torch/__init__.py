"""TorchRunner: a real Hugging Face model behind the seam, on the CPU. The only room that imports torch."""

from uvm_kv.runner.torch.model import (
    check_expressible,
    content_digest,
    load_model,
    load_tokenizer,
    materialize,
    random_model,
    smollm2_path,
)
from uvm_kv.runner.torch.runner import Sampling, TorchRunner

__all__ = [
    "Sampling",
    "TorchRunner",
    "check_expressible",
    "content_digest",
    "load_model",
    "load_tokenizer",
    "materialize",
    "random_model",
    "smollm2_path",
]
