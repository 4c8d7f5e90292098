"""A sweep: from a spec to the cells of a run folder."""
