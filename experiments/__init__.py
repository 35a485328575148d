"""Entry points of a checkout, python -m experiments.NAME: each calls the main function of a module."""
