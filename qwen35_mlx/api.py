"""What a program holds: a loaded model that turns messages into prompts, logits and events."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from . import config as configuration
from . import engine, family, loader, memory, prompt
from .cache import GROWTH, Cache
from .config import Config
from .errors import Cancelled, InputError, ModelError
from .files import read_json
from .image import ImageProcessor
from .model import Model
from .parse import Event, OutputParser, Reasoning, StopStrings, Text, ToolCall
from .prompt import MediaTokens, Prompt
from .sampling import Sampler, Sampling
from .template import Template
from .tokenizer import Tokenizer
from .video import VideoProcessor

MAX_TOKENS = 32768  # the output budget the model cards advise
SHORTEN = "Shorten it, lower max_tokens, or use a smaller size."
Messages = str | Sequence[dict[str, Any]]
Stage = Literal["kernels", "load", "prompt"]
Reason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Progress:
    """Something long is under way. `stage` is `kernels` (the first load on a Mac tries
    them), `load` (bytes) or `prompt` (tokens).
    """

    stage: Stage
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class Usage:
    """Counts, seconds from the start of the stream, and the peak of MLX's memory in bytes."""

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    first_token_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Finish:
    """The last event of every stream."""

    reason: Reason
    usage: Usage


@dataclass(frozen=True)
class Result:
    """A whole answer. `finish` says why it ended and what it cost."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish: Finish


class Qwen35:
    """A loaded model folder. Made by `load`; may be used from any thread, one stream at a time."""

    def __init__(self, folder: Path, config: Config, model: Model) -> None:
        self.folder, self.config, self.model = folder, config, model
        text = config.text
        self.size = family.identify(text.hidden_size, text.num_hidden_layers, text.num_experts)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer. Raises: ModelError when its files are missing or damaged."""
        return Tokenizer.read(self.folder)

    @cached_property
    def template(self) -> Template:
        """The folder's chat template, sandboxed. Raises: ModelError when there is none."""
        return Template.read(self.folder)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        text = self.config.text
        stretched = int(text.rope.original_positions * text.rope.factor)
        plain = text.max_position_embeddings
        return max(plain, stretched) if text.rope.factor > 1 else plain

    def prompt(
        self,
        messages: Messages,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        allow_url: bool = False,
    ) -> Prompt:
        """Messages (OpenAI shape, or one user text) as tokens, positions and patches.

        thinking: whether to open a reasoning block; None is the template's own default.
        allow_url: whether http(s) pictures may be fetched; leave it off for text you did not write.
        Raises: InputError for anything in the messages that cannot be used.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        config = self.config
        return prompt.build(
            messages,
            tools,
            thinking,
            template=self.template,
            tokenizer=self.tokenizer,
            image_processor=self._processors[0] if self.model.has_vision else None,
            video_processor=self._processors[1] if self.model.has_vision else None,
            ids=MediaTokens(
                config.image_token_id,
                config.video_token_id,
                config.vision_start_token_id,
                config.vision_end_token_id,
            ),
            allow_url=allow_url,
        )

    def logits(self, prompt: Prompt, last: int | None = None) -> mx.array:
        """`[T, V]` f32: row t scores the token after token t; only the `last` rows when given.

        Raises: InputError as `stream`; OutOfMemory when rows and cache do not fit.
        """
        T = len(prompt.tokens)
        rows = T if last is None else min(last, T)
        if rows < 1:
            raise InputError(f"logits: last is {last}; expected at least 1.")
        self._check(prompt)
        itemsize = self.model.dtype.size
        extra = (4 + itemsize) * rows * self.config.text.vocab_size
        memory.require(
            self._prompt_bytes(prompt) + extra, f"{rows:,} rows of logits", "Ask for fewer: last=N."
        )
        cache = Cache(self.config.text, capacity=T)
        hidden = engine.read_prompt(self.model, prompt, cache, keep=rows)
        logits = self.model.logits(hidden)[0].astype(mx.float32)
        mx.eval(logits)
        return logits

    def stream(
        self,
        messages: Messages | Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        cancel: threading.Event | None = None,
        progress: ProgressCallback | None = None,
    ) -> Iterator[Event | Finish]:
        """Events of one answer as they are certain: Reasoning, Text, ToolCall, and last a Finish.

        messages: as for `prompt`, or its result. sampling: the size's recommended one when None.
        max_tokens: at most what the context leaves. stop: texts that end the answer and are not
        part of it. cancel: set it from any thread; the stream then ends with reason `cancelled`.
        Raises: InputError, OutOfMemory at once, before the first event is asked for.
        """
        if isinstance(messages, Prompt):
            if tools is not None or thinking is not None:
                raise InputError(
                    "stream: tools or thinking beside a Prompt; both are part of it already. "
                    "Give them to prompt()."
                )
            asked = messages
        else:
            asked = self.prompt(messages, tools, thinking)
        self._check(asked)
        budget = self._budget(asked, max_tokens)
        if sampling is None:
            sampling = self.recommended_sampling(asked)
        return self._events(asked, sampling, budget, StopStrings(stop), cancel, progress)

    def generate(self, messages: Messages | Prompt, **options: Any) -> Result:
        """The whole answer at once; `options` are those of `stream`."""
        parts: dict[type, list[str]] = {Text: [], Reasoning: []}
        calls: list[ToolCall] = []
        for event in self.stream(messages, **options):
            if isinstance(event, Finish):
                text, reasoning = ("".join(parts[kind]) for kind in (Text, Reasoning))
                return Result(text, reasoning, tuple(calls), event)
            if isinstance(event, ToolCall):
                calls.append(event)
            else:
                parts[type(event)].append(event.text)
        raise ValueError("a stream ended without Finish")

    def recommended_sampling(self, prompt: Prompt) -> Sampling:
        """The model card's advice for size, mode and input; the folder's own if it is no size."""
        if self.size is None and self._own_sampling is not None:
            return self._own_sampling
        return family.recommended(self.size, prompt.thinking, bool(prompt.media))

    def _check(self, prompt: Prompt) -> None:
        T = len(prompt.tokens)
        if T == 0:
            raise InputError("prompt: no tokens; expected at least one. Write something.")
        if self.context <= T:
            raise InputError(
                f"prompt: {T:,} tokens; the context holds {self.context:,}, answer included. "
                f"Shorten it by at least {T - self.context + 1:,} tokens."
            )
        if prompt.media and not self.model.has_vision:
            raise InputError(
                f"prompt: holds a picture; {self.folder} has no vision tower. "
                "Use a folder that was converted with it."
            )
        vocab = self.config.text.vocab_size
        strange = prompt.tokens[(prompt.tokens < 0) | (prompt.tokens >= vocab)]
        if strange.size:
            raise InputError(
                f"prompt: token {strange[0]}; the model has 0 to {vocab - 1}. "
                "Use the tokenizer of this folder."
            )
        pads = (self.config.image_token_id, self.config.video_token_id)
        places = int(np.isin(prompt.tokens, pads).sum())
        merge = self.config.vision.spatial_merge_size**2 if self.config.vision else 1
        rows = sum(len(medium.patches) for medium in prompt.media) // merge
        if places != rows:
            raise InputError(
                f"prompt: {places} placeholders for {rows} rows of pictures. "
                "Make the prompt with this model's own prompt()."
            )

    def _prompt_bytes(self, prompt: Prompt) -> int:
        grids = [medium.grid for medium in prompt.media]
        tokens, itemsize = len(prompt.tokens), self.model.dtype.size
        return memory.prompt_bytes(self.config, tokens, grids, engine.CHUNK, itemsize)

    def _budget(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Tokens of answer that context and memory leave. Asked for more, memory refuses."""
        T = len(prompt.tokens)
        room = self.context - T
        needed = self._prompt_bytes(prompt)
        # A buffer is copied as it grows, so a token of answer counts twice.
        per_token = 2 * memory.kv_bytes(self.config.text, 1, self.model.dtype.size)
        if max_tokens is None:
            memory.require(needed, f"a prompt of {T:,} tokens", SHORTEN)
            return max(1, min(MAX_TOKENS, room, (memory.available() - needed) // per_token))
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InputError(f"max_tokens: {max_tokens!r}; expected a whole number from 1 up.")
        budget = min(max_tokens, room)
        what = f"a prompt of {T:,} tokens and an answer of {budget:,}"
        memory.require(needed + per_token * budget, what, SHORTEN)
        return budget

    def _events(
        self,
        prompt: Prompt,
        sampling: Sampling,
        budget: int,
        stops: StopStrings,
        cancel: threading.Event | None,
        progress: ProgressCallback | None,
    ) -> Iterator[Event | Finish]:
        clock, parser = engine.Clock(), OutputParser(prompt.thinking, prompt.tools)
        words, ids = self.tokenizer.detokenizer(), self._stop_ids
        mx.reset_peak_memory()
        cache = Cache(self.config.text, capacity=len(prompt.tokens) + min(budget, GROWTH))
        tokens = engine.generate(
            self.model,
            prompt,
            Sampler(sampling, self.tokenizer.vocab_size, prompt.tokens),
            max_tokens=budget,
            cache=cache,
            clock=clock,
            progress=_staged("prompt", progress),
            cancel=cancel,
        )
        count, called, hit = 0, False, False
        reason: Reason = "length"
        try:
            for token in tokens:
                count += 1
                if token in ids:
                    reason = "stop"
                    break
                text, hit = stops.feed(words.add(token))
                for event in parser.feed(text):
                    called |= isinstance(event, ToolCall)
                    yield event
                if hit:
                    reason = "stop"
                    break
        except Cancelled:
            reason = "cancelled"
        tail = "" if hit else _rest(stops, words.finish())
        for event in (*parser.feed(tail), *parser.finish()):
            called |= isinstance(event, ToolCall)
            yield event
        if called and reason == "stop":
            reason = "tool_calls"
        read = min(cache.length, len(prompt.tokens))  # fewer when it was cancelled
        yield Finish(reason, _usage(read, count, clock))

    @cached_property
    def _processors(self) -> tuple[ImageProcessor, VideoProcessor]:
        """The folder's preprocessing, which must cut the patches that the tower expects."""
        found = ImageProcessor.read(self.folder), VideoProcessor.read(self.folder)
        vision = self.config.vision
        assert vision is not None
        expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        for one in found:
            sizes = (one.patch_size, one.temporal_patch_size, one.merge_size)
            if sizes != expected:
                raise ModelError(
                    f"{self.folder}: preprocessor files say patch, temporal patch and merge size "
                    f"{sizes}; config.json says {expected}. Take all files of one model."
                )
        return found

    @cached_property
    def _own_sampling(self) -> Sampling | None:
        path = self.folder / "generation_config.json"
        values = read_json(path) if path.is_file() else {}
        return family.from_generation_config(values, str(path))

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        return self.tokenizer.stop_ids | frozenset(self.config.eos_token_ids)


def _rest(stops: StopStrings, text: str) -> str:
    """What is left when the tokens have ended: nothing more can complete a stop string."""
    last, hit = stops.feed(text)
    return last if hit else last + stops.finish()


def _usage(prompt_tokens: int, generated: int, clock: engine.Clock) -> Usage:
    total = clock.now()
    done = clock.prompt_done or total
    return Usage(
        prompt_tokens, generated, done, total - done, clock.first_token, mx.get_peak_memory()
    )


def load(
    path: str | Path, *, dtype: mx.Dtype | None = None, progress: ProgressCallback | None = None
) -> Qwen35:
    """Load a model: a local folder, a Hub id (downloaded once), or a size such as `4b`.

    dtype: of matrices and activations; the folder's own when None. progress: called as kernels
    are tried, if they have to be, and as bytes of weights arrive in memory.
    Raises: ModelError for a folder that is not a whole Qwen3.5; OutOfMemory before reading.
    """
    folder = _folder(path)
    config = configuration.read(folder)
    stages = _staged("load", progress), _staged("kernels", progress)
    return Qwen35(folder, config, loader.load(folder, config, dtype, *stages))


def _staged(stage: Stage, progress: ProgressCallback | None) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(Progress(stage, done, total))


def _folder(path: str | Path) -> Path:
    if isinstance(path, Path):
        return path
    from . import hub

    return hub.download(hub.resolve(path))
