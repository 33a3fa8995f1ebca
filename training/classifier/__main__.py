"""See `training.classifier.train`."""

import sys

from training.classifier.train import main

sys.exit(main())
