"""Every command's knobs, one frozen dataclass tree each: the one place where a flag is declared.

A nested dataclass is a TOML table and a panel of `--help`. A leaf's name is also its flag.
"""

from minillm.settings.data import (
    DownloadConfig,
    IdentityConfig,
    InspectConfig,
    MergeBinConfig,
    PrepareSftConfig,
    PrepareTokenizerConfig,
    TokenizeConfig,
    TrainTokenizerConfig,
)
from minillm.settings.inference import ChatConfig, DemoConfig, SamplingConfig, ServeConfig
from minillm.settings.kinds import Device, Precision, Tracker
from minillm.settings.training import (
    BatchConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    PlanConfig,
    PretrainConfig,
    ReportCompareConfig,
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
    "InspectConfig",
    "LoraConfig",
    "MergeBinConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlanConfig",
    "Precision",
    "PrepareSftConfig",
    "PrepareTokenizerConfig",
    "PretrainConfig",
    "ReportCompareConfig",
    "ReportConfig",
    "SamplingConfig",
    "ServeConfig",
    "SftConfig",
    "TokenizeConfig",
    "Tracker",
    "TrainTokenizerConfig",
]
