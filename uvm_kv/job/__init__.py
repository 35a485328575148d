"""One job: its settings are resolved, it is built, it runs."""
