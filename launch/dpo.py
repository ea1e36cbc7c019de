"""Direct preference optimisation: `accelerate launch launch/dpo.py [--config FILE.yaml] [--section.field value]`."""

from qwen_train.command_line import from_command_line
from qwen_train.config import DPOConfig

if __name__ == "__main__":
    config, warnings = from_command_line(DPOConfig)  # first: --help and mistakes need not wait for transformers

    from qwen_train.dpo import train
    from qwen_train.train.script import run_script

    run_script(config, warnings, train)
