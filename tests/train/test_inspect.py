"""What `inspect` says of runs, checkpoints, models and folders of things."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minillm.data.inspect_report import Report
from minillm.data.inspect_show import show
from minillm.errors import InputError
from minillm.log import Silent
from minillm.models import registry
from minillm.models.interop.gguf import export_gguf
from minillm.models.summary import summarize
from minillm.settings import BatchConfig, InspectConfig, PretrainConfig, ReportConfig
from minillm.train.inspect import inspect
from minillm.train.metrics_file import read_metrics
from minillm.train.pretrain import pretrain


def look(path: Path, **given: Any) -> Report:
    return inspect(InspectConfig(path=path, **given), Silent())


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps."""
    cfg = PretrainConfig(
        model="mini_llama3:tiny",
        data=corpus / "tokens" / "text.bin",
        tokenizer=corpus / "tokenizer",
        steps=6,
        batch=BatchConfig(batch_tokens=128, sequence_length=64, device="cpu", precision="fp32"),
        report=ReportConfig(log_every=1, eval_every=3, save_every=2, eval_tokens=64, keep=2),
    )
    run, outcome = pretrain(cfg, Silent(), out=tmp_path_factory.mktemp("runs") / "pretrain-x-1")
    assert outcome.exit_code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "pretrain-x-1"))


def test_a_run_is_described(finished: Path) -> None:
    report = look(finished, verify=True)
    rows = read_metrics(finished)
    trained = [row for row in rows if row["kind"] == "train"]
    rated = [row for row in rows if row["kind"] == "eval"]
    best = min(rated, key=lambda row: row["bpb"])
    facts = report.facts
    assert (report.kind, report.num_problems) == ("run", 0)
    assert (facts["stage"], facts["model"]) == ("pretrain", "mini_llama3:tiny")
    assert (facts["state"], facts["step"]) == ("finished", 6)
    assert facts["last_loss"] == trained[-1]["loss"]
    assert facts["best_bits_per_byte"] == f"{best['bpb']:.4f} (step {best['step']})"
    assert facts["next"] == f"minillm chat --model {finished}"
    assert [value for _, value in report.bars[0].bars] == [round(r["loss"], 4) for r in trained]
    assert [row[::2] for row in report.tables[0].rows] == [
        ["step-0000004", True],
        ["step-0000006", True],
    ]
    assert report.parts[0].path.endswith("final")


def test_a_model_is_counted_by_its_headers(finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-0000006"
    report = look(checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    assert report.kind == "checkpoint"
    assert report.facts["parameters"] == sum(t.numel() for t in state.values())
    assert report.facts["step"] == 6
    assert sum(row[1] for row in report.tables[0].rows) == report.facts["parameters"]
    assert report.facts["dtypes"] == {"F32": report.facts["parameters"]}


@pytest.mark.parametrize("name", ["mini_deepseekv3:tiny", "mini_qwen3_next:tiny"])
def test_active_parameters_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    registry.build_model(registry.build_config(name)).save_pretrained(tmp_path)
    facts = look(tmp_path).facts
    count = summarize(name, 8).params
    assert (facts["parameters"], facts["active_parameters"]) == (count.total, count.active)


def test_a_stopped_run_says_how_to_go_on(run: Path) -> None:
    shutil.rmtree(run / "final")
    report = look(run)
    assert report.facts["state"] == "not finished"
    assert report.facts["resume"] == f"minillm pretrain --resume {run}"
    assert f"minillm pretrain --resume {run}" in "\n".join(show(report))
    assert report.parts[0].path.endswith("step-0000006")
    assert report.num_problems == 0


def _unmarked(run: Path) -> None:
    (run / "checkpoints" / "step-0000004" / "COMPLETE").unlink()


def _not_finite(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 7, "loss": NaN}\n')


def _torn(run: Path) -> None:
    place = run / "metrics.jsonl"
    lines = place.read_text().splitlines()
    place.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")


def _no_toml(run: Path) -> None:
    (run / "run.toml").write_text("[")


def _other_tokenizer(run: Path) -> None:
    place = run / "final" / "tokenizer.json"
    tree = json.loads(place.read_text())
    tree["normalizer"] = {"type": "NFC"}
    place.write_text(json.dumps(tree))


def _truncated(run: Path) -> None:
    place = run / "final" / "model.safetensors"
    place.write_bytes(place.read_bytes()[:-100])


def _infinite(run: Path) -> None:
    place = run / "final" / "model.safetensors"
    state = load_file(place)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, place, metadata={"format": "pt"})


def _fewer_rows(run: Path) -> None:
    place = run / "final" / "model.safetensors"
    state = load_file(place)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:380].clone()
    save_file(state, place)


