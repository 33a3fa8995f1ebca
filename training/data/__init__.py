"""Images to train on: read from folders and data sets, and dealt out in batches."""

from training.data.datasets import DataError, Images, load

__all__ = ["DataError", "Images", "load"]
