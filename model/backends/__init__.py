"""The network as it runs fastest on a device."""
