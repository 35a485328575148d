"""Records, run directories, provenance, energy. A number travels with its origin."""