def _layer_gone(run: Path) -> None:
    place = run / "final" / "model.safetensors"
    state = {name: t for name, t in load_file(place).items() if ".layers.1." not in name}
    save_file(state, place)


def _no_tokenizer(run: Path) -> None:
    (run / "final" / "tokenizer.json").unlink()


def _shard_gone(run: Path) -> None:
    tree = {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
    (run / "final" / "model.safetensors.index.json").write_text(json.dumps(tree))


def _pickled(run: Path) -> None:
    (run / "final" / "model.safetensors").rename(run / "final" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_unmarked, "`checkpoints/step-0000004` was not written to its end"),
        (_not_finite, "the loss is not finite in 1 lines of the log, first at step 7"),
        (_torn, "`metrics.jsonl` line 2 is not JSON"),
        (_no_toml, "`run.toml` is not valid TOML"),
        (_other_tokenizer, "it was trained with tokenizer"),
        (_truncated, "`model.safetensors` is truncated or corrupt"),
        (_infinite, "`model.norm.weight` holds values that are not finite"),
        (_fewer_rows, "its embedding has 380 rows, its config says 384"),
        (_fewer_rows, "its tokenizer has 384 tokens, its embedding 380 rows"),
        (_layer_gone, "there are no weights for layer 1"),
        (_no_tokenizer, "it has no tokenizer"),
        (_shard_gone, "`model-00002-of-00002.safetensors` is missing"),
        (_pickled, "`pytorch_model.bin` is a pickle, which is never read"),
    ],
)
def test_damage_to_a_run_is_told(run: Path, change: Callable[[Path], None], said: str) -> None:
    change(run)
    report = look(run, verify=True)
    assert any(said in line for part in (report, *report.parts) for line in part.problems), report


def test_a_checkpoint_without_its_end_is_told(run: Path) -> None:
    _unmarked(run)
    assert "not written to its end" in look(run / "checkpoints" / "step-0000004").problems[0]
    (run / "checkpoints" / "step-0000006" / "trainer_state.safetensors").write_bytes(b"x")
    assert "trainer_state" in look(run / "checkpoints" / "step-0000006").problems[0]


def test_gguf_is_described(finished: Path, tmp_path: Path) -> None:
    export_gguf(finished, tmp_path / "out", "f32")
    path = next((tmp_path / "out").glob("*.gguf"))
    report = look(path)
    with safe_open(finished / "final" / "model.safetensors", framework="pt") as tensors:
        sizes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    assert report.problems == []
    assert report.facts["parameters"] == sum(torch.Size(s).numel() for s in sizes.values())
    assert report.facts["vocabulary"] == 384
    assert report.facts["pre_tokenizer"] == "qwen2"
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged" in look(path).problems[0]


def test_a_folder_is_summed_up(corpus: Path, run: Path) -> None:
    work = run.parent
    shutil.copytree(corpus / "tokens", work / "tokens")
    shutil.copytree(corpus / "tokenizer", work / "tokens" / "tokenizer")
    shutil.copyfile(corpus / "text.txt", work / "text.txt")
    (work / "tokens" / "lost.bin.json").write_text("{}")
    (work / "photo.jpg").write_bytes(b"x")
    (work / "loop").symlink_to(work)
    report = look(work)
    assert [(row[0], row[1]) for row in report.tables[0].rows] == [
        (".", "documents (txt)"),
        ("pretrain-x-1", "run"),
        ("tokens", "folder"),
    ]
    assert [part.kind for part in report.parts[2].parts] == ["token file", "tokenizer"]
    assert report.parts[2].problems == ["`lost.bin.json` is a manifest without its file"]
    assert report.num_problems == 1
    assert "1 other files" in report.notes[0]


def test_a_folder_with_two_tokenizers_is_told(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "tokens", tmp_path / "tokens")
    place = tmp_path / "tokens" / "text.bin"
    shutil.copyfile(place, place.with_name("b.bin"))
    manifest = json.loads(place.with_name("text.bin.json").read_text())
    other = manifest | {"tokenizer_sha256": "f" * 64}
    place.with_name("b.bin.json").write_text(json.dumps(other))
    assert "made with 2 tokenizers" in look(tmp_path / "tokens").problems[0]


@pytest.mark.parametrize("name", ["nothing", "photo.jpg", "empty"])
def test_what_is_not_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file or folder|is none of"):
        look(tmp_path / name)


def test_pickled_weights_are_no_token_file(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert "pickle" in look(tmp_path / "pytorch_model.bin").problems[0]
