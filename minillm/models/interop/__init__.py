"""Checkpoints of other tools: official transformers folders, GGUF, published Mini-LLM models."""
