"""One typed, frozen config per stage: a YAML file, then `--set key=value` on top, every key checked.

A section for a lower package is defined there (`bfpo.judges.settings`) and passed to it unchanged. Importing this
package imports neither torch nor transformers, and the names below are imported on first use: a command needs few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfpo.core.lazy import imported_on_use

if TYPE_CHECKING:
    from bfpo.config.chat import ChatConfig
    from bfpo.config.clean import CleanConfig
    from bfpo.config.demo import DemoConfig, ToyConfig
    from bfpo.config.describe import Key, describe_keys
    from bfpo.config.evaluate import EvaluateConfig, GenerateConfig
    from bfpo.config.experiments import CompareConfig, InterpolateConfig, SweepConfig
    from bfpo.config.gate import GateConfig
    from bfpo.config.judges import JudgeCheckConfig, JudgeTrainConfig
    from bfpo.config.label import LabelConfig, RedteamConfig
    from bfpo.config.load import load_config, read_template
    from bfpo.config.prepare import PrepareConfig
    from bfpo.config.tamper import TamperConfig
    from bfpo.config.train import AlignConfig, MethodSettings, ReferenceConfig, SftConfig
    from bfpo.core.settings import ConfigPart, StageConfig
    from bfpo.data.settings import DataConfig, SftDataConfig, SplitConfig
    from bfpo.judges.settings import JudgeConfig, RankerConfig
    from bfpo.policy.settings import InitConfig, LoraConfig

__all__ = [
    "AlignConfig",
    "ChatConfig",
    "CleanConfig",
    "CompareConfig",
    "ConfigPart",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "GateConfig",
    "GenerateConfig",
    "InitConfig",
    "InterpolateConfig",
    "JudgeCheckConfig",
    "JudgeConfig",
    "JudgeTrainConfig",
    "Key",
    "LabelConfig",
    "LoraConfig",
    "MethodSettings",
    "PrepareConfig",
    "RankerConfig",
    "RedteamConfig",
    "ReferenceConfig",
    "SftConfig",
    "SftDataConfig",
    "SplitConfig",
    "StageConfig",
    "SweepConfig",
    "TamperConfig",
    "ToyConfig",
    "describe_keys",
    "load_config",
    "read_template",
]

_HOMES = {
    "bfpo.config.chat": ("ChatConfig",),
    "bfpo.config.clean": ("CleanConfig",),
    "bfpo.config.demo": ("DemoConfig", "ToyConfig"),
    "bfpo.config.describe": ("Key", "describe_keys"),
    "bfpo.config.evaluate": ("EvaluateConfig", "GenerateConfig"),
    "bfpo.config.experiments": ("CompareConfig", "InterpolateConfig", "SweepConfig"),
    "bfpo.config.gate": ("GateConfig",),
    "bfpo.config.judges": ("JudgeCheckConfig", "JudgeTrainConfig"),
    "bfpo.config.label": ("LabelConfig", "RedteamConfig"),
    "bfpo.config.load": ("load_config", "read_template"),
    "bfpo.config.prepare": ("PrepareConfig",),
    "bfpo.config.tamper": ("TamperConfig",),
    "bfpo.config.train": ("AlignConfig", "MethodSettings", "ReferenceConfig", "SftConfig"),
    "bfpo.core.settings": ("ConfigPart", "StageConfig"),
    "bfpo.data.settings": ("DataConfig", "SftDataConfig", "SplitConfig"),
    "bfpo.judges.settings": ("JudgeConfig", "RankerConfig"),
    "bfpo.policy.settings": ("InitConfig", "LoraConfig"),
}
__getattr__ = imported_on_use(__name__, _HOMES)
