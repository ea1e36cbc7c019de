"""Supervised fine-tuning: `accelerate launch launch/sft.py [--config FILE.yaml] [--section.field value ...]`."""

from qwen_train.config import SFTConfig
from qwen_train.sft import train
from qwen_train.train.folder import run_script

if __name__ == "__main__":
    run_script(SFTConfig, train)
