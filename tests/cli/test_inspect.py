"""`minillm inspect` as a program: streams, exit codes, and what it does not load."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from minillm.cli.app import app
from minillm.data.tokenizer import plain_encoder, save_tokenizer, wrap
from minillm.data.train_tokenizer import train_backend

TEXTS = ("春眠不觉晓，处处闻啼鸟。", "The quick brown fox.", "夜来风雨声，花落知多少？")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *words])


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published sets are: `numpy.tofile`, no manifest."""
    folder = tmp_path_factory.mktemp("bin")
    tokenizer = wrap(train_backend(iter([TEXTS * 20]), 270))
    save_tokenizer(tokenizer, folder / "tokenizer")
    encoder = plain_encoder(tokenizer)
    ids = [i for text in TEXTS for i in [*encoder.encode(text).ids, tokenizer.eos_token_id]]
    np.array(ids, "<u2").tofile(folder / "a.bin")
    return folder / "a.bin"


def test_the_report_is_on_stdout_with_chinese_intact(token_file: Path) -> None:
    result = run(str(token_file))
    assert (result.exit_code, result.stderr) == (0, "")
    for text in TEXTS:
        assert f"  | {text}<|im_end|>\n" in result.stdout
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert max(cell_len(line) for line in lines if str(token_file) not in line) <= 80


def test_json_is_all_of_it(token_file: Path) -> None:
    result = run(str(token_file), "--json", "--samples", "1", "--seed", "3")
    tree = json.loads(result.stdout)
    assert tree["kind"] == "token file"
    assert tree["facts"]["documents"] == 3
    assert len(tree["facts"]["fingerprint"]) == 64
    assert len(tree["samples"]) == 1
    assert tree["samples"][0]["text"].removesuffix("<|im_end|>") in TEXTS
    assert (tree["num_problems"], tree["problems"]) == (0, [])


def test_a_problem_exits_with_3_and_still_reports(token_file: Path) -> None:
    path = token_file.with_name("b.bin")
    path.write_bytes(token_file.read_bytes() + b"\xff\xff\0")
    result = run(str(path))
    assert result.exit_code == 3
    assert "PROBLEM: 1 ids are outside the vocabulary of " in result.stdout
    assert result.stderr == f"2 problems in {path}\n"
    tree = json.loads(run(str(path), "--json").stdout)
    assert tree["num_problems"] == 2


def test_nothing_there_is_two_lines_and_3(tmp_path: Path) -> None:
    result = run(str(tmp_path / "x.bin"))
    assert (result.exit_code, result.stdout) == (3, "")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]


def test_a_token_file_needs_no_torch(token_file: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "minillm", "inspect", str(token_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "numpy" in loaded
    assert not loaded & {"torch", "tensorboard", "matplotlib"}
