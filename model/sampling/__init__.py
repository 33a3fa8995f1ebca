"""Sampling: schedules (a sampler as a table), solvers, timesteps, noise, and the step."""
