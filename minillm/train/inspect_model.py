"""`minillm inspect` of model folders, checkpoints and GGUF files, from their headers alone."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minillm import paths
from minillm.data.inspect_report import Report, Sample, Table
from minillm.data.tokenizer import fingerprint, load_tokenizer
from minillm.errors import InputError, SetupError

_PARTS = (
    ("embedding", r"embed_tokens|token_embd|wte\b"),
    ("output head", r"lm_head|^output\."),
    ("experts", r"experts?\.|_exps"),
    ("router", r"router|mlp\.gate\b|gate_inp"),
    ("linear attention", r"linear_attn|ssm_"),
    ("norms", r"norm"),
    ("attention", r"attn|attention"),
    ("feed-forward", r"mlp|feed_forward|ffn"),
)
_BUFFERS = ("e_score_correction_bias", "rotary_emb.inv_freq")
_SHAPE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass
class _Weights:
    """Shapes and dtypes of all tensors, and what is wrong with their files."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: "Counter[str]" = field(default_factory=Counter)
    size_bytes: int = 0

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Add a tensor, unless it is a buffer, which no gradient reaches."""
        if name.endswith(_BUFFERS):
            return
        self.shapes[name] = shape
        self.dtypes[dtype] += _numel(shape)

    def part_table(self) -> Table:
        """Return parameters by the kind of module."""
        sums: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            kind = next((kind for kind, like in _PARTS if re.search(like, name)), "other")
            sums[kind] += _numel(shape)
        total = max(1, sums.total())
        rows = [[kind, n, f"{n / total:.1%}"] for kind, n in sums.most_common()]
        return Table("parameters", ["part", "parameters", "share"], rows)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def inspect_model(folder: Path, *, verify: bool = False) -> Report:
    """Describe a folder with a `config.json`: a checkpoint, a `final`, an export, a download.

    Args:
        folder: The folder.
        verify: Also look for weights that are not finite, which loads torch.
    """
    is_checkpoint = folder.absolute().parent.name == "checkpoints"
    report = Report(folder.as_posix(), "checkpoint" if is_checkpoint else "model folder")
    if is_checkpoint and not paths.is_complete(folder):
        report.problems.append("it was not written to its end: there is no `COMPLETE` in it")
    config = _read_json(folder / "config.json", report)
    weights = _read_weights(folder, report)
    total = sum(_numel(shape) for shape in weights.shapes.values())
    report.facts = {
        "model_type": config.get("model_type", "?"),
        "parameters": total,
        **_active(weights, config, total),
        "dtypes": dict(weights.dtypes.most_common()),
        "size_bytes": weights.size_bytes,
        **{name: config[name] for name in _SHAPE_FIELDS if config.get(name) is not None},
        "vocabulary": config.get("vocab_size", "?"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
    }
    if weights.shapes:
        report.tables.append(weights.part_table())
        _check_shapes(weights, config, report)
    _add_tokenizer(folder, weights, report)
    _add_position(folder, report)
    if verify:
        _find_infinite(folder, report)
    return report


def _read_json(path: Path, report: Report) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        report.problems.append(f"`{path.name}` is not valid JSON: {err}")
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_weights(folder: Path, report: Report) -> _Weights:
    weights = _Weights()
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
        extra = f"; `{pickled.name}` is a pickle, which is never read" if pickled else ""
        report.problems.append(f"it has no weights: no `model.safetensors`{extra}")
    for path in files:
        weights.size_bytes += path.stat().st_size
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    piece = tensors.get_slice(name)
                    weights.add(name, tuple(piece.get_shape()), str(piece.get_dtype()))
        except (SafetensorError, OSError) as err:
            report.problems.append(f"`{path.name}` is truncated or corrupt: {err}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(_read_json(index, report).get("weight_map", {}).values())
        for missing in sorted(listed - {path.name for path in files})[:3]:
            report.problems.append(f"`{missing}` is missing, which `{index.name}` names")
    return weights


def _active(weights: _Weights, config: dict[str, Any], total: int) -> dict[str, int]:
    """Return the parameters that a token meets, for mixtures of experts.

    Layers beyond `num_hidden_layers` predict further tokens in training and are left out.
    """
    chosen = config.get("num_experts_per_tok")
    count = next(
        (
            config[k]
            for k in ("num_experts", "n_routed_experts", "num_local_experts")
            if k in config
        ),
        None,
    )
    if not isinstance(chosen, int) or not isinstance(count, int) or not 0 < chosen < count:
        return {}
    last = config.get("num_hidden_layers", 1 << 30)
    beyond = routed = 0
    for name, shape in weights.shapes.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= last:
            beyond += _numel(shape)
        elif ".experts." in name:
            routed += _numel(shape)
    return {"active_parameters": total - beyond - routed * (count - chosen) // count}


def _embedding_rows(weights: _Weights) -> int | None:
    found = (s for name, s in weights.shapes.items() if re.search(_PARTS[0][1], name) and s)
    return next((shape[0] for shape in found), None)


def _check_shapes(weights: _Weights, config: dict[str, Any], report: Report) -> None:
    rows, stated = _embedding_rows(weights), config.get("vocab_size")
    if rows is not None and isinstance(stated, int) and rows != stated:
        report.problems.append(f"its embedding has {rows:,} rows, its config says {stated:,}")
    layers = {int(n) for name in weights.shapes for n in re.findall(r"layers\.(\d+)\.", name)}
    wanted = config.get("num_hidden_layers")
    if isinstance(wanted, int) and layers and (missing := set(range(wanted)) - layers):
        report.problems.append(
            f"its config says {wanted} layers, there are no weights for layer {min(missing)}"
        )


def _add_tokenizer(folder: Path, weights: _Weights, report: Report) -> None:
    if not (folder / "tokenizer.json").is_file():
        report.problems.append("it has no tokenizer: no `tokenizer.json`")
        return
    try:
        tokenizer = load_tokenizer(folder)
        report.facts["fingerprint"] = fingerprint(folder)
    except InputError as error:
        report.problems.append(str(error))
        return
    report.facts["tokenizer"] = f"{len(tokenizer):,} tokens"
    rows = _embedding_rows(weights)
    if rows is not None and len(tokenizer) > rows:
        report.problems.append(
            f"its tokenizer has {len(tokenizer):,} tokens, its embedding {rows:,} rows"
        )
    if tokenizer.chat_template is None:
        report.notes.append("it has no chat template")


def _add_position(folder: Path, report: Report) -> None:
    """Add where training stands, from `trainer_state`."""
    place = folder / "trainer_state.json"
    if not place.is_file():
        return
    state = _read_json(place, report)
    report.facts |= {k: state[k] for k in ("step", "samples", "tokens") if k in state}
    if isinstance(state.get("last_eval"), dict):
        report.facts["last_evaluation"] = {
            k: v for k, v in state["last_eval"].items() if isinstance(v, (int, float))
        }
    try:
        with safe_open(folder / "trainer_state.safetensors", framework="np"):
            pass
    except (SafetensorError, OSError) as err:
        report.problems.append(f"`trainer_state.safetensors` cannot be read: {err}")


def _find_infinite(folder: Path, report: Report) -> None:
    import torch

    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                        report.problems.append(f"`{name}` holds values that are not finite")
        except (SafetensorError, OSError):  # reported before
            continue


def inspect_gguf(path: Path) -> Report:
    """Describe a GGUF file.

    Raises:
        SetupError: The `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SetupError(
            "the package `gguf` is not installed", hint="`pip install 'minillm-lab[gguf]'`"
        ) from None
    report = Report(path.as_posix(), "GGUF model")
    report.facts["size_bytes"] = path.stat().st_size
    try:
        reader = GGUFReader(path)
        fields = {name: item.contents() for name, item in reader.fields.items()}
        tensors = [(t.name, tuple(map(int, t.shape)), t.tensor_type.name) for t in reader.tensors]
    except Exception as err:  # whatever numpy says about missing bytes
        report.problems.append(f"it is no GGUF file, or a damaged one: {err}".splitlines()[0])
        return report
    weights = _Weights()
    for name, shape, dtype in tensors:
        weights.add(name, shape, dtype)
    kind = str(fields.get("general.architecture", "?"))
    names = ("block_count", "embedding_length", "context_length", "attention.head_count")
    tokens = fields.get("tokenizer.ggml.tokens") or []
    report.facts |= {
        "architecture": kind,
        "name": str(fields.get("general.name", "")),
        "parameters": sum(_numel(shape) for _, shape, _ in tensors),
        "tensors": len(tensors),
        "dtypes": dict(weights.dtypes.most_common()),
        **{n: fields[f"{kind}.{n}"] for n in names if f"{kind}.{n}" in fields},
        "vocabulary": len(tokens),
        "pre_tokenizer": str(fields.get("tokenizer.ggml.pre", "none")),
        "chat_template": "tokenizer.chat_template" in fields,
    }
    report.tables.append(weights.part_table())
    embedding = weights.shapes.get("token_embd.weight")
    if embedding is None:
        report.problems.append("it has no `token_embd.weight`")
    elif tokens and len(tokens) > max(embedding):
        report.problems.append(
            f"its tokenizer has {len(tokens):,} tokens, its embedding {max(embedding):,} rows"
        )
    blocks = {int(n) for name in weights.shapes for n in re.findall(r"^blk\.(\d+)\.", name)}
    count = fields.get(f"{kind}.block_count")
    if isinstance(count, int) and (missing := set(range(count)) - blocks):
        report.problems.append(
            f"it says {count} blocks, there are no tensors for block {min(missing)}"
        )
    if tokens:
        report.samples.append(Sample("last tokens", "  ".join(map(repr, tokens[-6:]))))
    return report
