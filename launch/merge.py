"""An adapter into its base: `python launch/merge.py --adapter DIR --out DIR [--base PATH] [--rows FILE]`."""

import argparse
import sys

from qwen_train.output.merge import merge

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True, help="PEFT adapter folder")
    parser.add_argument("--out", required=True, help="folder to write: weights, tokenizer, template, card")
    parser.add_argument("--base", help="hub id or folder of the base; by default the one the adapter names")
    parser.add_argument("--rows", help="conversations or pairs to measure on; by default the model's own answers")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the base's")
    arguments = parser.parse_args()
    try:
        difference = merge(**vars(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"merged against adapter: {difference}")
    print(f"model: {arguments.out}")
