"""The comparison of the methods: see benchmarks/compare.py."""


class Refused(Exception):
    """Wrong usage, or a manifest that cannot be used: one line for the user, exit code 2."""
