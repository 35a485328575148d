"""TorchRunner: a real Hugging Face model behind the seam, on the CPU or on a GPU. The only room that imports torch."""

from uvm_kv.runner.torch.attention import compile_layers
from uvm_kv.runner.torch.cuda_kv import CudaKV
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
    "CudaKV",
    "Sampling",
    "TorchRunner",
    "check_expressible",
    "compile_layers",
    "content_digest",
    "load_model",
    "load_tokenizer",
    "materialize",
    "random_model",
    "smollm2_path",
]
