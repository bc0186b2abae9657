"""Every command's knobs, one frozen dataclass tree each: the one place where a flag is declared.

A nested dataclass is a TOML table and a panel of `--help`. A leaf's name is also its flag.
"""

from minillm.settings.data import (
    DownloadConfig,
    IdentityConfig,
    MergeBinConfig,
    PrepareSftConfig,
    PrepareTokenizerConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
)
from minillm.settings.inference import ChatConfig, DemoConfig, SamplingConfig, ServeConfig
from minillm.settings.kinds import Device, Precision
from minillm.settings.training import (
    BatchConfig,
    OptimConfig,
    PretrainConfig,
    ReportConfig,
    SftConfig,
)

__all__ = [
    "BatchConfig",
    "ChatConfig",
    "DemoConfig",
    "Device",
    "DownloadConfig",
    "IdentityConfig",
    "MergeBinConfig",
    "OptimConfig",
    "Precision",
    "PrepareSftConfig",
    "PrepareTokenizerConfig",
    "PretrainConfig",
    "ReportConfig",
    "SamplingConfig",
    "ServeConfig",
    "SftConfig",
    "TokenizeConfig",
    "TrainTokenizerConfig",
]
