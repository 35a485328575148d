"""KV cache: spec, blocks, pools, block tables and memory ops. Pure Python, deterministic, no clock, no torch."""
