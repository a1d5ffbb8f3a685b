"""Benchmarks: each is a script that writes its figures, with device and versions, to a CSV."""
