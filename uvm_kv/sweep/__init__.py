"""Many jobs: executing, searching the best point, progress and resuming."""
