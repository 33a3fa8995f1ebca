"""The mathematics: U-Net, diffusion, samplers, random numbers, checkpoints. Needs torch, numpy and safetensors only."""
