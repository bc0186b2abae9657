"""What a run measures: lines, what TensorBoard shows, pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minillm.log import Silent
from minillm.settings import BatchConfig, PretrainConfig, ReportConfig
from minillm.train.heatmap import draw_heatmap
from minillm.train.metrics import MetricLog, read_metrics, split_metrics
from minillm.train.pretrain import pretrain
from minillm.train.run_record import read_run
from minillm.train.state import TrainState

LOADS = {"expert_load/layer_1": [0.5, 1.5, 1.0, 1.0], "expert_load/layer_2": [0.0, 3.0, 1.0, 0.0]}


@pytest.fixture
def board(tmp_path: Path) -> Any:
    """TensorBoard's own reader of a run with two training lines and an evaluation."""
    log = MetricLog(tmp_path, TrainState())
    log.write("eval", 0, {"loss": 6.0, "bpb": 3.0})
    log.write("train", 10, {"loss": 5.0, "lr": 1e-3}, LOADS)
    log.write("eval", 10, {"loss": 4.5, "bpb": 2.0})
    log.write_text("sample/0", 10, "从前 → 有座山")
    log.close()
    reader = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "images": 0})
    return reader.Reload()


def test_split_of_scalars_and_vectors() -> None:
    metrics = {"a": torch.tensor(2.5), "load/x": torch.tensor([0.25, 4.0]), "b": torch.tensor(7)}
    assert split_metrics(metrics) == ({"a": 2.5, "b": 7.0}, {"load/x": [0.25, 4.0]})
    assert split_metrics({}) == ({}, {})


def test_the_file_keeps_extremes_and_at_evaluations_the_whole(board: Any, tmp_path: Path) -> None:
    first, line, evaluation = read_metrics(tmp_path)
    assert "expert_load" not in first
    assert {k: v for k, v in line.items() if "expert" in k} == {
        "expert_load_max": 3.0,
        "expert_load_min": 0.0,
    }
    assert evaluation["expert_load"] == {"layer_1": [0.5, 1.5, 1.0, 1.0], "layer_2": [0, 3, 1, 0]}


def test_tensorboard_shows_every_layer_the_map_and_samples(board: Any) -> None:
    scalars = {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}
    assert scalars["train/loss"] == 5.0
    assert scalars["eval/bpb"] == 2.0
    assert scalars["expert_load_max_to_min/layer_1"] == 3.0
    assert scalars["expert_load_max_to_min/layer_2"] == pytest.approx(300)  # idle counts as 0.01
    assert scalars["expert_load_max/layer_2"] == 3.0
    assert scalars["expert_load_min/layer_1"] == 0.5
    (image,) = board.Images("expert_load")
    assert image.step == 10
    assert image.width > 300
    (tag,) = [tag for tag in board.Tags()["tensors"] if tag.startswith("sample")]
    text = board.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert text == "从前 → 有座山"


def test_loads_that_were_not_measured_yet_are_not_shown(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, TrainState())
    log.write("train", 1, {"loss": 5.0}, {"expert_load/layer_0": [0.0, 0.0]})
    log.write("eval", 1, {"loss": 5.0})
    log.close()
    assert [set(row) for row in read_metrics(tmp_path)] == [{"kind", "step", "loss"}] * 2


def test_heat_map_has_a_cell_of_its_color_for_each_number() -> None:
    pixels = draw_heatmap({"layer_0": [2.0, 1.0], "layer_1": [1.0, 0.0]}, "load")
    assert pixels.dtype == np.uint8
    dark_red, dark_blue = (103, 0, 31), (5, 48, 97)  # the ends of RdBu
    found = {}
    for name, color in (("red", dark_red), ("blue", dark_blue)):
        is_color = (np.abs(pixels.astype(int) - color).sum(-1) < 12).nonzero()
        left = is_color[1] < pixels.shape[1] * 0.6  # right of it is the scale
        found[name] = (is_color[0][left].mean(), is_color[1][left].mean())
    assert found["red"][0] < found["blue"][0]  # above
    assert found["red"][1] < found["blue"][1]  # and to the left


def test_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, TrainState())
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"kind": "train", "step": 4})[:-5])
    MetricLog(tmp_path, TrainState(step=2, eval_step=0)).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_run_with_experts_shows_their_balance(corpus: Path, tmp_path: Path) -> None:
    losses = {"sequence_aux_loss", "mtp_loss"}
    cfg = PretrainConfig(
        model="mini_deepseekv3:tiny",
        data=corpus / "tokens" / "text.bin",
        tokenizer=corpus / "tokenizer",
        steps=2,
        batch=BatchConfig(
            batch_tokens=128, sequence_length=64, micro_batch=1, device="cpu", precision="fp32"
        ),
        report=ReportConfig(log_every=1, eval_every=2, eval_tokens=64, sample_tokens=0),
    )
    run, outcome = pretrain(cfg, Silent(), out=tmp_path / "run")
    rows = read_metrics(run)
    line = next(row for row in rows if row["kind"] == "train")
    assert losses < line.keys()
    assert line["flops"] == line["tokens"] * read_run(run).flops
    assert line["seconds"] <= outcome.state.train_seconds
    loads = rows[-1]["expert_load"]
    assert loads.keys() == {"layer_1", "layer_2", "layer_3", "layer_4"}
    for load in loads.values():
        assert np.mean(load) == pytest.approx(1.0, abs=1e-3)  # of what was rounded
    assert rows[-2]["expert_load_max"] == pytest.approx(max(map(max, loads.values())), abs=1e-3)
    board = EventAccumulator(str(run)).Reload()
    assert [image.step for image in board.Images("expert_load")] == [2]
    assert {f"train/{name}" for name in losses} < set(board.Tags()["scalars"])
    assert "![experts](experts.png)" in (run / "report.md").read_text(encoding="utf-8")
