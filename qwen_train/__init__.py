"""SFT and DPO of Qwen models in two hand-written PyTorch loops under Hugging Face accelerate."""

import logging
import warnings

# PEFT imports bitsandbytes, which tells everyone on a CPU of a kernel package that only NF4 would profit from.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# transformers asks itself for a property that it has deprecated, whenever the attention implementation is switched.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
