"""The network: U-Net, layers, moving averages of weights."""
