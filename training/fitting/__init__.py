"""Fitting a sampling schedule to a checkpoint: the solver that learns, its teacher, its loss."""
