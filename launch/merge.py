"""An adapter into its base: `python launch/merge.py --adapter DIR --out DIR [--base PATH] [--rows FILE]`."""

import argparse
import errno
import sys

from qwen_train.command_line import print_errors, refuse_options


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ValueError or ArgumentError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--adapter", help="PEFT adapter folder (needed)")
    parser.add_argument("--out", help="folder to write (needed): weights, tokenizer, template, card")
    parser.add_argument("--base", help="hub id or folder of the base; by default the one the adapter names")
    parser.add_argument("--rows", help="conversations or pairs to measure on; by default the model's own answers")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: the base's")
    options, others = parser.parse_known_args(argv)
    refuse_options(others, options)
    if others:
        raise ValueError(f"command line: {others[0]!r} belongs to no option; see --help")
    for name in ("adapter", "out"):  # not argparse's `required`, which would hide the name that was misspelt
        if not getattr(options, name):
            raise ValueError(f"--{name}: needed, got nothing; give a folder")
    return options


if __name__ == "__main__":
    try:
        options = parsed(sys.argv[1:])

        from qwen_train.output.merge import merge  # after --help, which need not wait for transformers

        difference = merge(**vars(options))
    except (ValueError, argparse.ArgumentError) as error:
        print_errors(str(error))
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or str(error.filename).startswith(options.out):
            print_errors(
                f"--out: {options.out} cannot be written ({error.strerror}); free space or choose another folder"
            )
        else:
            print_errors(str(error))
        sys.exit(1)
    print(f"merged against adapter: {difference}")
    print(f"model: {options.out}")
