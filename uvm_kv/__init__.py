"""uvm-kv: does CPU-backed KV cache raise LLM serving throughput, when, by how much, through which mechanism?"""

__version__ = "0.1.0"
