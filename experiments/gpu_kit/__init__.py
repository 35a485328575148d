"""The kit for a machine with a GPU: nothing of uvm_kv imports it."""
