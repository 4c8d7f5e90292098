"""Benchmarks: lmms-eval's own task code, local data, suites, and the embedded look-alikes."""
