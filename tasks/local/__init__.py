"""Benchmarks on disk: where their files lie, how they get there, how upstream's task files are pointed at them."""
