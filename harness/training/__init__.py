"""`train`: the commands around `models.training`."""
