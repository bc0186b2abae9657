"""`minillm demo`: every step of the pipeline on the bundled text, ending in a model that answers.

Each step leaves its result below the output folder and is skipped when the result is there, so a
demo stopped at any moment continues where it was. Nothing is fetched.
"""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from minillm import paths
from minillm.data.binfile import TokenFile
from minillm.data.merge import merge_bin
from minillm.data.sft import prepare_sft
from minillm.data.stratify import stratify
from minillm.data.tokenize import tokenize
from minillm.data.train_tokenizer import train_tokenizer
from minillm.files import folder_lock, write_text
from minillm.log import Progress
from minillm.models.generator import Generator
from minillm.models.load import load_model
from minillm.models.sampling import SamplingParams
from minillm.settings import (
    BatchConfig,
    DemoConfig,
    MergeBinConfig,
    OptimConfig,
    PrepareSftConfig,
    PrepareTokenizerConfig,
    PretrainConfig,
    ReportConfig,
    SftConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
)
from minillm.train.loop import Outcome
from minillm.train.pretrain import pretrain
from minillm.train.sft import sft

QUESTIONS = ("你是谁？", "Who are you?", "中国的首都是哪里？")

_VOCAB_SIZE = 6_140  # + 4 chat tokens: a bigger table would cost a tiny model most of its time
_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Size:
    """How long a demo preset trains."""

    pretrain_steps: int
    sft_steps: int


SIZES = {
    "quick": Size(60, 60),
    "standard": Size(300, 240),
    "long": Size(1600, 800),
}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made."""

    answers: tuple[tuple[str, str], ...]
    model: Path
    pretrain: Outcome
    sft: Outcome
    seconds: float
    """Wall time of this call."""


def run_demo(cfg: DemoConfig, progress: Progress) -> DemoResult | int:
    """Run the pipeline; return the result, or the exit code of a run stopped by a signal.

    Raises:
        RunError: Another demo is writing to the same folder.
    """
    started = time.monotonic()
    out = cfg.out
    if cfg.fresh and (out / "demo.json").is_file():
        shutil.rmtree(out)
    with folder_lock(out):
        _check_preset(cfg)
        tokenizer, tokens, dialogues = _prepare(out, progress)
        first = _pretrain(cfg, tokenizer, tokens, progress)
        if first.exit_code:
            return first.exit_code
        second = _sft(cfg, dialogues, progress)
        if second.exit_code:
            return second.exit_code
        model = out / "runs" / "sft-demo-1" / "final"
        answers = answer(model, QUESTIONS)
    return DemoResult(answers, model, first, second, time.monotonic() - started)


def answer(model_folder: Path, questions: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Ask each question in a conversation of its own, greedily."""
    model, tokenizer = load_model(model_folder)
    generator = Generator(model, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=64)
    pairs = []
    for question in questions:
        prompt = generator.encode_chat([{"role": "user", "content": question}])
        pairs.append((question, generator.generate(prompt, params).text.strip()))
    return tuple(pairs)


def _check_preset(cfg: DemoConfig) -> None:
    """Start anew when what lies in the folder was made with another preset."""
    note = cfg.out / "demo.json"
    wanted = json.dumps({"preset": cfg.preset, **dataclasses.asdict(SIZES[cfg.preset])})
    if note.is_file() and note.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(cfg.out / "runs", ignore_errors=True)
    write_text(note, wanted)


def _prepare(out: Path, progress: Progress) -> tuple[Path, Path, Path]:
    """Make tokenizer, token file and dialogues; return their paths."""
    sample, tokenizer, tokens = out / "sample", out / "tokenizer", out / "tokens"
    merged, dialogues = out / "pretrain.bin", out / "sft.parquet"
    bundled = Path(paths.BUNDLED)
    if not (tokenizer / "tokenizer.json").is_file():
        stratify(PrepareTokenizerConfig(data=bundled, out=sample, sample_ratio=0.3), progress)
        train_tokenizer(
            TrainTokenizerConfig(data=sample, out=tokenizer, vocab_size=_VOCAB_SIZE), progress
        )
    tokenize(TokenizeConfig(data=bundled, out=tokens, tokenizer=tokenizer), progress)
    if not merged.is_file() or not merged.with_name(merged.name + ".json").is_file():
        merge_bin(MergeBinConfig(data=tokens, out=merged), progress)
    TokenFile.open(merged, verify=True)
    if not dialogues.is_file():
        prepare_sft(
            PrepareSftConfig(out=dialogues, tokenizer=tokenizer, sequence_length=_LENGTH), progress
        )
    return tokenizer, merged, dialogues


def _pretrain(cfg: DemoConfig, tokenizer: Path, tokens: Path, progress: Progress) -> Outcome:
    settings = PretrainConfig(
        model="mini_llama3:tiny",
        data=tokens,
        tokenizer=tokenizer,
        steps=SIZES[cfg.preset].pretrain_steps,
        optim=OptimConfig(lr=3e-3, decay_ratio=0.6),
        batch=BatchConfig(batch_tokens=4_096, sequence_length=_LENGTH, device=cfg.device),
        report=ReportConfig(eval_tokens=32_768, sample_tokens=32),
    )
    run = cfg.out / "runs" / "pretrain-demo-1"
    return pretrain(settings, progress, out=run, resume=(run / paths.RUN_FILE).is_file())[1]


def _sft(cfg: DemoConfig, dialogues: Path, progress: Progress) -> Outcome:
    settings = SftConfig(
        model=cfg.out / "runs" / "pretrain-demo-1" / "final",
        data=dialogues,
        steps=SIZES[cfg.preset].sft_steps,
        optim=OptimConfig(lr=2e-3, muon_lr=1e-2, weight_decay=0.0, decay_ratio=0.6),
        batch=BatchConfig(batch_tokens=4_096, sequence_length=_LENGTH, device=cfg.device),
        report=ReportConfig(eval_tokens=16_384, sample_tokens=32),
    )
    run = cfg.out / "runs" / "sft-demo-1"
    return sft(settings, progress, out=run, resume=(run / paths.RUN_FILE).is_file())[1]
