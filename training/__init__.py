"""Makes EMA checkpoints from images. Every file here that is a verb runs by `python -m training.…`."""
