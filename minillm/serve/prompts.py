"""Checks of prompts, and the runs that continue them."""

from collections.abc import Iterable, Sequence

from minillm.serve.backend import Backend, Run
from minillm.serve.problems import ApiError, too_long
from minillm.serve.sampling_choice import Defaults, sampling_params
from minillm.serve.schema import ChatRequest, CompletionRequest, check_ids


def check_size(texts: Iterable[str], backend: Backend, param: str) -> None:
    """Refuse what cannot fit before time goes into tokenizing it.

    Raises:
        ApiError: 400 `context_length_exceeded`.
    """
    limit = backend.max_prompt_bytes()
    if any(len(text.encode()) > limit for text in texts):
        raise too_long(None, backend.max_context, param)


def make_runs(
    call: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    backend: Backend,
    defaults: Defaults,
    param: str,
) -> list[Run]:
    """Return the runs of a request: `n` for each prompt, of token ids.

    Raises:
        ApiError: 400 for ids that do not exist, an empty prompt, or one that leaves no room.
    """
    check_ids(call.logit_bias, backend.vocab_size, "logit_bias")
    check_ids(call.stop_token_ids, backend.vocab_size, "stop_token_ids")
    limit = backend.max_context
    runs = []
    for ids in prompts:
        if not ids:
            raise ApiError(f"`{param}` is empty", param=param)
        room = limit - len(ids)
        if room < (0 if call.limit == 0 else 1):
            raise too_long(len(ids), limit, param)
        for choice in range(call.n):
            params = sampling_params(call, defaults, room=room, choice=choice)
            runs.append(Run(ids, params))
    return runs
