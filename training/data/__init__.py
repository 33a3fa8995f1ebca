"""Images to train on: read from folders and data sets, and dealt out in batches."""

from training.data.cache import beside
from training.data.datasets import load
from training.data.images import DataError, Images
from training.data.options import LoadOptions

__all__ = ["DataError", "Images", "LoadOptions", "beside", "load"]
