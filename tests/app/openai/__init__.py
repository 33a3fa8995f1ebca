"""The openai package against a real server, and what its answers are made of."""
