"""Supervised fine-tuning: `accelerate launch launch/sft.py [--config FILE.yaml] [--section.field value ...]`."""

from qwen_train.command_line import from_command_line
from qwen_train.config import SFTConfig

if __name__ == "__main__":
    config, warnings = from_command_line(SFTConfig)  # first: --help and mistakes need not wait for transformers

    from qwen_train.sft import train
    from qwen_train.train.script import run_script

    run_script(config, warnings, train)
