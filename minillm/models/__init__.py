"""Architectures, loading, sampling and generation.

Importing this package registers every architecture with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` takes a folder that minillm wrote.
"""

from minillm.models.mini_llama3 import (
    MiniLlama3Config,
    MiniLlama3ForCausalLM,
    MiniLlama3ForSequenceClassification,
    MiniLlama3ForTokenClassification,
    MiniLlama3Model,
)

__all__ = [
    "MiniLlama3Config",
    "MiniLlama3ForCausalLM",
    "MiniLlama3ForSequenceClassification",
    "MiniLlama3ForTokenClassification",
    "MiniLlama3Model",
]
