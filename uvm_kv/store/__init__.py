"""Run directories, records, failures and provenance: writing, reading and checking them."""
