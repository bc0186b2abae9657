"""Validation: loss, perplexity, bits per byte, and samples of text."""

import math

import numpy as np
import torch

from minillm.data.windows import IGNORE
from minillm.models.generator import Generator
from minillm.models.sampling import SamplingParams
from minillm.train.job import Job


@torch.no_grad()
def evaluate(job: Job, rows_each: int) -> dict[str, float]:
    """Measure the model on all validation samples.

    Args:
        job: What is trained.
        rows_each: Rows of one forward pass: what training fits into memory fits here.

    Returns:
        `loss` in nats per token, `ppl` = exp(loss), and `bpb`: the bits to encode every token,
        separators included, over the UTF-8 bytes of the text. Bits per byte is the one figure
        that compares models with different tokenizers.
    """
    job.model.eval()
    world, num_val = job.world, job.source.num_val
    nats, tokens, text_bytes = 0.0, 0.0, 0.0
    num_batches = -(-num_val // rows_each)
    for turn in range(-(-num_batches // world.size)):
        # each process takes its batches in turn; one that has none left computes another's again,
        # because with shards all must take part
        index = turn * world.size + world.rank
        is_own = index < num_batches
        first = (index if is_own else 0) * rows_each
        rows = job.source.val_rows(first, min(rows_each, num_val - first))
        valid = rows.shift_labels != IGNORE
        num_valid = int(valid.sum())
        with job.autocast():
            loss = job.model(**job.tensors(rows), **job.loss_options(num_valid)).loss
        if is_own:
            nats += float(loss) * num_valid
            tokens += num_valid
            text_bytes += int(job.byte_lengths[rows.shift_labels[valid]].sum())
    job.model.train()
    nats, tokens, text_bytes = world.sum(nats, tokens, text_bytes)
    if tokens == 0:
        return {}
    loss_per_token = nats / tokens
    return {
        "loss": loss_per_token,
        "ppl": math.exp(min(loss_per_token, 700.0)),
        "bpb": nats / math.log(2) / max(1, text_bytes),
    }


def write_samples(job: Job) -> list[tuple[str, str]]:
    """Continue the source's prompts greedily; return (prompt, continuation) pairs."""
    if not job.report.sample_tokens:
        return []
    job.model.eval()
    generator = Generator(job.model, job.tokenizer)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.1, max_tokens=job.report.sample_tokens
    )
    pairs = []
    for prompt in job.source.prompts():
        text = str(job.tokenizer.decode(np.asarray(prompt), skip_special_tokens=True))
        pairs.append((text, generator.generate(list(prompt), params).text))
    job.model.train()
    return pairs
