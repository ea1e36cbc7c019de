"""A `Report` for people: tables of plain strings (which `check_html.py` shows too), the terminal, rows with their mask.

Everything that comes out of the data passes through `visible`: a row may hold escape sequences, and none of them
reaches the terminal.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwen_train.data.chat import Template
from qwen_train.data.check import LEVELS, Example, Level, Part, Problem, Report, Split, histogram, pair_statistics
from qwen_train.data.check import percentiles as length_percentiles
from qwen_train.data.packing import token_weights
from qwen_train.data.tokenize import NOTES

Mark = Literal["", "ok", "info", "warning", "error"]
PRINTED: dict[Level, int] = {"error": 50, "warning": 20, "dropped": 10, "trimmed": 10}
"""Problems of each level that go to the terminal."""
PLACES = 3
"""Places that are printed of the rows with the same problem as one printed before."""
BAR = 40
MAX_KEY = 60
"""Characters of a row's key that are shown."""
MIN_TEXT = 20
"""Columns of the terminal that a table's column of words may be folded to."""
STYLES = {"ok": "green", "info": "", "warning": "yellow", "error": "bold red", "dropped": "cyan", "trimmed": "cyan"}
TRIMMED = ("rows_trimmed", "turns_trimmed")
"""Notes that the table of rows counts already."""


