"""What a user does: sweeps, reports, profiles, smoke runs, training, checks of a machine."""
