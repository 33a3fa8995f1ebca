"""How good samples are: features, distances, likelihoods, copies."""
