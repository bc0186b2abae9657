"""Types that settings of several commands share."""

from typing import Annotated, Literal

from annotated_doc import Doc

Precision = Literal["auto", "fp32", "bf16"]
Device = Annotated[str, Doc("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")]
Tracker = Literal["none", "wandb", "swanlab", "trackio"]
