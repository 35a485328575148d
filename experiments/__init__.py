"""Entry points, thin: each composes a config, calls the library and prints."""
