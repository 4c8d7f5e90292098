"""`doctor`: what this machine, this installation and these data lack."""
