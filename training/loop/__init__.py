"""What a training step needs: optimizer, state, timesteps, losses, processes."""
