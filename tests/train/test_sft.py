"""Fine-tuning: labels sit where they are predicted, dialogues in a row stay apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.data.sft import prepare_sft
from minillm.data.sft_rows import SftRows
from minillm.data.tokenizer import load_tokenizer
from minillm.data.windows import IGNORE
from minillm.errors import InputError
from minillm.log import Silent
from minillm.models import registry
from minillm.models.load import load_model
from minillm.settings import BatchConfig, PrepareSftConfig, ReportConfig, SftConfig
from minillm.train.metrics import read_metrics
from minillm.train.sft import SftSource, sft


@pytest.fixture(scope="module")
def dialogues(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed parquet of short dialogues."""
    folder = tmp_path_factory.mktemp("sft")
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"天地 {i}"},
                {"role": "assistant", "content": f"玄黄 {i}。"},
            ]
        }
        for i in range(200)
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "d.jsonl").write_text(text, encoding="utf-8")
    cfg = PrepareSftConfig(
        data=folder / "d.jsonl",
        out=folder / "sft.parquet",
        tokenizer=corpus / "tokenizer",
        sequence_length=128,
    )
    prepare_sft(cfg, Silent())
    return folder / "sft.parquet"


@pytest.fixture(scope="module")
def base_model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model folder with the corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    torch.manual_seed(0)
    config = registry.build_config(
        "mini_llama3:tiny",
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    registry.build_model(config).save_pretrained(folder)
    for file in (corpus / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def open_source(corpus: Path, dialogues: Path, max_length: int = 128) -> SftSource:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    rows = SftRows.open(dialogues, len(tokenizer))
    return SftSource(
        rows,
        pad_id=int(tokenizer.pad_token_id),
        max_length=max_length,
        seed=0,
        max_val_tokens=1024,
    )


def test_a_label_is_the_next_token_of_the_same_dialogue(corpus: Path, dialogues: Path) -> None:
    source = open_source(corpus, dialogues)
    batch = source.rows(0, 4)
    assert batch.position_ids is not None
    has_label = batch.shift_labels[:, :-1] != IGNORE
    assert has_label.sum() > 100
    assert (batch.shift_labels[:, :-1] == batch.input_ids[:, 1:])[has_label].all()
    # a label never crosses into the next dialogue, whose positions begin at 0
    assert (batch.position_ids[:, 1:][has_label] > 0).all()


def test_every_answer_is_learned_and_nothing_else(corpus: Path, dialogues: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    source = open_source(corpus, dialogues)
    batch = source.rows(0, 3)
    for labels in batch.shift_labels:
        text = tokenizer.decode(labels[labels != IGNORE])
        answers = [part for part in text.split("<|im_end|>") if part.strip()]
        assert answers
        if "minillm" not in text.lower():
            assert all(answer.startswith("玄黄") for answer in answers)


def test_rows_longer_than_the_run_allows_are_refused(corpus: Path, dialogues: Path) -> None:
    with pytest.raises(InputError, match="has a row of"):
        open_source(corpus, dialogues, max_length=16).rows(0, 4)


def test_packed_padding_does_not_change_the_loss(
    corpus: Path, dialogues: Path, base_model: Path
) -> None:
    model, _ = load_model(base_model)
    batch = open_source(corpus, dialogues).rows(0, 2)
    assert batch.position_ids is not None

    def loss(pad: int) -> float:
        arrays = (batch.input_ids, batch.shift_labels, batch.position_ids)
        ids, labels, positions = (
            torch.from_numpy(np.pad(array, ((0, 0), (0, pad)), constant_values=value))
            for array, value in zip(arrays, (0, IGNORE, 0), strict=True)
        )
        with torch.no_grad():
            output = model(
                input_ids=ids, shift_labels=labels, position_ids=positions, use_cache=False
            )
        return float(output.loss)

    assert loss(0) == pytest.approx(loss(9), abs=1e-5)


def test_an_official_llama_is_fine_tuned_too(
    corpus: Path, dialogues: Path, base_model: Path, tmp_path: Path
) -> None:
    model, _ = load_model(base_model)
    folder = tmp_path / "llama"
    model.export_official().save_pretrained(folder)
    for file in (corpus / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    batch = BatchConfig(batch_tokens=256, sequence_length=128, device="cpu", precision="fp32")
    report = ReportConfig(log_every=1, sample_tokens=0)
    losses = []
    for source in (folder, base_model):
        cfg = SftConfig(model=source, data=dialogues, steps=3, batch=batch, report=report)
        run, _ = sft(cfg, Silent(), out=tmp_path / f"run-{source.name}")
        losses.append([row["loss"] for row in read_metrics(run)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_sft_trains_and_leaves_a_model_that_loads(
    corpus: Path, dialogues: Path, base_model: Path, tmp_path: Path
) -> None:
    cfg = SftConfig(
        model=base_model,
        data=dialogues,
        steps=12,
        batch=BatchConfig(batch_tokens=256, sequence_length=128, device="cpu", precision="fp32"),
        report=ReportConfig(log_every=2, sample_tokens=2),
    )
    run, outcome = sft(cfg, Silent(), out=tmp_path / "run")
    assert outcome.exit_code == 0
    assert outcome.state.last_eval["loss"] < 0.8 * outcome.state.first_eval["loss"]
    load_model(run / "final")
