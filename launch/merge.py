"""An adapter into its base: `python launch/merge.py --adapter DIR --out DIR [--base PATH] [--rows FILE]`."""

import argparse
import sys

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True, help="PEFT adapter folder")
    parser.add_argument("--out", required=True, help="folder to write: weights, tokenizer, template, card")
    parser.add_argument("--base", help="hub id or folder of the base; by default the one the adapter names")
    parser.add_argument("--rows", help="conversations or pairs to measure on; by default the model's own answers")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the base's")
    arguments = parser.parse_args()

    from qwen_train.output.merge import merge  # after --help, which need not wait for transformers

    try:
        difference = merge(**vars(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"merged against adapter: {difference}")
    print(f"model: {arguments.out}")
