"""The mathematics: U-Net, diffusion, samplers, noise, checkpoints. Needs torch, numpy, safetensors."""
