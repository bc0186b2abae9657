"""From a request to the sampling of one answer."""

import dataclasses

from minillm.models.sampling import SamplingParams
from minillm.serve.schema import ChatRequest, CompletionRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not choose."""

    temperature: float = 0.7
    top_p: float = 0.9


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Defaults, *, room: int, choice: int
) -> SamplingParams:
    """Return the sampling of one answer.

    Args:
        request: The request.
        defaults: Temperature and top-p where the request has none.
        room: Tokens left in the context; the answer is never longer.
        choice: Which of the `n` answers: a given seed is counted up, so that they differ.
    """
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    pick = request.temperature, request.top_p
    logprobs = prompt_logprobs = None
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
        if request.echo and (logprobs is not None or request.limit == 0):
            prompt_logprobs = logprobs or 0
    max_tokens = room if request.limit is None else min(request.limit, room)
    return SamplingParams(
        temperature=defaults.temperature if pick[0] is None else pick[0],
        top_p=defaults.top_p if pick[1] is None else pick[1],
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=request.logit_bias,
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens, max_tokens),
        stop=request.stop,
        stop_ids=request.stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=seed,
    )
