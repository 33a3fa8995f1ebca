"""python -m training.classifier: trains the network whose features `training.evaluate` compares images in."""
