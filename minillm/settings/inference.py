"""Settings of `chat`, `serve` and `demo`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_doc import Doc

from minillm.errors import ConfigError
from minillm.settings.checks import check_positive, check_range
from minillm.settings.kinds import Device, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: Annotated[float, Doc("0 is greedy.")] = 0.7
    top_k: Annotated[int, Doc("Keep the k likeliest tokens; 0 is all.")] = 0
    top_p: Annotated[float, Doc("Keep the likeliest tokens up to this mass.")] = 0.9
    repetition_penalty: Annotated[float, Doc("> 1 discourages tokens seen before.")] = 1.0
    frequency_penalty: Annotated[float, Doc("Subtract this per earlier appearance.")] = 0.0
    max_tokens: Annotated[int, Doc("Longest answer, in tokens.")] = 256
    seed: Annotated[int | None, Doc("Seed of sampling; default: none.")] = None

    def __post_init__(self) -> None:
        """Reject values that no answer can be made with."""
        check_range(self, "temperature", 0, 100)
        check_range(self, "top_k", 0, 1_000_000)
        check_positive(self, "top_p", "repetition_penalty", "max_tokens")
        check_range(self, "top_p", 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """`minillm chat`."""

    model: Annotated[
        str,
        Doc(
            "Run folder, model folder or hub id; `auto` is the newest SFT run. With `--url`: "
            "the served name; `auto` is the first."
        ),
    ] = "auto"
    url: Annotated[
        str, Doc("Talk to this OpenAI-compatible server instead, e.g. http://127.0.0.1:8000.")
    ] = ""
    api_key: Annotated[str, Doc("Key for `--url`.")] = ""
    backend: Annotated[
        Literal["generator", "engine", "transformers"],
        Doc("The short path, the server's engine, or transformers' own `generate`."),
    ] = "generator"
    device: Device = "auto"
    precision: Annotated[Precision, Doc("Dtype of the weights.")] = "auto"
    quantize: Annotated[
        Literal["none", "fp16", "int8", "int4"],
        Doc("On a CPU, store the weights in fewer bits: faster, less memory."),
    ] = "none"
    system: Annotated[str, Doc("System message.")] = ""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """`minillm serve`."""

    model: Annotated[
        str, Doc("Run folder, model folder or hub id; `auto` is the newest SFT run.")
    ] = "auto"
    host: Annotated[str, Doc("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Doc("Port to listen on.")] = 8000
    device: Device = "auto"
    precision: Annotated[Precision, Doc("Dtype of the weights.")] = "auto"
    quantize: Annotated[
        Literal["none", "fp16", "int8", "int4"],
        Doc("On a CPU, store the weights in fewer bits: faster, less memory."),
    ] = "none"
    served_model_name: Annotated[
        str, Doc("Name that clients use; empty: the run's or folder's name.")
    ] = ""
    api_key: Annotated[
        tuple[str, ...], Doc("Key that clients must send; repeatable; none: open to all.")
    ] = ()
    api_key_file: Annotated[Path | None, Doc("File of more keys, one `name:key` per line.")] = None
    cors_origin: Annotated[
        tuple[str, ...],
        Doc("Site whose pages may use it; repeatable; `localhost`: this machine's; `*`: all."),
    ] = ()
    request_timeout: Annotated[
        float, Doc("Longest time of one answer in seconds, the queue included; 0: no limit.")
    ] = 0.0
    temperature: Annotated[float, Doc("For requests that choose none; 0 is greedy.")] = 0.7
    top_p: Annotated[float, Doc("For requests that choose none.")] = 0.9
    backend: Annotated[
        Literal["engine", "generator", "transformers"],
        Doc("`engine`: many answers at once; the others: one after another."),
    ] = "engine"
    max_running: Annotated[int, Doc("Answers that the engine makes at a time.")] = 16
    cache_tokens: Annotated[
        int, Doc("Tokens that the engine's cache holds; 0: by context and free memory.")
    ] = 0
    prefill_chunk: Annotated[
        int, Doc("Prompt tokens computed between two tokens of the running answers.")
    ] = 256
    speculate: Annotated[
        Literal["off", "ngram", "mtp"],
        Doc("Guess tokens ahead, from the text so far or by mini_deepseekv3's own block."),
    ] = "off"
    max_waiting: Annotated[int, Doc("Requests that may wait; one more gets a 429.")] = 64
    drain_s: Annotated[int, Doc("Seconds that running answers get when the server stops.")] = 10

    def __post_init__(self) -> None:
        """Reject values that no server can use."""
        check_range(self, "port", 0, 65_535)
        check_range(self, "temperature", 0, 2)
        check_positive(self, "top_p", "max_waiting", "max_running", "prefill_chunk")
        check_range(self, "cache_tokens", 0, 10**12)
        check_range(self, "top_p", 0, 1)
        check_range(self, "drain_s", 0, 3600)
        check_range(self, "request_timeout", 0, 86_400)
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|localhost|https?://[^/\s]+", origin):
                raise ConfigError(
                    f"`--cors-origin {origin}` is not an origin: scheme, host and port, no path",
                    hint="try `--cors-origin http://localhost:3000`",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """`minillm demo`."""

    preset: Annotated[
        Literal["quick", "standard", "long"],
        Doc("`quick` ~2 minutes to see it run, `standard` ~10, `long` ~30, on two cores."),
    ] = "standard"
    out: Annotated[Path, Doc("Folder for everything the demo makes.")] = Path("demo")
    fresh: Annotated[bool, Doc("Begin anew instead of resuming what is in --out.")] = False
    device: Device = "auto"
