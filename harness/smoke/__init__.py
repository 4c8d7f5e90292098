"""`smoke`: a few documents of each embedded benchmark, compared with a stored expectation."""
