"""A `Report` as one HTML file that loads nothing: tables, histogram, every problem, rows with their mask.

The content of rows is untrusted: every string passes through `_text`, and the page forbids itself scripts and loads.
"""

from collections.abc import Iterator
from html import escape
from itertools import groupby

from qwen_train.data.chat import Template
from qwen_train.data.check import LEVELS, Example, Part, Problem, Report
from qwen_train.output.check_view import (
    Grid,
    Segment,
    bars,
    example_summary,
    grids,
    options_line,
    segments,
    verdict,
    visible,
)

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #667085; --line: #e3e7ed;
  --ok: #147a4b; --warning: #a15c00; --error: #c02828; --info: #2563a8;
  --learnt: #c9f2d9; --learnt-ink: #0b4a2c; --refused: #fbdcdc; --refused-ink: #6d1616; --control: #7c3aed; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161d; --card: #1a202a; --ink: #e4e8ee; --soft: #98a2b3; --line: #2c3543;
  --ok: #4cc38a; --warning: #e5a54b; --error: #ff7b72; --info: #79b8ff;
  --learnt: #124a2e; --learnt-ink: #c6f6da; --refused: #571f24; --refused-ink: #ffd9d6; --control: #b794ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 80px; }
h1 { font-size: 22px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 10px; }
p { margin: 4px 0; }
.soft { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.verdict { margin: 18px 0; padding: 12px 16px; border-radius: 10px; font-weight: 600; background: var(--card);
  border: 1px solid var(--line); border-left: 6px solid currentColor; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 16px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 12.5px; border-bottom: 1px solid var(--line); }
th, td { padding: 5px 12px 5px 0; vertical-align: top; }
td { border-top: 1px solid var(--line); } tr:first-child > td { border-top: 0; }
td:last-child, th:last-child { padding-right: 0; }
.r { text-align: right; white-space: nowrap; } .l, .p { overflow-wrap: anywhere; }
.r + .l, .r + .p { padding-left: 16px; }
td.p { min-width: 220px; } table.grid td.l:not(:first-child) { min-width: 160px; }
table.grid td.l:first-child { white-space: nowrap; } table.pairs { width: auto; min-width: 420px; }
@media (max-width: 800px) { table.grid td.l:first-child { white-space: normal; min-width: 150px; }
  table.grid td.l:not(:first-child) { min-width: 26em; } table.pairs { min-width: 0; } }
tr.ok > td:first-child::before, tr.warning > td:first-child::before, tr.error > td:first-child::before,
tr.info > td:first-child::before { content: "\\25CF"; margin-right: 8px; }
tr.ok > td:first-child::before, .verdict.ok { color: var(--ok); }
tr.warning > td:first-child::before, .verdict.warning { color: var(--warning); }
tr.error > td:first-child::before, .verdict.error { color: var(--error); }
tr.info > td:first-child::before { color: var(--info); }
.bars td { padding: 1px 10px 1px 0; border: 0; font-size: 13px; white-space: nowrap; }
.bars td:last-child { width: 100%; }
.bar { height: 13px; border-radius: 3px; background: var(--ok); min-width: 2px; opacity: .85; }
.beyond .bar { background: var(--error); } .beyond td { color: var(--error); }
.limit td { border-bottom: 2px dashed var(--error); }
details { border-top: 1px solid var(--line); padding: 8px 0; } details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; } summary .soft { font-weight: 400; }
.problems { table-layout: fixed; min-width: 640px; }
.problems td:first-child { width: 30%; } .problems td:last-child { width: 17%; }
.problems tr { content-visibility: auto; contain-intrinsic-height: 30px; }
.place, .row { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); border-radius: 8px; padding: 10px 12px;
  margin: 8px 0; line-height: 1.55; color: var(--soft); max-height: 560px; overflow-y: auto; }
.learnt { background: var(--learnt); color: var(--learnt-ink); border-radius: 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.learnt[title] { outline: 1px dashed currentColor; }
.rejected .learnt { background: var(--refused); color: var(--refused-ink); }
.control { color: var(--control); font-weight: 600; } .literal { border-bottom: 2px dotted var(--error); }
.newline { opacity: .35; user-select: none; }
.part { font-size: 12.5px; font-weight: 600; color: var(--soft); margin-top: 8px;
  text-transform: uppercase; letter-spacing: .04em; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
OPEN_ROWS = 4


def html_page(report: Report, title: str, template: Template) -> Iterator[str]:
    """The page in pieces, to be written one after the other."""
    mark, words = verdict(report)
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_text(title)}</h1>\n<p class="soft">{_text(options_line(report))}</p>\n'
        f'<div class="verdict {mark}">{_text(words)}</div>\n'
    )
    for grid in grids(report):
        drawn = "".join(_bars(report)) if grid.title == "Lengths" else ""
        yield f"<section>\n<h2>{_text(grid.title)}</h2>\n{_table(grid)}{_caption(grid)}{drawn}</section>\n"
    yield from _problems(report)
    yield from _examples(report, template)
    yield "</main>\n</body>\n</html>\n"


