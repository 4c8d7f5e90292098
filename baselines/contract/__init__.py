"""The contract between a compressor and the rest: data types, budgets, the registry, shared arithmetic."""
