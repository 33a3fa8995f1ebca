"""The console command `ddpm-serve`: it knows the modules of `app`, `model` and `training` by name, and runs them."""
