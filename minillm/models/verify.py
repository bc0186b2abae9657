"""Checks that every way of computing the same logits gives the same logits.

For "my cached output differs": each check compares one path (a cache, padding, packing, a
compiler, another program) with one forward pass over whole sequences, and says how far they are
apart at most. Errors are relative to the largest logit, so that one tolerance suits all models.
"""

import contextlib
import copy
import difflib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache

from minillm import paths
from minillm.device import pick_device
from minillm.errors import InputError, SetupError
from minillm.models import registry
from minillm.models.base import MiniPreTrainedModel
from minillm.models.load import load_model

TOLERANCE = 2e-5
"""Of logits in fp32, relative to the largest: rounding of sums in another order."""

GGUF_TOLERANCE = 1e-4
"""llama.cpp has its own exponentials and multiplies some matrices in lower precision."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "曹操大怒，拔剑斩之。人工智能正在改变世界！",
    "混合 English 和中文，以及全角：ＡＢＣ１２３。",
    "👋🏽 family: 👨‍👩‍👧‍👦, flags: 🇨🇳🇩🇪",
    "3.14159 + 2,718 = 1e-5? 0x1F600 2026-01-31",
    "def f(x):\n\treturn {'a': [x**2, None]}  # \\n\r\n\n\n",
    "  leading, trailing and   inner spaces  ",
    "café naïve Straße Ελλάδα Россия العربية हिन्दी",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: how far apart, and how far may be."""

    name: str
    error: float
    tolerance: float

    @property
    def is_ok(self) -> bool:
        """Whether the error is within its tolerance; NaN is not."""
        return self.error <= self.tolerance


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    num_tokens: int = 48,
    with_compile: bool = True,
    seed: int = 0,
) -> Iterator[Check]:
    """Compare all paths; yield each check when it is done.

    Args:
        model: Any causal LM, in fp32 and evaluation mode.
        tokenizer: Its tokenizer, to be checked too.
        num_tokens: Length of the sequences, at least 16.
        with_compile: Also compile the model, which takes from seconds to minutes.
        seed: Of the random tokens.

    Raises:
        SetupError: There is no compiler.
    """
    draw = torch.Generator().manual_seed(seed)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    ids_BT = torch.randint(vocab_size, (3, num_tokens), generator=draw).to(model.device)
    full_BTV = _logits(model, ids_BT)
    scale = full_BTV.abs().max().item()

    def check(name: str, logits: Tensor, expected: Tensor = full_BTV) -> Check:
        error = (logits.float() - expected.float()).abs().max().item() / scale
        return Check(name, error, TOLERANCE)

    yield check("one token at a time", _in_pieces(model, ids_BT, [1] * num_tokens))
    if isinstance(model, MiniPreTrainedModel):
        cache = model.make_cache(len(ids_BT), num_tokens)
        own = _in_pieces(model, ids_BT, [num_tokens - 8, *[1] * 8], cache)
        yield check("the generator's cache", own)
    chunks = [7, 1, num_tokens // 4]
    yield check("prompt in chunks", _in_pieces(model, ids_BT, [*chunks, num_tokens - sum(chunks)]))
    yield check("padded on the left", *_left_padded(model, ids_BT))
    yield check("documents in one row", *_packed(model, ids_BT))
    if with_compile:
        yield check("compiled", _compiled(model, ids_BT))
    if isinstance(model, MiniPreTrainedModel):
        official = model.export_official().eval()
        yield check(type(official).__name__, _logits(official, ids_BT))
    if tokenizer is not None and isinstance(model, MiniPreTrainedModel) and has_llama_cpp():
        # left out where llama.cpp does not know the architecture, or not this shape of it
        with contextlib.suppress(InputError, KeyError):
            gguf_TV = _llama_cpp(model, tokenizer, ids_BT[0])
            error = (gguf_TV - full_BTV[0].cpu()).abs().max().item() / scale
            yield Check("GGUF in llama.cpp", error, GGUF_TOLERANCE)
    if tokenizer is not None:
        yield check_tokenizer(tokenizer, vocab_size)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Check:
    """Count the texts that do not come back as they were, or have ids outside the model."""
    wrong = 0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        wrong += again != text or max(ids) >= vocab_size
    return Check("tokenizer, texts changed", wrong, 0)


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every weight a value that no convention can hide: norms not 1, biases not 0.

    Matrices keep the size of their output; vectors get a tenth added.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.1)
    return model


