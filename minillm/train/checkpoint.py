"""Checkpoints that are whole or not there.

A checkpoint is written into a hidden folder, fsynced, marked `COMPLETE`, and renamed. What a kill
leaves behind is a hidden folder that the next save removes. Only safetensors and JSON are
written, so nothing is ever unpickled.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from minillm.errors import InputError
from minillm.files import fsync_folder, fsync_tree, named_os_errors, sha256_file
from minillm.paths import is_complete
from minillm.train.distributed import like, local, whole
from minillm.train.job import Job
from minillm.train.lora import is_adapter, merge
from minillm.train.optim import load_optimizer_tensors, optimizer_tensors
from minillm.train.state import TrainState, load_rng_tensors, rng_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_STATE = "trainer_state"
_LORA = "lora."


class CheckpointWriter:
    """Writes folders of a run in the background: training goes on once everything is copied.

    One write at a time; the next one waits for it. Only the main process writes, but with shards
    all processes must take part in the copying.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pool.submit(int)  # starts the thread while there is memory for it
        self._pending: Future[None] | None = None

    def save_checkpoint(self, optimizers: Sequence[Optimizer], state: TrainState) -> None:
        """Copy the whole state of the run and write `checkpoints/step-NNNNNNN`.

        Raises:
            SetupError: The disk is full; earlier checkpoints are untouched. Raised here for the
                write before, and by `wait` for this one.
        """
        self.wait()  # before copying: never two copies of a run in memory
        job = self._job
        weights = _copies(job.model.state_dict(), keep=job.world.is_main)
        tensors = _copies(optimizer_tensors(job.model, optimizers), keep=job.world.is_main)
        tensors |= {_LORA + name: weights[name] for name in weights if is_adapter(name)}
        if job.lora is not None and job.world.is_main:
            weights = merge(weights, job.lora)
        for own in job.world.gather(rng_tensors(job.device, job.world.rank)):
            tensors |= own
        text = json.dumps(state.to_json(), indent=1)
        target = job.run / "checkpoints" / f"step-{state.step:07d}"

        def fill(folder: Path) -> None:
            save_model(folder, job.model, job.tokenizer_folder, weights)
            plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(plain, folder / f"{_STATE}.safetensors")
            (folder / f"{_STATE}.json").write_text(text, encoding="utf-8")

        def write() -> None:
            write_folder(target, fill)
            prune_checkpoints(job.run, job.report.keep)

        self._begin(write)

    def save_weights(self, target: Path) -> None:
        """Copy the weights and write a model's folder: `final`, `best`."""
        self.wait()
        job = self._job
        copies = _copies(job.model.state_dict(), keep=job.world.is_main)
        is_merged = job.lora is not None and job.world.is_main
        weights = merge(copies, job.lora) if is_merged and job.lora else copies

        def fill(folder: Path) -> None:
            save_model(folder, job.model, job.tokenizer_folder, weights)

        self._begin(lambda: write_folder(target, fill))

    def _begin(self, write: Callable[[], None]) -> None:
        if self._job.world.is_main:
            self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raise what went wrong with a write that has ended; do not wait for one that has not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def settle(self) -> None:
        """Let a write end, well or not: what stops the run is another error."""
        if self._pending is not None:
            self._pending.exception()

    def wait(self) -> None:
        """Return when everything is on the disk; raise what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copies(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copy tensors to the CPU, each storage once; nothing where `keep` is false."""
    made: dict[Any, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if not keep:
            continue
        place = (_address(tensor), tensor.shape)
        if place not in made:
            made[place] = full.to("cpu", copy=True)
        copies[name] = made[place]
    return copies


def _address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; tied weights share it."""
    return local(tensor).data_ptr()


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer_folder: Path, weights: dict[str, Tensor]
) -> None:
    """Write weights, config and tokenizer: what `AutoModelForCausalLM.from_pretrained` takes."""
    model.save_pretrained(folder, state_dict=weights)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def write_folder(target: Path, fill: Any) -> None:
    """Make `target` appear at once, with what `fill(folder)` writes and a `COMPLETE` marker."""
    part = target.with_name(f".{target.name}.part")
    try:
        with named_os_errors(target), _safetensors_os_errors():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            fill(part)
            sums = {p.name: sha256_file(p) for p in sorted(part.iterdir())}
            (part / "COMPLETE").write_text(json.dumps(sums, indent=1), encoding="utf-8")
            fsync_tree(part)
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
            fsync_folder(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _safetensors_os_errors:  # noqa: N801 - reads as a context, like contextlib's
    """Safetensors reports a full disk as its own error: make it an OSError again."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, SafetensorError) and "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error


def check_files(folder: Path) -> None:
    """Compare the files of a checkpoint with the hashes that were written with it.

    Raises:
        InputError: One is missing or has changed.
    """
    with _named_damage(folder):
        text = (folder / "COMPLETE").read_text(encoding="utf-8")
        for name, sha256 in (json.loads(text) if text else {}).items():
            if sha256_file(folder / name) != sha256:
                raise ValueError(f"`{name}` is not what was written")


def load_weights(folder: Path, job: Job) -> None:
    """Restore the weights of a checkpoint in place, all of them or the shards that are here.

    With LoRA the frozen ones are those that the run began with, and stay.

    Raises:
        InputError: A file is missing or damaged, or of another model.
    """
    model = job.model
    model_class: Any = type(model)
    if job.lora is not None:
        with _named_damage(folder):
            tensors = load_file(folder / f"{_STATE}.safetensors")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                local(parameter.data).copy_(local(like(tensors[_LORA + name], parameter)))
        return
    with _named_damage(folder):
        # by the model's own class: names on disk may differ from those in memory (experts)
        loaded, info = model_class.from_pretrained(
            folder, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong or loaded.state_dict().keys() != model.state_dict().keys():
        raise InputError(f"checkpoint `{folder}` does not fit the model: {', '.join(wrong[:3])}")
    for name, tensor in model.state_dict().items():
        own = like(loaded.state_dict()[name].to(tensor.device), tensor)
        local(tensor).copy_(local(own))


def load_position(folder: Path) -> TrainState:
    """Read where a checkpoint stands.

    Raises:
        InputError: The file is missing or damaged.
    """
    with _named_damage(folder):
        text = (folder / f"{_STATE}.json").read_text(encoding="utf-8")
        return TrainState.from_json(json.loads(text))


def load_optimizers(folder: Path, job: Job, optimizers: Sequence[Optimizer]) -> None:
    """Restore the state of optimizers and random generators in place.

    Raises:
        InputError: The file is missing or damaged.
    """
    with _named_damage(folder):
        tensors = load_file(folder / f"{_STATE}.safetensors")
    load_optimizer_tensors(
        job.model, optimizers, {k: v for k, v in tensors.items() if k[0].isdigit()}
    )
    load_rng_tensors(tensors, job.device, job.world.rank)


@contextmanager
def _named_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"checkpoint `{folder}` is damaged: {error}",
            hint=f"remove it (`rm -r {folder}`) and resume again from the one before",
        ) from None


def newest_checkpoint(run: Path) -> Path | None:
    """Return the latest complete checkpoint of a run."""
    return next(iter(_complete(run)), None)


def good_checkpoint(run: Path, bad_steps: Collection[int]) -> Path | None:
    """Return the latest complete checkpoint whose weights are not bad themselves.

    Where the two steps after it were both not finite, it is not the rows that are to blame.
    """
    for path in _complete(run):
        step = _step_of(path)
        if not {step + 1, step + 2} <= set(bad_steps):
            return path
    return None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints."""
    for old in _complete(run)[keep:]:
        (old / "COMPLETE").unlink()  # first: a half-removed checkpoint must not count
        shutil.rmtree(old)


def _complete(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoints/step-*") if is_complete(path)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
