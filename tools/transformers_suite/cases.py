"""A test class for every registered architecture, from transformers' mixins.

What a class needs to know about an architecture comes from its config and from transformers' Auto
mappings, so a new one is tested as soon as it is registered.
"""

import dataclasses
import importlib
import os
import unittest
from typing import Any, ClassVar

import pytest
import torch
import transformers
from tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from minillm.models import registry

SHAPE = {
    "vocab_size": 99,  # odd on purpose: shards of the head are uneven
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # a quarter of it, rotated, must be more than one pair
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # mixtures of experts
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # linear attention
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
"""Small values for every shape field that an architecture may have; it takes those that it has."""

HEADS = {
    "base": (transformers.MODEL_MAPPING, modeling_auto.MODEL_MAPPING_NAMES),
    "causal_lm": (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    "sequence_classification": (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token_classification": (
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question_answering": (
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}

# transformers runs these for a few of its own architectures only; here for all of ours
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class SmallModel:
    """What transformers' tests call `model_tester`: a small config, inputs, and the classes."""

    batch_size, seq_length = 5, 7
    is_training = True
    num_labels = 3

    def __init__(self, architecture: str) -> None:
        importlib.import_module(registry.ARCHITECTURES[architecture][0])
        self.config_class = transformers.CONFIG_MAPPING[architecture]
        self.classes = {}
        for head, (mapping, names) in HEADS.items():
            found = mapping.get(self.config_class, None)
            if found is not None:
                # the tests know a class's task by its name in these tables, which `register`
                # leaves alone
                names[architecture] = found.__name__
                self.classes[head] = found
        fields = {f.name for f in dataclasses.fields(self.config_class)}
        self.shape = {name: value for name, value in SHAPE.items() if name in fields}
        if "kv_lora_rank" in fields:  # every head has keys of its own, made from the latent
            self.shape["num_key_value_heads"] = self.shape["num_attention_heads"]
        for name, value in self.shape.items():
            setattr(self, name, value)

    @property
    def base_model_class(self) -> type:
        return self.classes["base"]

    @property
    def causal_lm_class(self) -> type:
        return self.classes["causal_lm"]

    @property
    def sequence_classification_class(self) -> type:
        return self.classes["sequence_classification"]

    def get_config(self) -> Any:
        return self.config_class(**self.shape)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, SHAPE["vocab_size"], (self.batch_size, self.seq_length))
        lengths = torch.arange(self.batch_size) % self.seq_length + 1  # rows of 1, 2, 3 ... tokens
        mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Base(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """All that the archive has."""

    architecture = ""
    model_tester: Any = None
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}  # those tests download models

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = SmallModel(self.architecture)
        self.all_model_classes = tuple(self.model_tester.classes.values())
        self.config_tester = ConfigTester(self, config_class=self.model_tester.config_class)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class HybridOverrides:
    """For architectures with linear attention, whose layers have no weights to show."""

    def test_attention_outputs(self) -> None:
        """Not one matrix of weights for each layer, as usual, but one for each full layer."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        num_full = config.layer_types.count("full_attention")
        length = inputs["input_ids"].shape[1]
        for model_class in self.all_model_classes:
            for from_config in (False, True):
                config.output_attentions = from_config
                model = model_class(config).eval()
                asked = {} if from_config else {"output_attentions": True}
                with torch.no_grad():
                    weights = model(**inputs, **asked).attentions
                shape = (self.model_tester.batch_size, config.num_attention_heads, length, length)
                assert [tuple(w.shape) for w in weights] == [shape] * num_full


def _make(architecture: str) -> type:
    fields = {f.name for f in dataclasses.fields(SmallModel(architecture).config_class)}
    mixins = (HybridOverrides,) if "linear_num_key_heads" in fields else ()
    body = {"architecture": architecture, "all_model_classes": ()}
    made: type = type(f"Test_{architecture}", (*mixins, Base, unittest.TestCase), body)
    return pytest.mark.filterwarnings("default")(made)


for name in os.environ["MINILLM_SUITE_ARCHITECTURES"].split():
    globals()[f"Test_{name}"] = _make(name)