def load(source: str, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model to check, in fp32, and its tokenizer.

    A name of the registry means random weights (good for checking, not for talking) and the
    tokenizer in the package; anything else is for `load_model`.

    Raises:
        ConfigError: A name much like one of the registry.
        InputError: No model there, or it is broken.
        SetupError: The device is not there.
    """
    chosen = pick_device(device)
    is_name = source in registry.names() or (
        not Path(source).exists()
        and "/" not in source
        and (":" in source or difflib.get_close_matches(source, registry.names(), cutoff=0.8))
    )
    if not is_name:
        return load_model(source, device=chosen)
    config = registry.build_config(source)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # not every weight is made anew by `randomize`
        model = randomize(registry.build_model(config))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.BUNDLED_TOKENIZER)
    model.to(chosen)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _logits(model: PreTrainedModel, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False, **kwargs).logits
    return logits


def _in_pieces(
    model: PreTrainedModel, ids_BT: Tensor, sizes: list[int], cache: Cache | None = None
) -> Tensor:
    """Return the logits of sequences that are fed piece by piece."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = ids_BT.split(sizes, dim=1)
    return torch.cat(
        [model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in pieces], dim=1
    )


def _left_padded(model: PreTrainedModel, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of prompts of three lengths decoded together, and of each alone."""
    num_rows, num_tokens = ids_BT.shape
    num_steps = 6
    mask_BT = torch.ones_like(ids_BT)
    for row in range(num_rows):
        mask_BT[row, : row * num_tokens // 4] = 0
    padded_BT = ids_BT * mask_BT
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, start, parts = DynamicCache(config=model.config), 0, []
    for end in range(num_tokens - num_steps, num_tokens + 1):
        output = model(
            input_ids=padded_BT[:, start:end],
            attention_mask=mask_BT[:, :end],
            position_ids=positions_BT[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
        start = end
    together = torch.cat(parts, dim=1)
    alone = [_logits(model, ids_BT[r : r + 1, mask_BT[r].bool()])[0] for r in range(num_rows)]
    return together[mask_BT.bool()], torch.cat(alone)


def _packed(model: PreTrainedModel, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of documents in one row, told apart by positions, and of each alone."""
    row = ids_BT[:1]
    lengths = [1, 5, row.shape[1] // 3]
    lengths.append(row.shape[1] - sum(lengths))
    positions = torch.cat([torch.arange(n, device=row.device) for n in lengths])[None]
    alone = [_logits(model, piece) for piece in row.split(lengths, dim=1)]
    return _logits(model, row, position_ids=positions), torch.cat(alone, dim=1)


def _compiled(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    torch.compiler.reset()
    # a copy: compiling leaves traces in a module
    forward = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)
    with _compiler_errors():
        logits: Tensor = forward(input_ids=ids_BT, use_cache=False).logits
    return logits


def has_llama_cpp() -> bool:
    """Tell whether a GGUF file can be written and run here."""
    return all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


def _llama_cpp(
    model: MiniPreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids_T: Tensor
) -> Tensor:
    """Return the logits of an exported fp32 file, `(T, V)`."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    gguf = importlib.import_module("minillm.models.interop.gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf.write_gguf(model, tokenizer, path, "f32")
        size = len(ids_T)
        engine = llama_cpp.Llama(
            str(path),
            n_ctx=max(256, size),
            n_batch=max(256, size),
            logits_all=True,
            type_k=0,  # fp32 keys and values
            type_v=0,
            verbose=False,
        )
        try:
            engine.eval(ids_T.tolist())
            return torch.tensor(engine.scores[:size])
        finally:
            engine.close()


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    try:
        yield
    except torch._inductor.exc.InvalidCxxCompiler:
        raise SetupError(
            "`torch.compile` finds no C++ compiler",
            hint="`sudo apt-get install g++`, or leave this check out with `--no-compile`",
        ) from None
