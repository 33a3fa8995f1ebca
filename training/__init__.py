"""Makes EMA checkpoints from images. Each verb runs by `python -m training.VERB`:

- `train`: images → checkpoint
- `sample`: checkpoint → a folder of PNGs
- `evaluate`: checkpoint → Fréchet distance, precision, recall, copies
- `classifier`: images → the network in whose features `evaluate` compares
- `model_card`: checkpoint → its model card
- `export_checkpoint`: checkpoint → a smaller one, or one with other sampling defaults

The nouns are in `data`, `run` (a run's folder, options and records), `loop` (what a training step needs),
`evaluation` and `cli`.
"""
