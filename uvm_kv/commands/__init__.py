"""The main functions behind every entry point."""
