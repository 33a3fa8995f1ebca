"""Other projects' weights to ours and back, one file per project."""
