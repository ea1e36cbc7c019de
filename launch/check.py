"""Flight check of the data a training would use: `python launch/check.py [--config FILE.yaml] [--section.field value]`.

Takes the very config of launch/sft.py or launch/dpo.py, loads the tokenizer and no model, judges every row and reports.
Exit code: 0 clean; 1 rows in error; 2 a config, a file or an option that cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from qwen_train.command_line import load_for_tool, print_errors, print_warnings, tool_parser
from qwen_train.data.chat import ChatOptions, Template
from qwen_train.data.check import dump_row, examine
from qwen_train.data.sources import Source, data_splits, find_sources
from qwen_train.data.tokenize import JudgedRow, judge
from qwen_train.model.load import load_tokenizer
from qwen_train.output.check_html import html_page
from qwen_train.output.check_run import CannotWriteError, progress, refuse_overwriting, start_of, written
from qwen_train.output.check_view import print_examples, print_report
from qwen_train.output.console import stdout_console
from qwen_train.train.preflight import check_place

HTML_ROWS = 12


def main(argv: list[str]) -> int:
    """Check, report, and return the exit code. Raises ValueError, ArgumentError or CannotWriteError for mistakes."""
    options, others = parser().parse_known_args(argv)
    if options.show < 0:
        raise ValueError(f"--show: must be >= 0, got {options.show}; give the number of rows to print")
    kind, config, warnings = load_for_tool(options, others)
    print_warnings(warnings)
    splits, sources = data_splits(config), find_sources(config)
    outputs = {"--dump": options.dump, "--html": options.html}
    refuse_overwriting({name: path for name, path in outputs.items() if path}, sources)
    start = start_of(config.model)
    check_place("model.path", start.path, start.revision, needed="tokenizer_config.json")
    template = Template(load_tokenizer(start))
    chat = ChatOptions.from_config(config.data)

    with ExitStack() as stack:
        dump, page = (stack.enter_context(written(path, name)) if path else None for name, path in outputs.items())
        count = stack.enter_context(progress())

        def rows(name: str, source: Source) -> Iterator[JudgedRow]:
            kind, format = splits[name].kind, splits[name].format
            for row in judge(kind, source.path, template.tokenizer, chat, format=format, name=name):
                count(name)
                if dump and row.encoded is not None:
                    dump(json.dumps(dump_row(row)) + "\n")
                yield row

        judged = {name: [(source, rows(name, source)) for source in listed] for name, listed in sources.items()}
        report = examine(judged, template, chat, config, max(options.show, HTML_ROWS if page else 0))
        title = f"Flight check: {kind.upper()}, {' + '.join(options.config) or 'embedded tiny config'}"
        if page:
            for piece in html_page(report, title, template):
                page(piece)

    console = stdout_console()
    print_report(report, title, console)
    if options.show:
        print_examples(report.examples[: options.show], template, console)
    return report.exit_code


def parser() -> argparse.ArgumentParser:
    """The options of the check itself; all others are the config's."""
    made = tool_parser(
        "check.py",
        "Flight check of the data a training would use. Exit code 0 clean, 1 rows in error, 2 unusable.",
    )
    made.add_argument("--show", type=int, default=0, metavar="N", help="print the first N rows with their mask")
    made.add_argument("--dump", metavar="FILE", help="write token ids and labels of every kept row, one JSON a line")
    made.add_argument("--html", metavar="FILE", help="write the whole report, all problems and some rows as a page")
    return made


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main(sys.argv[1:])
    except (ValueError, CannotWriteError, argparse.ArgumentError) as error:
        print_errors(str(error))
        code = 2
    sys.exit(code)
