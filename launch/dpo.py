"""Direct preference optimisation: `accelerate launch launch/dpo.py [--config FILE.yaml] [--section.field value]`."""

from qwen_train.config import DPOConfig
from qwen_train.dpo import train
from qwen_train.train.folder import run_script

if __name__ == "__main__":
    run_script(DPOConfig, train)
