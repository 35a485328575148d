"""Whether CPU-backed KV helps a card, model and workload, with a range."""
