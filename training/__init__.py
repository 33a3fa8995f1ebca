"""Makes EMA checkpoints from images. Each verb runs by `python -m training.VERB`:

- `train`: images → checkpoint
- `distill`: checkpoint → a student of few steps, one network row each
- `sample`: checkpoint → a folder of PNGs
- `evaluate`: checkpoint → Fréchet distance, precision, recall, copies
- `classifier`: images → the network in whose features `evaluate` compares
- `model_card`: checkpoint → its model card
- `export_checkpoint`: checkpoint → a smaller one, or one with other sampling defaults
- `decay`: a run → a copy whose learning rate falls to 0

The nouns are in `data`, `run` (a run's folder, options and records), `loop` (what a training step needs),
`distillation`, `evaluation` and `cli`.
"""

import os

# A spare allocator of pyarrow's, which `datasets` brings along, starts a thread that blocks all signals: a fault in it
# ends the process without a traceback, whatever `faulthandler` is told. It has nothing to do, and is not started.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
