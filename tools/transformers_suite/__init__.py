"""transformers' own model tests, run against the architectures of minillm."""
