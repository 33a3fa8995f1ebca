"""Makes EMA checkpoints from images. Each verb runs by `python -m training.VERB`:

- `train`: images → checkpoint
- `distill`: checkpoint → a student of few steps, one network row each
- `sample`: checkpoint → a folder of PNGs
- `evaluate`: checkpoint → Fréchet distance, precision, recall, copies
- `classifier`: images → the network in whose features `evaluate` compares
- `fit_sampler`: checkpoint → the same one with schedules of few steps that were learned for it
- `model_card`: checkpoint → its model card
- `export_checkpoint`: checkpoint → a smaller one, or one with other sampling defaults
- `decay`: a run → a copy whose learning rate falls to 0

The nouns are in `data`, `run` (a run's folder, options and records), `loop` (what a training step needs),
`distillation`, `fitting`, `evaluation` and `cli`.
"""

import os

from model.malloc import tune_malloc

# A spare allocator of pyarrow's, which `datasets` brings along, starts a thread that blocks all signals: a fault in it
# ends the process without a traceback, whatever `faulthandler` is told. It has nothing to do, and is not started.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

# Where OpenMP's threads meet, those that are early sleep. By default they spin, and beside a busy neighbour a step
# takes several times as long: the late one waits for a core on which another spins. It is read when torch is loaded.
if "GOMP_SPINCOUNT" not in os.environ and "KMP_BLOCKTIME" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Steps on a CPU find their memory where the one before left it.
tune_malloc()
