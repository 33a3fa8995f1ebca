"""python -m tests.training.take_run LOG_DIR RESUME: takes the folder of the run `run`, as another training would."""

import sys

from training.run.config import TrainConfig
from training.run.run_dir import RunDir

if __name__ == "__main__":
    RunDir(TrainConfig(log_dir=sys.argv[1], run_name="run"), resume=sys.argv[2] == "True")
