"""How the embedded checkpoint is trained from scratch: `train tiny`."""
