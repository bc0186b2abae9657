"""`prepare_sft` gives the same bytes with any processes and library, and however it was stopped."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm.data import sft_encode, sft_scan
from minillm.data.sft import prepare_sft
from minillm.log import Silent
from tests.data.sft_case import DIALOGUES, FOLDER, TOKENIZER, dialogue, settings


def test_any_number_of_processes_and_either_library_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks end in the middle of lines, in the middle of Chinese letters."""
    monkeypatch.setattr(sft_scan, "_CHUNK_BYTES", 997)
    monkeypatch.setattr(sft_encode, "_JOB_BYTES", 5_000)
    items = [dialogue(f"问题{i}：春眠不觉晓" * (1 + i % 7), "处处闻啼鸟。") for i in range(300)]
    results = []
    for workers, backend in ((1, "tokenizers"), (2, "tokenizers"), (1, "gigatoken")):
        cfg = settings(tmp_path, items, workers=workers, backend=backend, max_dialogues=100)
        results.append((prepare_sft(cfg, Silent()), cfg.out.read_bytes()))
    assert results[0][1] == results[1][1] == results[2][1]
    assert results[0][0].num_read == 300


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_encode, "_JOB_BYTES", 500)
    cfg = settings(tmp_path, out=tmp_path / "whole.parquet", workers=1)
    prepare_sft(cfg, Silent())
    counts: list[int] = []
    real = sft_encode._encode

    def stop_after(limit: int) -> None:
        def encode(job: Any) -> Any:
            counts.append(len(job.offsets))
            if len(counts) > limit:
                raise KeyboardInterrupt
            return real(job)

        counts.clear()
        monkeypatch.setattr(sft_encode, "_encode", encode)

    cfg = dataclasses.replace(cfg, out=tmp_path / "broken.parquet")
    for _ in range(2):
        stop_after(4)
        with pytest.raises(KeyboardInterrupt):
            prepare_sft(cfg, Silent())
        assert not cfg.out.exists()
    stop_after(10_000)
    prepare_sft(cfg, Silent())
    assert sum(counts) < 50  # of 60
    assert cfg.out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "broken.parquet.work").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 of the whole process, in the middle of encoding."""
    cfg = settings(tmp_path, DIALOGUES * 50, out=tmp_path / "whole.parquet")
    prepare_sft(cfg, Silent())
    out = tmp_path / "killed.parquet"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from minillm.data import sft, sft_encode\n"
        "from minillm.log import Silent\n"
        "from minillm.settings import IdentityConfig, PrepareSftConfig\n"
        "sft_encode._MARK_EVERY_S, sft_encode._JOB_BYTES = 0.0, 4_000\n"
        "real, count = sft_encode._encode, 0\n"
        "def encode(job):\n"
        "    global count\n"
        "    count += 1\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if count > 20 else real(job)\n"
        "sft_encode._encode = encode\n"
        f"sft.prepare_sft(PrepareSftConfig(data=Path({str(cfg.data)!r}), workers=1,\n"
        f"    out=Path({str(out)!r}), tokenizer=Path({str(FOLDER)!r}), sequence_length=128,\n"
        "    persona=IdentityConfig(identity=False)), Silent())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    mark = json.loads((tmp_path / "killed.parquet.work" / "log.json").read_bytes())
    assert 0 < mark["dialogues"] < 3000
    prepare_sft(dataclasses.replace(cfg, out=out), Silent())
    assert out.read_bytes() == cfg.out.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("killed*")) == ["killed.parquet"]


def test_a_log_of_other_settings_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_encode, "_JOB_BYTES", 500)
    cfg = settings(tmp_path, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minillm.data.sft.write_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_sft(cfg, Silent())
    assert (tmp_path / "sft.parquet.work").exists()
    report = prepare_sft(dataclasses.replace(cfg, min_tokens=30), Silent())
    assert report.num_too_short == sum(
        len(TOKENIZER.apply_chat_template(d["messages"], return_dict=False)) < 30 for d in DIALOGUES
    )


def test_tokenizers_takes_over_where_gigatoken_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm.data import encoder

    prepare_sft(settings(tmp_path, out=tmp_path / "slow.parquet", backend="tokenizers"), Silent())
    real = encoder.Encoder.encode

    def differ(self: Any, texts: Any) -> Any:
        if self._plan.is_fast:
            raise encoder.Mismatch("different")
        return real(self, texts)

    monkeypatch.setattr(encoder.Encoder, "encode", differ)
    sft_encode._load_encoder.cache_clear()
    prepare_sft(settings(tmp_path, backend="gigatoken"), Silent())
    assert (tmp_path / "sft.parquet").read_bytes() == (tmp_path / "slow.parquet").read_bytes()
