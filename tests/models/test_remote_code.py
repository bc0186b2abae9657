"""A folder with its own code: loaded by transformers where there is no minillm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.errors import ConfigError
from minillm.models import registry
from minillm.models.interop.remote_code import flatten, write_remote_code

IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))

# blocks minillm as a machine without it would: any import of it fails
SCRIPT = """
import json, sys
sys.modules["minillm"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
folder, out = sys.argv[1:]
trust = {"trust_remote_code": True}
ids = torch.load(folder + "/ids.pt")
model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
with torch.no_grad():
    logits = model(ids).logits
    new = model.generate(ids, max_new_tokens=6, do_sample=False)
    hidden = AutoModel.from_pretrained(folder, **trust).eval()(ids).last_hidden_state
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        assert auto.from_pretrained(folder, **trust)(ids).logits.shape[-1] == 2
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, **trust).eval()
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits)
model.train()
loss = model(ids, labels=ids).loss
loss.backward()
torch.save({"logits": logits, "new": new, "hidden": hidden, "loss": loss.detach()}, out + "/got.pt")
"""


def make_tiny(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "max_position_embeddings": 64, "num_experts": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    known = registry.build_config(architecture).to_dict()
    if "kv_lora_rank" in known:
        fields["num_key_value_heads"] = 4
    config = registry.build_config(
        architecture, **{name: value for name, value in fields.items() if name in known}
    )
    return registry.build_model(config).eval()


@pytest.mark.parametrize("architecture", list(registry.ARCHITECTURES))
def test_folder_works_where_minillm_cannot_be_imported(architecture: str, tmp_path: Path) -> None:
    model = make_tiny(architecture)
    folder, out = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    write_remote_code(folder, model)
    torch.save(IDS, folder / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(out)],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(out / "got.pt")
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], model(IDS).logits, atol=1e-6, rtol=0)
        hidden = model.model(IDS).last_hidden_state
        torch.testing.assert_close(got["hidden"], hidden, atol=1e-6, rtol=0)
    new = model.generate(IDS, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert torch.equal(got["new"], new)
    torch.testing.assert_close(got["loss"], model.train()(IDS, labels=IDS).loss.detach())


@pytest.mark.parametrize("architecture", list(registry.ARCHITECTURES))
def test_file_defines_every_name_once_and_knows_nothing_of_minillm(architecture: str) -> None:
    import ast

    tree = ast.parse(flatten(registry.ARCHITECTURES[architecture][0], architecture))
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    names = [name for name in names if name != "_"]
    assert sorted(names) == sorted(set(names))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [name for name in modules if name.startswith("minillm")]


def test_auto_map_names_every_head(tmp_path: Path) -> None:
    model = make_tiny("mini_llama3")
    model.save_pretrained(tmp_path)
    path = write_remote_code(tmp_path, model)
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    text = path.read_text(encoding="utf-8")
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} < set(auto_map)
    assert {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"} < set(auto_map)
    for target in auto_map.values():
        module, name = target.split(".")
        assert (module, f"\nclass {name}(" in text) == (path.stem, True)


def test_official_architectures_need_no_code(tmp_path: Path) -> None:
    class Fake:
        config = PreTrainedConfig()

    Fake.config.model_type = "llama"
    with pytest.raises(ConfigError, match="llama"):
        write_remote_code(tmp_path, Fake())  # type: ignore[arg-type]
