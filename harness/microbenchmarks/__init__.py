"""Benchmarks of single parts, run by hand; nothing else imports them except tests."""
