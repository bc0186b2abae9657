"""The model and its cache: what the scheduler has decided, done with tensors.

A step is one forward pass over the newest tokens of all running sequences, then one for each chunk
of a prompt. Guesses (`drafts`) go in with the newest token; the logits at each of them tell whether
the next one is right. A recurrent state cannot be cut back, so it is copied before guesses go in,
and put back if one was wrong.

B sequences · T tokens of each · D model · V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.models.fast_decode import make_decode_step
from minillm.models.slot_cache import SlotCache
from minillm.serve.sequence import Chunk, Drop, Load, Move, Operation, Reset, Save, Swap
from minillm.serve.sequence import Sequence as Answer

MAX_DRAFTS = 8
"""Room behind the longest sequence for guesses."""


class Runner:
    """Only the engine's thread may use it."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int,
        max_tokens: int,
        uses_mtp: bool = False,
        block_size: int = 32,
    ) -> None:
        """Reserve the cache and run the model once, which shows that they fit each other.

        Args:
            model: A causal LM for which `minillm.models.slot_cache.layer_kinds` finds an answer.
            num_slots: Sequences at a time.
            max_tokens: Longest sequence.
            uses_mtp: Also guess with the model's block for the token after the next.
            block_size: Tokens of a block that is saved and loaded.
        """
        self.model, self.uses_mtp = model, uses_mtp
        self.block_size = block_size
        # guesses need the hidden states, which only the model itself gives
        self._call = self._call_model if uses_mtp else make_decode_step(model)
        self.device = model.device
        self.cache = SlotCache(model, num_slots, max_tokens + MAX_DRAFTS, int(uses_mtp))
        self._kept: dict[int, tuple[list[Tensor], list[Tensor] | None]] = {}
        self._hidden: Tensor | None = None
        with torch.inference_mode():
            self._chunk(0, 0, [0, 0], 1)
            if uses_mtp:
                self.guess_after_chunk(0, 0, [0, 0])
            self.cache.reset()
        self.has_state = self.cache.size_of_state() > 0

    # ------------------------------------------------------------------------ the cache

    @torch.inference_mode()
    def apply(self, operations: Sequence[Operation]) -> None:
        """Do what the scheduler has decided about the cache."""
        cache = self.cache
        for op in operations:
            match op:
                case Move(source, target, length):
                    cache.copy(source, target, length)
                case Swap(first, second, length):
                    cache.swap(first, second, length)
                case Reset(slot):
                    cache.reset(slot)
                case Save(block, slot, start, has_state):
                    self._save(block, slot, start, has_state)
                case Load(blocks, slot):
                    self._load(blocks, slot)
                case Drop(block):
                    del self._kept[block]

    def _save(self, block: int, slot: int, start: int, has_state: bool) -> None:
        if block in self._kept:
            tokens, state = self._kept[block]
        else:
            tokens, state = self.cache.read_tokens(slot, start, start + self.block_size), None
        self._kept[block] = tokens, self.cache.read_state(slot) if has_state else state

    def _load(self, blocks: Sequence[int], slot: int) -> None:
        for number, block in enumerate(blocks):
            start = number * self.block_size
            self.cache.write_tokens(slot, start, start + self.block_size, self._kept[block][0])
        state = self._kept[blocks[-1]][1]
        if self.has_state:
            assert state is not None
            self.cache.write_state(slot, state)

    def read_states(self, answers: Sequence[Answer]) -> list[list[Tensor]]:
        """Copy recurrent states, for `write_state`."""
        return [self.cache.read_state(answer.slot) for answer in answers]

    @torch.inference_mode()
    def write_state(self, answer: Answer, state: Sequence[Tensor]) -> None:
        """Put a state back."""
        self.cache.write_state(answer.slot, state)

    # ---------------------------------------------------------------------- the forward

    @torch.inference_mode()
    def decode(self, answers: Sequence[Answer]) -> list[Tensor]:
        """Feed pending tokens and drafts of the first slots.

        Returns:
            Logits of each: `(1 + drafts, V)`; row n follows after n right drafts.
        """
        feeds = [[*one.tokens[one.num_computed :], *one.drafts] for one in answers]
        lengths = [one.num_computed for one in answers]
        longest = max(len(feed) for feed in feeds)
        if longest > 1 and self.has_state:  # padding would go into the state
            return [
                self._chunk(one.slot, one.num_computed, feed, 1 + len(one.drafts))[0]
                for one, feed in zip(answers, feeds, strict=True)
            ]
        padded = [feed + feed[-1:] * (longest - len(feed)) for feed in feeds]
        positions_BT, mask = self.cache.begin_batch(lengths, longest)
        logits_BTV = self._call(
            input_ids=torch.tensor(padded, device=self.device),
            position_ids=positions_BT,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=longest,
        )
        return [
            logits_TV[len(feed) - 1 - len(one.drafts) : len(feed)]
            for logits_TV, feed, one in zip(logits_BTV, feeds, answers, strict=False)
        ]

    @torch.inference_mode()
    def compute(self, chunk: Chunk, *, wants_all: bool) -> Tensor:
        """Feed a chunk of a prompt; return the logits of its last token `(1, V)`, or of all."""
        one = chunk.sequence
        tokens = one.tokens[chunk.start : chunk.start + chunk.length]
        return self._chunk(one.slot, chunk.start, tokens, 0 if wants_all else 1)[0]

    def _chunk(self, slot: int, start: int, tokens: Sequence[int], num_logits: int) -> Tensor:
        return self._call(
            position_ids=self.cache.begin_chunk(slot, start, len(tokens)),
            input_ids=torch.tensor([tokens], device=self.device),
            attention_mask=None,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )

    def _call_model(self, **inputs: Any) -> Tensor:
        """Keep the hidden states: the block for further tokens goes on from them."""
        num = inputs.pop("logits_to_keep")
        causal: Any = self.model
        self._hidden = causal.model(**inputs).last_hidden_state
        logits: Tensor = causal.lm_head(self._hidden[:, -num:])
        return logits

    # ------------------------------------------------------- multi-token prediction

    @torch.inference_mode()
    def guess_after_decode(
        self, answers: Sequence[Answer], news: Sequence[Sequence[int]]
    ) -> list[int]:
        """Return a guess at the token after each one's new tokens. Call it right after `decode`.

        Args:
            answers: As given to `decode`.
            news: What was chosen for each: its right drafts and one more.
        """
        assert self._hidden is not None
        num_fed = self._hidden.shape[1]
        lengths = [one.num_computed for one in answers]
        positions_BT, mask = self.cache.begin_batch(lengths, num_fed)
        nexts = [[*new, *[0] * (num_fed - len(new))] for new in news]
        return self._guess(nexts, positions_BT, mask, [len(new) - 1 for new in news])

    @torch.inference_mode()
    def guess_after_chunk(self, slot: int, start: int, nexts: Sequence[int]) -> int:
        """Return a guess at the token after the next. Call it right after `compute`.

        Args:
            slot: Of the chunk.
            start: Of the chunk.
            nexts: The token after each of the chunk's.
        """
        positions_BT = self.cache.begin_chunk(slot, start, len(nexts))
        return self._guess([nexts], positions_BT, None, [len(nexts) - 1])[0]

    def _guess(
        self,
        nexts: Sequence[Sequence[int]],
        positions_BT: Tensor,
        mask: Tensor | None,
        lasts: Sequence[int],
    ) -> list[int]:
        causal: Any = self.model
        base = causal.model
        embeds_BTD = base.embed_tokens(torch.tensor(nexts, device=self.device))
        placed = base.place(embeds_BTD, mask, positions_BT, self.cache)
        block = base.layers[causal.config.num_hidden_layers]
        hidden_BTD = block(
            self._hidden, embeds_BTD, past_key_values=self.cache, use_cache=True, **placed
        )[0]
        rows_B = torch.arange(len(lasts), device=self.device)
        hidden_BD = hidden_BTD[rows_B, torch.tensor(lasts, device=self.device)]
        guesses: list[int] = causal.lm_head(hidden_BD).argmax(-1).tolist()
        return guesses