@dataclass(frozen=True)
class Grid:
    """A table of strings; `align` has l (words), p (a place, kept whole) or r (numbers) a column; `marks` one a row."""

    title: str
    columns: list[str]
    align: str
    rows: list[list[str]]
    marks: list[Mark]
    caption: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered row; `literal` is text that spells a control token without being one."""

    text: str
    weight: float
    kind: Literal["text", "control", "literal"]


# --- tables -----------------------------------------------------------------------------------------------------------


def grids(report: Report) -> list[Grid]:
    """All tables of a report that have something to say, the most important first."""
    made = [_rows(report), _reasons(report), _unread(report), _checks(report), _roles(report), _lengths(report)]
    if report.kind == "dpo":
        made.append(_pairs(report))
    made.append(_plan(report))
    return [grid for grid in made if grid.rows]


def verdict(report: Report) -> tuple[Mark, str]:
    """One line: may one train on this?"""
    counts = ", ".join(f"{report.counts[level]:,} {_plural(level, report.counts[level])}" for level in LEVELS)
    if report.counts["error"]:
        return "error", f"NOT READY: {counts}"
    return ("warning" if report.counts["warning"] else "ok"), f"READY: {counts}"


def _plural(level: Level, count: int) -> str:
    return level + "s" if level in ("error", "warning") and count != 1 else level


def _rows(report: Report) -> Grid:
    rows: list[list[str]] = []
    marks: list[Mark] = []
    for split in report.splits:
        for source in split.sources:
            counts = (source.rows, source.kept, source.trimmed, source.dropped, source.errors)
            tokens = (source.tokens, source.supervised)
            shown = [f"{count:,}" for count in counts + tokens]
            rows.append([split.name, source.path, f"{source.weight:g}", *shown, share(tokens[1], tokens[0])])
            marks.append("error" if source.errors else "")
    columns = ["", "path", "weight", "rows", "kept", "trimmed", "dropped", "errors", "tokens", "supervised", "share"]
    caption = "trimmed rows are kept; tokens are those of kept rows, a pair's prompt counted once"
    return Grid("Rows", columns, "lp" + 9 * "r", rows, marks, caption)


def _reasons(report: Report) -> Grid:
    keys = {key for split in report.splits for key in split.reasons}
    rows: list[list[str]] = []
    marks: list[Mark] = []
    for level, reason in sorted(keys, key=lambda key: (LEVELS.index(key[0]), key[1])):
        counts = [f"{split.reasons[level, reason]:,}" for split in report.splits]
        first = next(s.first_places[level, reason] for s in report.splits if (level, reason) in s.first_places)
        rows.append([level, reason, *counts, first])
        marks.append(level if level in ("error", "warning") else "info")
    columns = ["", "reason", *(split.name for split in report.splits), "first at"]
    return Grid("What was found, by reason", columns, "ll" + "r" * len(report.splits) + "p", rows, marks)


def _unread(report: Report) -> Grid:
    counts = sum((split.unread for split in report.splits), Counter())
    rows = []
    for key, _ in counts.most_common():
        first = next(split.unread_places[key] for split in report.splits if key in split.unread)
        shown = visible(key) if len(key) <= MAX_KEY else f"{visible(key[:MAX_KEY])}..."
        rows.append([shown, *(f"{split.unread[key]:,}" for split in report.splits), first])
    columns = ["key", *(split.name for split in report.splits), "first at"]
    caption = "rows with a key that nothing reads; a misspelt one would stand here"
    return Grid("Keys not read", columns, "l" + "r" * len(report.splits) + "p", rows, [""] * len(rows), caption)


def _checks(report: Report) -> Grid:
    rows: list[list[str]] = []
    marks: list[Mark] = []

    def add(name: str, remark: str, show: Callable[[Split], tuple[str, Mark]]) -> None:
        shown = [show(split) for split in report.splits]
        worst = max((mark for _, mark in shown), key=("", "ok", "info", "warning", "error").index)
        rows.append([name, *(text for text, _ in shown), remark])
        marks.append(worst)

    add("stop-token coverage", "supervised assistant turns that end in a supervised <|im_end|>: must be 100 %", _stop)
    noted = [name for split in report.splits for name in split.notes]
    pairs = ["whitespace_only_difference"] if report.kind == "dpo" else []
    always = ["default_system", "control_tokens", "stripped_newlines", *pairs]
    for name in dict.fromkeys([*always, *noted]):
        if name not in TRIMMED:
            label, remark = NOTES.get(name, (name, ""))
            add(label, remark, _note_of(name))
    if report.kind == "dpo":
        add("chosen == rejected", "dropped", _reason_of("dropped", "identical_answers"))
        add("empty answers", "rows in error", _reason_of("error", "empty_answer"))
        add(
            "contradictions",
            "an earlier pair with chosen and rejected swapped",
            lambda split: _count(split.swapped_pairs, "warning"),
        )
    add(
        "exact duplicates",
        "rows whose tokens equal an earlier row's of the same split",
        lambda split: _count(split.duplicates, "warning"),
    )
    add(
        "distinct prompts",
        "the tokens before the last answer",
        lambda split: (f"{split.distinct_prompts:,} in {split.kept:,} row{'s' * (split.kept != 1)}", ""),
    )
    train = report.splits[0]

    def compared(split: Split) -> bool:
        return split is not train and split.kind == train.kind

    if len(report.splits) > 1:
        add(
            "rows also in train",
            "the same tokens: held-out loss would flatter",
            lambda split: _count(split.rows_in_train, "warning") if compared(split) else ("", ""),
        )
        add(
            "prompts also in train",
            "with another answer",
            lambda split: _count(split.prompts_in_train, "warning") if compared(split) else ("", ""),
        )
    columns = ["check", *(split.name for split in report.splits), "remark"]
    return Grid("Checks", columns, "l" + "r" * len(report.splits) + "l", rows, marks)


def _stop(split: Split) -> tuple[str, Mark]:
    text = f"{share(split.stopped_turns, split.supervised_turns)} of {split.supervised_turns:,}"
    return (text, "ok" if split.stop_coverage == 1 else "error") if split.supervised_turns else ("no turns", "")


def _count(count: int, mark: Mark) -> tuple[str, Mark]:
    return f"{count:,}", mark if count else "ok"


def _reason_of(level: Level, reason: str) -> Callable[[Split], tuple[str, Mark]]:
    mark: Mark = "error" if level == "error" else "info"
    return lambda split: _count(split.reasons[level, reason], mark)


def _note_of(name: str) -> Callable[[Split], tuple[str, Mark]]:
    def show(split: Split) -> tuple[str, Mark]:
        note = split.notes.get(name)
        if note is None:
            return "0", "ok"
        text = f"{note.rows:,} row{'s' * (note.rows != 1)}"
        if note.total != note.rows:
            text = f"{note.total:,} in {text}"
        if name == "default_system":
            text += f" ({share(note.rows, split.kept)})"
        if note.left_out:
            text += f", {note.left_out:,} left out"
        listed = any(level == "warning" for level, reason in split.reasons if reason == name)
        return text, "warning" if listed else "info"

    return show


def _roles(report: Report) -> Grid:
    known = ["system", "user", "assistant", "tool", "other", "chosen", "rejected"]
    found = [role for role in known if any(split.tokens_by_role[role] for split in report.splits)]
    rows = []
    for role in [*found, "all"]:
        row = [role]
        for split in report.splits:
            parts = (split.tokens_by_role, split.supervised_by_role)
            tokens, learnt = (counts.total() if role == "all" else counts[role] for counts in parts)
            row += [f"{tokens:,}", f"{learnt:,}", share(learnt, tokens)]
        rows.append(row)
    columns = ["role", *(name for split in report.splits for name in (split.name, "supervised", "share"))]
    caption = "every turn with its header; of a pair, assistant is the turns and the header within the prompt"
    if report.kind == "sft":
        caption = "every turn with its header and closing newline, which are not supervised"
    return Grid("Tokens by role", columns, "l" + "rrr" * len(report.splits), rows, [""] * len(rows), caption)


def _lengths(report: Report) -> Grid:
    rows: list[list[str]] = []
    limit = report.options.max_length
    names: list[str] = []
    for split in report.splits:
        marks = length_percentiles(split.lengths)
        if marks:
            over = sum(length > limit for length in split.lengths)
            names = list(marks)
            rows.append([split.name, *(f"{value:,.0f}" for value in marks.values()), f"{over:,}"])
    unit = "of the prompt and the longer answer" if report.kind == "dpo" else "of a row"
    caption = f"tokens {unit} before the length policy ({report.options.too_long}), of all rows that could be rendered"
    columns = ["", *names, f"over {limit:,}"]
    return Grid("Lengths", columns, "l" + "r" * (len(names) + 1), rows, [""] * len(rows), caption)


def _pairs(report: Report) -> Grid:
    columns = ["", "pairs", "prompt", "chosen", "rejected", "chosen - rejected", "chosen longer", "rejected longer"]
    rows = []
    saved = []
    for split in report.splits:
        pair = pair_statistics(split)
        if pair is None:
            continue
        means = [f"{value:,.1f}" for value in (pair.mean_prompt, pair.mean_chosen, pair.mean_rejected)]
        bias = [
            f"{pair.mean_difference:+,.1f}",
            f"{100 * pair.chosen_longer:.1f} %",
            f"{100 * pair.rejected_longer:.1f} %",
        ]
        rows.append([split.name, f"{pair.pairs:,}", *means, *bias])
        saved.append(
            f"{split.name}: {pair.shared_tokens:,} tokens with the prompt shared, {pair.unshared_tokens:,} without "
            f"({share(pair.unshared_tokens - pair.shared_tokens, pair.unshared_tokens)} saved)"
        )
    caption = "mean tokens; a length bias is learnt as a preference. " + "; ".join(saved)
    return Grid("Pairs", columns, "l" + "r" * 7, rows, [""] * len(rows), caption)


def _plan(report: Report) -> Grid:
    plan = report.plan
    if plan is None:
        return Grid("Training", [], "", [], [])
    unit = "pairs" if report.kind == "dpo" else "sequences"
    rows = [
        ["steps", f"{plan.steps:,}"],
        ["epochs", f"{plan.epochs:.4g}"],
        [f"{unit} an epoch", f"{plan.rows_per_epoch:,}"],
        ["tokens a step", f"{plan.tokens_per_step:,.0f}"],
        ["tokens in all", f"{plan.tokens_per_step * plan.steps:,.0f}"],
    ]
    if plan.microbatches_per_step is not None:
        rows.append(["micro-batches a step on one GPU", f"{plan.microbatches_per_step:,.1f}"])
    caption = "without padding; tokens a step is the mean of the first steps"
    return Grid("Training would take", ["", ""], "lr", rows, [""] * len(rows), caption)


def share(part: int, whole: int) -> str:
    """A percentage that says 100 % only when it is."""
    if not whole:
        return "-"
    text = f"{100 * part / whole:.1f} %"
    return "100 %" if part == whole else text.replace("100.0", "99.9")


# --- rows with their mask ---------------------------------------------------------------------------------------------

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Control characters and direction overrides as pictures or code points; newline and tab stay."""

    def picture(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"

    return UNSAFE.sub(picture, text)


def segments(template: Template, part: Part) -> list[Segment]:
    """The text of a part cut where supervision or the kind of token changes; joined it is the decoded whole."""
    weights = token_weights(len(part.ids), part.spans).tolist()
    control = set(template.tokenizer.get_added_vocab().values())
    spelt = re.compile("(" + "|".join(map(re.escape, template.control_tokens)) + ")")
    cut: list[Segment] = []
    tokens = enumerate(zip(part.ids, weights, strict=True))
    for (weight, is_control, _), run in groupby(
        tokens, key=lambda item: (item[1][1], item[1][0] in control, item[0] if item[1][0] in control else -1)
    ):
        ids = [token for _, (token, _) in run]
        text = str(template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if is_control:
            cut.append(Segment(text, weight, "control"))
            continue
        for place, piece in enumerate(spelt.split(text)):
            if piece:
                cut.append(Segment(piece, weight, "literal" if place % 2 else "text"))
    return cut


def print_examples(examples: list[Example], template: Template, console: Console) -> None:
    """Rows with supervised tokens in green; without colours they stand between ⟦ and ⟧."""
    colour = console.color_system is not None and not console.no_color
    legend = Text("supervised", "bold green") if colour else Text("⟦supervised⟧")
    console.print(Text.assemble("\n", legend, " tokens; ", ("control tokens", "magenta"), "; \\ before text like one"))
    for example in examples:
        console.print(Text(f"\n── {visible(example.place)} {example_summary(example)}", "bold"), soft_wrap=True)
        for part in example.parts:
            if part.title:
                console.print(Text(f"{part.title}:", "bold cyan"))
            console.print(Text.assemble(*_styled(segments(template, part), colour)), soft_wrap=True)


def example_summary(example: Example) -> str:
    tokens = sum(len(part.ids) for part in example.parts)
    learnt = sum(end - start for part in example.parts for start, end, _ in part.spans)
    why = f", shown for: {NOTES.get(example.why, (example.why,))[0]}" if example.why else ""
    return f"({tokens:,} tokens, {learnt:,} supervised{why})"


def _styled(cut: list[Segment], colour: bool) -> Iterator[tuple[str, str]]:
    for weight, run in groupby(cut, key=lambda segment: segment.weight):
        shown = "" if weight in (0, 1) else f"×{weight:g} "
        if weight and not colour:
            yield "⟦" + shown, ""
        elif shown:
            yield shown, "yellow"
        for segment in run:
            text = visible(segment.text)
            hue = "magenta" if segment.kind == "control" else "green" if weight else "dim"
            style = f"bold {hue}" if weight else hue
            yield ("\\" + text if segment.kind == "literal" else text), style
        if weight and not colour:
            yield "⟧", ""


# --- the terminal -----------------------------------------------------------------------------------------------------


def print_report(report: Report, title: str, console: Console) -> None:
    """All tables, the histogram of lengths, the first problems by severity, the verdict."""
    console.print(Text(visible(title), "bold"), soft_wrap=True)
    console.print(Text(visible(options_line(report)), "dim"), soft_wrap=True)
    for grid in grids(report):
        _print_grid(grid, console)
        if grid.caption:
            console.print(Text(grid.caption, "dim italic"))
        if grid.title == "Lengths":
            _print_histogram(report, console)
    _print_problems(report, console)
    mark, text = verdict(report)
    console.print(Text(f"\n{text}", STYLES[mark]), soft_wrap=True)


def options_line(report: Report) -> str:
    """The policies the rows were judged under."""
    options = dataclasses.asdict(report.options).items()
    return ", ".join(f"{key} {value}" for key, value in options if report.kind == "sft" or key != "supervise")


def _print_grid(grid: Grid, console: Console) -> None:
    """A grid as a table; row by row where a table of this width would cut a number or fold a place."""
    console.print(Text(f"\n{grid.title}", "bold"))
    if _least_width(grid) <= console.width:
        console.print(_table(grid))
        return
    for cells, mark in zip(grid.rows, grid.marks, strict=True):
        style = STYLES.get(mark, "")
        named = [*zip(grid.columns, map(visible, cells), grid.align, strict=True)]
        console.print(Text("  ".join(cell for _, cell, side in named if side == "l" and cell), style))
        for name, place in ((name, cell) for name, cell, side in named if side == "p"):
            console.print(Text(f"  {name} {place}", style), soft_wrap=True)
        numbers = [Text(f"{name} {cell}", style) for name, cell, side in named if side == "r" and cell]
        console.print(Padding(Columns(numbers, padding=(0, 2)), (0, 0, 0, 2)))


def _table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(grid.columns))
    for name, side in zip(grid.columns, grid.align, strict=True):
        table.add_column(Text(name), justify="right" if side == "r" else "left", no_wrap=side != "l", overflow="fold")
    for cells, mark in zip(grid.rows, grid.marks, strict=True):
        table.add_row(*(Text(visible(cell)) for cell in cells), style=STYLES.get(mark, ""))
    return table


def _least_width(grid: Grid) -> int:
    """Columns of the terminal that a table needs with its words folded and all else whole."""

    def widest(cells: Iterable[str]) -> int:
        return max(cell_len(visible(cell)) for cell in cells)

    columns = zip(grid.align, zip(grid.columns, *grid.rows, strict=True), strict=True)
    widths = [min(widest(cells), MIN_TEXT) if side == "l" else widest(cells) for side, cells in columns]
    return sum(widths) + 3 * (len(widths) - 1)  # of SIMPLE_HEAD, between two columns


@dataclass(frozen=True)
class Bar:
    """One bin of the training rows' lengths; `below` is the share of rows up to its end, `width` of the largest bin."""

    label: str
    count: int
    below: str
    width: float
    mark: Literal["", "limit", "beyond"]
    """beyond `data.max_length`; limit: the last bin up to it, where others follow."""


def bars(report: Report) -> list[Bar]:
    """The histogram of the training rows' lengths."""
    limit = report.options.max_length
    bins = histogram(report.splits[0].lengths, limit)
    most, total, below = max((bin.count for bin in bins), default=0), sum(bin.count for bin in bins), 0
    made = []
    for bin in bins:
        below += bin.count
        mark: Literal["", "limit", "beyond"] = ""
        if bin.low >= limit:
            mark = "beyond"
        elif bin.high == limit and bin is not bins[-1]:
            mark = "limit"
        made.append(Bar(f"{bin.low + 1:,}-{bin.high:,}", bin.count, share(below, total), bin.count / most, mark))
    return made


def _print_histogram(report: Report, console: Console) -> None:
    console.print(Text(f"\n{report.splits[0].name}, rows by tokens", "bold"))
    for bar in bars(report):
        drawn = "█" * max(1, round(BAR * bar.width)) if bar.count else ""
        line = f"{bar.label:>15}  {bar.count:>9,}  {bar.below:>7}  {drawn}"
        console.print(Text(line, "red" if bar.mark == "beyond" else "green"), soft_wrap=True)
        if bar.mark == "limit":
            console.print(Text(f"{'max_length':>15}  {'-' * (20 + BAR)}", "red"), soft_wrap=True)


def _print_problems(report: Report, console: Console) -> None:
    if not report.problems:
        return
    console.print(Text("\nProblems", "bold"))
    for level, listed in groupby(report.problems, key=lambda problem: problem.level):
        alike: dict[tuple[str, str], list[Problem]] = {}
        for problem in listed:
            alike.setdefault((problem.reason, problem.message), []).append(problem)
        more = report.counts[level]
        for (first, *others), _ in zip(alike.values(), range(PRINTED[level]), strict=False):
            more -= 1 + len(others)
            line = Text(f"{level:<8}", STYLES[level])
            line.append(f"{visible(first.place)}: {visible(first.message)} [{first.reason}]", "default")
            console.print(line, soft_wrap=True)
            if others:
                rows = f"{len(others):,} more rows" if len(others) > 1 else "another row"
                console.print(Text(f"{'':<8}the same in {rows}: {_places(others)}"), soft_wrap=True)
        if more > 0:
            console.print(Text(f"{'':<8}... and {more:,} more; --html lists them", STYLES[level]), soft_wrap=True)


def _places(problems: list[Problem]) -> str:
    shown = ", ".join(visible(problem.place) for problem in problems[:PLACES])
    return f"{shown}, ..." if len(problems) > PLACES else shown
