"""Serves checkpoints over HTTP, batching requests at every denoising step."""
