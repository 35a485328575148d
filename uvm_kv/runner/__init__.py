"""What is below the seam: the simulated GPU, real models, replay. `uvm_kv.runner.base` is the seam."""