def _text(text: str) -> str:
    return escape(visible(text))


def _caption(grid: Grid) -> str:
    return f'<p class="soft">{_text(grid.caption)}</p>\n' if grid.caption else ""


def _table(grid: Grid) -> str:
    lines = [f'<div class="scroll"><table class="grid{"" if any(grid.columns) else " pairs"}">']
    if any(grid.columns):
        cells = zip(grid.columns, grid.align, strict=True)
        lines.append(
            f"<thead><tr>{''.join(f'<th class={side}>{_text(name)}</th>' for name, side in cells)}</tr></thead>"
        )
    lines.append("<tbody>")
    for row, mark in zip(grid.rows, grid.marks, strict=True):
        cells = zip(row, grid.align, strict=True)
        shown = "".join(f"<td class={side}>{_text(cell)}</td>" for cell, side in cells)
        lines.append(f'<tr class="{mark}">{shown}</tr>')
    return "\n".join([*lines, "</tbody></table></div>\n"])


def _bars(report: Report) -> Iterator[str]:
    yield f'<p class="part">{_text(report.splits[0].name)}: rows by tokens (count, share up to here)</p>\n'
    yield '<table class="bars"><tbody>\n'
    shown = bars(report)
    for bar in shown:
        drawn = f'<div class="bar" style="width:{100 * bar.width:.2f}%"></div>' if bar.count else ""
        yield (
            f'<tr class="{bar.mark}"><td class=r>{bar.label}</td><td class=r>{bar.count:,}</td>'
            f"<td class=r>{bar.below}</td><td>{drawn}</td></tr>\n"
        )
    has_line = any(bar.mark == "limit" for bar in shown)
    cut = f"the dashed line is data.max_length, {report.options.max_length:,}" if has_line else ""
    yield f'</tbody></table><p class="soft">{cut}</p>\n'


def _problems(report: Report) -> Iterator[str]:
    if not report.problems:
        return
    yield "<section>\n<h2>Problems</h2>\n"
    for level, group in groupby(report.problems, key=lambda problem: problem.level):
        listed = list(group)
        count = report.counts[level]
        opened = " open" if level == "error" or len(listed) <= 20 else ""
        more = f", the first {len(listed):,} of them below" if count > len(listed) else ""
        yield f"<details{opened}><summary>{level} <span class=soft>{count:,}{more}</span></summary>\n"
        yield '<div class="scroll"><table class="problems"><tbody>\n'
        yield from map(_problem, listed)
        yield "</tbody></table></div></details>\n"
    yield "</section>\n"


def _problem(problem: Problem) -> str:
    mark = problem.level if problem.level in LEVELS[:2] else "info"
    return (
        f'<tr class="{mark}"><td class="l place">{_text(problem.place)}</td><td class=l>{_text(problem.message)}</td>'
        f'<td class="l soft">{_text(problem.reason)}</td></tr>\n'
    )


def _examples(report: Report, template: Template) -> Iterator[str]:
    if not report.examples:
        return
    rejected = '<span class="rejected"><span class="learnt">supervised, rejected</span></span> &nbsp; '
    of_pairs = rejected if report.kind == "dpo" else ""
    yield (
        '<section>\n<h2>Rows and what is learnt of them</h2>\n<p class="soft"><span class="learnt">supervised</span> '
        f'&nbsp; {of_pairs}not supervised &nbsp; <span class="control">control token</span> &nbsp; '
        '<span class="literal">text that only looks like one</span></p>\n'
    )
    for index, example in enumerate(report.examples):
        yield _example(example, template, is_open=index < OPEN_ROWS)
    yield "</section>\n"


def _example(example: Example, template: Template, is_open: bool) -> str:
    parts = "".join(_part(part, template) for part in example.parts)
    summary = f"{_text(example.place)} <span class=soft>{_text(example_summary(example))}</span>"
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>\n{parts}</details>\n"


def _part(part: Part, template: Template) -> str:
    title = f'<div class="part">{_text(part.title)}</div>' if part.title else ""
    shown = "".join(map(_segment, segments(template, part)))
    return f'{title}<div class="row {_text(part.title)}">{shown}</div>\n'


def _segment(segment: Segment) -> str:
    classes = [name for name, holds in (("learnt", segment.weight > 0), (segment.kind, True)) if holds]
    hint = f' title="weight {segment.weight:g}"' if segment.weight not in (0, 1) else ""
    text = _text(segment.text).replace("\n", '<span class="newline">↵</span>\n')
    return f'<span class="{" ".join(classes)}"{hint}>{text}</span>'
