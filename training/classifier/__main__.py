"""See `training.classifier.train`."""

import sys

from training.classifier.train import main

if __name__ == "__main__":
    sys.exit(main())
