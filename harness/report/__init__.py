"""What a reader of a run sees: comparisons, intervals, tables."""
