"""Many answers at once from one model: a thread that owns the model, and one that makes the text.

A step asks the scheduler what to compute, computes it, chooses tokens and hands them to the text
thread, which decodes while the next forward pass runs. What fails in choosing a token or in its
text fails that answer only; what fails in a forward pass fails those that were in it.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minillm.models.generator import Delta, FinishReason, Generator
from minillm.models.sampling import SamplingParams, measure_tokens
from minillm.serve.answer_text import AnswerText, Outlet
from minillm.serve.choose import Chooser, Chosen, likeliest
from minillm.serve.memory import EngineSettings, EngineStats, fit
from minillm.serve.problems import unavailable
from minillm.serve.request import Request
from minillm.serve.sequence import Chunk, Status
from minillm.serve.sequence import Sequence as Scheduled
from minillm.serve.speculate import Drafter

logger = logging.getLogger("minillm")


class Engine(Generator):
    """Continuous batching; as a `Generator`, `stream` and `generate` may be called by anybody."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        settings: EngineSettings | None = None,
        *,
        is_threaded: bool = True,
    ) -> None:
        """Reserve the cache and start.

        Args:
            model: On its device, in evaluation mode.
            tokenizer: Its tokenizer.
            settings: Sizes and speculation.
            is_threaded: Else nothing happens but in `step`, which the caller then calls.

        Raises:
            ConfigError: The settings do not fit the model.
        """
        super().__init__(model, tokenizer)
        self.settings = settings = settings or EngineSettings()
        self.runner, self.scheduler = fit(model, settings)
        self._eos = super().eos_ids
        self._max_context = min(super().max_context, self.scheduler.max_tokens)
        self._open: list[Request] = []
        self._inbox: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closing, self._is_broken = False, False
        self._num_arrived = 0
        self._totals = EngineStats()
        self._outlet = Outlet(is_threaded)
        self._thread: threading.Thread | None = None
        if is_threaded:
            self._thread = threading.Thread(target=self._work, name="minillm-engine", daemon=True)
            self._thread.start()

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._max_context

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._eos

    @property
    def is_alive(self) -> bool:
        """Whether answers can be made."""
        is_running = self._thread is None or self._thread.is_alive()
        return is_running and not (self._is_closing or self._is_broken)

    # ---------------------------------------------------------------- for any thread

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        post: Callable[[Delta | BaseException], None],
        cancel: threading.Event | None = None,
    ) -> Request:
        """Let an answer be made.

        Args:
            prompt_ids: What to continue.
            params: How.
            post: Gets the deltas, or the exception that ended it; called in another thread.
            cancel: Once set, the answer ends within a step.

        Raises:
            InputError: As `Generator.stream`.
            ApiError: The engine has stopped.
        """
        self._check(prompt_ids, params)
        room = min(params.max_tokens, self.max_context - len(prompt_ids))
        measures = params.prompt_logprobs is not None
        with self._changed:
            if not self.is_alive:
                raise unavailable("this server cannot generate any more; restart it")
            sequence = Scheduled(
                self._num_arrived, list(prompt_ids), len(prompt_ids) + room, not measures
            )
            self._num_arrived += 1
            request = Request(
                chooser=Chooser(params, prompt_ids, self.vocab_size, self.eos_ids),
                text=AnswerText(self.tokenizer, params, post, self.abort),
                cancel=cancel or threading.Event(),
                drafter=Drafter(),
                num_left=room,
                sequence=sequence,
            )
            if measures and len(prompt_ids) == 1:  # a first token has none: nothing to compute
                request.text.prompt_logprobs = (None,)
            request.text.request = request
            sequence.request = request
            self._inbox.append(request)
            self._changed.notify()
        return request

    def abort(self, request: Request) -> None:
        """Give an answer up; its memory is free within a step."""
        with self._changed:
            request.is_aborted = True
            self._changed.notify()

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """As `Generator.stream`; any number of them run together."""
        self._check(prompt_ids, params)
        return self._stream(prompt_ids, params, cancel or threading.Event(), [])

    def _stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        cancel: threading.Event,
        times: list[float],
    ) -> Iterator[Delta]:
        inbox: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
        request = self.add(prompt_ids, params, inbox.put, cancel)
        try:
            while True:
                while self._thread is None and inbox.empty():
                    self.step()
                item = inbox.get()
                if isinstance(item, BaseException):
                    raise item
                times += [time.perf_counter()] * len(item.token_ids)
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self.abort(request)

    def stats(self) -> EngineStats:
        """Return counters and gauges as they are now."""
        totals, pool, counters = self._totals, self.scheduler.pool, self.scheduler.counters
        size = pool.block_size
        return EngineStats(
            running=len(self.scheduler.slots),
            waiting=len(self.scheduler.waiting) + len(self._inbox),
            cache_tokens=pool.num_blocks * size,
            cache_tokens_running=pool.num_held * size,
            cache_tokens_kept=pool.num_kept * size,
            prefix_hits=counters.prefix_hits,
            prefix_tokens=counters.prefix_tokens,
            preemptions=counters.preemptions,
            tokens_in=totals.tokens_in,
            tokens_out=totals.tokens_out,
            drafts_proposed=totals.drafts_proposed,
            drafts_accepted=totals.drafts_accepted,
            steps=totals.steps,
        )

    def stop(self) -> None:
        """Give everything up and take no more; does not wait."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop, and wait for the threads at most `timeout_s`."""
        self.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._outlet.close(timeout_s)

    # ---------------------------------------------------------- in the engine's thread

    def _work(self) -> None:
        try:
            while not self._is_closing:
                self.step()
                if not self.scheduler.has_work:
                    with self._changed:
                        self._changed.wait_for(lambda: self._inbox or self._is_closing)
        except BaseException:
            logger.exception("the engine has failed; restart the server")
            self._is_broken = True
        finally:
            with self._changed:
                self._is_closing = True
                requests = [*self._open, *self._inbox]
                self._inbox.clear()
            for request in requests:
                self._fail(request, unavailable("the server stopped generating"))
            self._outlet.end()

    def step(self) -> None:
        """Take new requests, compute once, hand out what came of it."""
        self._take_in()
        if not self.scheduler.has_work:
            return
        for sequence in self.scheduler.slots[: self.scheduler.num_decoding]:
            self._draft(sequence)
        plan = self.scheduler.plan()
        self.runner.apply(self.scheduler.take_operations())
        self._totals.steps += 1
        if plan.decodes:
            self._decode(plan.decodes)
            self.runner.apply(self.scheduler.take_operations())
        for chunk in plan.chunks:
            self._prefill(chunk)
            self.runner.apply(self.scheduler.take_operations())

    def _take_in(self) -> None:
        with self._changed:
            new, self._inbox = self._inbox, deque()
        for request in new:
            self._open.append(request)
            self._totals.tokens_in += request.sequence.num_prompt
            self.scheduler.add(request.sequence)
        for request in [one for one in self._open if one.is_aborted or one.cancel.is_set()]:
            self._finish(request, Chosen(), "cancelled")

    def _draft(self, sequence: Scheduled) -> None:
        """Guess the next tokens, where few enough run that guesses are nearly free."""
        request: Request = sequence.request
        sequence.drafts = ()
        mode = self.settings.speculate
        most = min(request.num_left - 1, sequence.limit - len(sequence.tokens) - 1)
        is_crowded = self.scheduler.num_decoding > self.settings.speculate_up_to
        if mode == "off" or is_crowded or sequence.num_pending != 1 or most < 1:
            return
        if mode == "mtp":
            sequence.drafts = request.guesses[:most]
        else:
            sequence.drafts = request.drafter.guess(sequence.tokens, most)

    def _decode(self, sequences: Sequence[Scheduled]) -> None:
        runner = self.runner
        needs_states = runner.has_state and any(one.drafts for one in sequences)
        states = runner.read_states(sequences) if needs_states else []
        try:
            logits = runner.decode(sequences)
        except torch.AcceleratorError:
            raise  # every later call would fail too
        except Exception as error:
            for sequence in sequences:
                self._fail(sequence.request, error)
            return
        chosen = self._choose(sequences, logits)
        for one, its, state in zip(sequences, chosen, states, strict=False):
            if isinstance(its, Chosen) and len(its.tokens) <= len(one.drafts):
                runner.write_state(one, state)
        if runner.uses_mtp:
            news = [its.tokens if isinstance(its, Chosen) else [0] for its in chosen]
            guesses = runner.guess_after_decode(sequences, news)
            for one, guess in zip(sequences, guesses, strict=True):
                one.request.guesses = (guess,)
        for one, its in zip(sequences, chosen, strict=True):
            self._report(one, its)

    def _choose(
        self, sequences: Sequence[Scheduled], logits: Sequence[torch.Tensor]
    ) -> list[Chosen | Exception]:
        """Choose each one's tokens; what fails is its own."""
        choosers: list[Chooser] = [one.request.chooser for one in sequences]
        pairs = zip(logits, choosers, strict=True)
        best = iter(likeliest([its.allow(rows) for rows, its in pairs if its.is_plain]))
        chosen: list[Chosen | Exception] = []
        for one, rows, its in zip(sequences, logits, choosers, strict=True):
            likely = next(best) if its.is_plain else ()
            try:
                chosen.append(its.choose(rows, one.drafts, likely))
            except Exception as error:
                chosen.append(error)
        return chosen

    def _report(self, sequence: Scheduled, chosen: Chosen | Exception) -> None:
        """Take what was chosen after the pending tokens and the drafts."""
        request: Request = sequence.request
        if isinstance(chosen, Exception):
            self._fail(request, chosen)
            return
        num_drafts, num_right = len(sequence.drafts), len(chosen.tokens) - 1
        if num_drafts:
            self._totals.drafts_proposed += num_drafts
            self._totals.drafts_accepted += num_right
            request.drafter.learn(num_drafts, num_right)
        sequence.drafts = ()
        if not (self.runner.has_state and num_right < num_drafts):
            sequence.tokens += chosen.tokens[:-1]
            self.scheduler.computed(sequence, sequence.num_pending)
            sequence.tokens.append(chosen.tokens[-1])
        else:  # the state was put back: these are computed again
            sequence.tokens += chosen.tokens
        self._hand_out(request, chosen)

    def _prefill(self, chunk: Chunk) -> None:
        sequence, request = chunk.sequence, chunk.sequence.request
        if sequence.status is not Status.PREFILL:
            return  # an earlier chunk of it has failed
        request.has_begun = True
        params, tokens = request.chooser.params, sequence.tokens
        end = chunk.start + chunk.length
        num_top = params.prompt_logprobs
        measures = num_top is not None and len(request.prompt_logprobs) < sequence.num_prompt
        try:
            logits = self.runner.compute(chunk, wants_all=measures)
            if num_top is not None and measures:
                found = request.prompt_logprobs
                news = tokens[chunk.start + 1 : min(end + 1, sequence.num_prompt)]
                new = measure_tokens(logits[: len(news)], news, num_top)
                found += new[len(found) - 1 - chunk.start :]
                if len(found) == sequence.num_prompt:
                    request.text.prompt_logprobs = tuple(found)
            chosen = Chosen()
            if end == len(tokens) and request.num_left:
                rows = logits[-1:]
                its = request.chooser
                likely = likeliest([its.allow(rows)])[0] if its.is_plain else ()
                chosen = its.choose(rows, (), likely)
            if self.runner.uses_mtp:
                nexts = [*tokens[chunk.start + 1 : end + 1], *chosen.tokens[:1]]
                nexts += [0] * (chunk.length - len(nexts))
                guess = self.runner.guess_after_chunk(sequence.slot, chunk.start, nexts)
                request.guesses = (guess,)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(request, error)
            return
        self.scheduler.computed(sequence, chunk.length)
        if end == len(tokens):
            sequence.tokens += chosen.tokens
            self._hand_out(request, chosen)

    def _hand_out(self, request: Request, chosen: Chosen) -> None:
        """Give new tokens to the text thread, and end the answer where it ends."""
        num = len(chosen.tokens)
        self._totals.tokens_out += num
        request.num_left -= num
        if chosen.is_end:
            self._finish(request, chosen, "stop")
        elif request.num_left <= 0:
            self._finish(request, chosen, "length")
        else:
            self._outlet.put(request.text, chosen, None)

    def _finish(self, request: Request, chosen: Chosen, reason: FinishReason) -> None:
        self._forget(request)
        self._outlet.put(request.text, chosen, reason)

    def _fail(self, request: Request, error: BaseException) -> None:
        logger.debug("an answer failed: %r", error)
        self._forget(request)
        self._outlet.put(request.text, error, None)

    def _forget(self, request: Request) -> None:
        request.is_done = True
        if request in self._open:
            self._open.remove(request)
            self.scheduler.remove(request.sequence)
