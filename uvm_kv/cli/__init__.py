"""uvm-kv: the command for what is around a run. Runs themselves are started with `python -m experiments.run`."""
