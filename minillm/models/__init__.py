"""Architectures, loading, sampling and generation.

Importing this package registers every architecture with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` takes a folder that minillm wrote.
"""

from minillm.models.deepseek_config import MiniDeepseekV3Config
from minillm.models.mini_deepseekv3 import (
    MiniDeepseekV3ForCausalLM,
    MiniDeepseekV3ForSequenceClassification,
    MiniDeepseekV3ForTokenClassification,
    MiniDeepseekV3Model,
)
from minillm.models.mini_llama3 import (
    MiniLlama3Config,
    MiniLlama3ForCausalLM,
    MiniLlama3ForSequenceClassification,
    MiniLlama3ForTokenClassification,
    MiniLlama3Model,
)
from minillm.models.mini_qwen3_next import (
    MiniQwen3NextForCausalLM,
    MiniQwen3NextForSequenceClassification,
    MiniQwen3NextForTokenClassification,
    MiniQwen3NextModel,
)
from minillm.models.mini_qwen3_next_config import MiniQwen3NextConfig

__all__ = [
    "MiniDeepseekV3Config",
    "MiniDeepseekV3ForCausalLM",
    "MiniDeepseekV3ForSequenceClassification",
    "MiniDeepseekV3ForTokenClassification",
    "MiniDeepseekV3Model",
    "MiniLlama3Config",
    "MiniLlama3ForCausalLM",
    "MiniLlama3ForSequenceClassification",
    "MiniLlama3ForTokenClassification",
    "MiniLlama3Model",
    "MiniQwen3NextConfig",
    "MiniQwen3NextForCausalLM",
    "MiniQwen3NextForSequenceClassification",
    "MiniQwen3NextForTokenClassification",
    "MiniQwen3NextModel",
]
