"""What compression saves and costs in time, memory, tokens and energy. Needs no lmms-eval."""
