"""Files of rows -> cached token arrays, and every row's verdict for the flight check.

What a caller uses:
- `tokenize(kind, paths, tokenizer, options, ...)` -> `TokenDataset`, of conversations ("sft") or pairs ("dpo"):
  tokenises in worker processes, or loads the cache when files, options, template, tokenizer and code are the same.
  Call it on rank 0 first and on the others afterwards: the second call only loads. Rows in error end it with one
  ValueError that lists the first ten with file and line; dropped rows are counted in `TokenDataset.report`;
- `TokenDataset.dataset`: the `datasets.Dataset`, columns as in `SFT_COLUMNS` / `DPO_COLUMNS`; `.column(name)` gives one
  of its number columns as a numpy array; `.paths` what the column `source` counts; `.place(index)` is `file:line`;
- `judge(kind, paths, tokenizer, options, ...)`: a `JudgedRow` for every row in order, good or bad, never raising for a
  row and leaving nothing on the disk.

Rows travel to the workers as JSON text, so Arrow never sees tool schemas. The cache folder is named by a fingerprint
and appears by one rename when it is whole; a folder whose files do not match their checksums is rebuilt.
"""

import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from qwen_train.config import DataConfig, DataPaths, Kind
from qwen_train.data.chat import ChatOptions, EncodedConversation, EncodedPreference, Template
from qwen_train.data.digest import file_sha256, json_sha256
from qwen_train.data.formats import Conversation, Preference, RowError, parse_row
from qwen_train.data.scratch import beside, clean_scratch, scratch_folder
from qwen_train.data.sources import (
    RawRow,
    Source,
    TableColumn,
    build_table,
    content_hash,
    load_table,
    read_rows,
    row_place,
    save_table,
    sources_of,
)

log = logging.getLogger(__name__)

PLACE_COLUMNS = {"source": TableColumn("int32"), "row": TableColumn("int64")}
SFT_COLUMNS = {
    "input_ids": TableColumn("int32", is_list=True),
    "span_starts": TableColumn("int32", is_list=True),
    "span_ends": TableColumn("int32", is_list=True),
    "span_weights": TableColumn("float32", is_list=True),
    "length": TableColumn("int32"),
    "total_weight": TableColumn("float32"),
    **PLACE_COLUMNS,
}
DPO_COLUMNS = {
    "prompt_ids": TableColumn("int32", is_list=True),
    "chosen_ids": TableColumn("int32", is_list=True),
    "rejected_ids": TableColumn("int32", is_list=True),
    "length": TableColumn("int32"),
    **PLACE_COLUMNS,
}
COLUMNS: dict[Kind, dict[str, TableColumn]] = {"sft": SFT_COLUMNS, "dpo": DPO_COLUMNS}
RAW_COLUMNS = {
    **PLACE_COLUMNS,
    "text": TableColumn("string"),
    "has_lines": TableColumn("bool"),
    "error": TableColumn("string"),
}
VERDICT_COLUMNS = {
    "status": TableColumn("string"),
    "reason": TableColumn("string"),
    "message": TableColumn("string"),
    "notes": TableColumn("string"),
    "has_lines": TableColumn("bool"),
}
NOTES: dict[str, tuple[str, str]] = {
    "default_system": ("default system message added", "by the chat template; data.system none or a text avoids it"),
    "control_tokens": ("control tokens in content", "data.control_tokens says what becomes of them"),
    "rendered_content": ("rows that look rendered already", "content holds <|im_start|> or ends with <|im_end|>"),
    "stripped_newlines": ("answers that began with newlines", "stripped: they would merge with the header's newline"),
    "reasoning_left_out": ("reasoning the template left out", "of messages, as the chat template does it"),
    "turns_trimmed": ("oldest turns left out", "to fit data.max_length"),
    "weight_ignored": ("weights without effect", "on messages that are not the assistant's"),
    "whitespace_only_difference": ("answers that differ only in whitespace", "a pair that teaches nothing else"),
}
"""Label and remark of the notes of `data/chat.py`; others show under their own name."""
CODE = ("sources.py", "formats.py", "chat.py", "tokenize.py")
"""What decides the content of the cache."""
MAX_LISTED = 10
RENDERED_SHARE = 0.03
"""Of the kept rows: fewer that look rendered may be about ChatML."""
ROWS_PER_WORKER = 1000
BATCH_ROWS = 256

Status = Literal["kept", "dropped", "error"]


@dataclass(frozen=True)
class JudgedRow:
    """One row's verdict; `parsed` is None when it could not be read, `encoded` None when it is not kept.

    `length`: tokens of a row that is too long.
    """

    source: int
    path: str
    row: int
    has_lines: bool
    status: Status
    reason: str = ""
    message: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    parsed: Conversation | Preference | None = None
    encoded: EncodedConversation | EncodedPreference | None = None
    length: int | None = None

    @property
    def place(self) -> str:
        return row_place(self.path, self.row, self.has_lines)


@dataclass
class TokenReport:
    """What became of the rows: counts by reason, what was changed in kept rows, tokens; stored beside the cache."""

    kind: Kind
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    lines: list[bool] = field(default_factory=list)
    content: str = ""
    """Hash of the token arrays: the same for the same rows, wherever their files lie and whatever made them tokens."""

    def summary(self) -> str:
        """One line for the log."""
        unit = "conversations" if self.kind == "sft" else "pairs"
        parts = [
            f"{self.kept:,} of {self.rows:,} {unit}, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        ]
        parts += [f"dropped {name}: {count:,}" for name, count in sorted(self.dropped.items())]
        labels = {name: NOTES[name][0] if name in NOTES else name for name in self.notes}
        parts += [f"{labels[name]}: {count:,}" for name, count in sorted(self.notes.items())]
        return "; ".join(parts)

    @property
    def warning(self) -> str:
        """What a person should know before the training, "" if nothing."""
        return rendered_warning(self.notes.get("rendered_content", 0), self.kept)


def rendered_warning(rendered: int, kept: int) -> str:
    """What to say of `rendered` among `kept` rows whose content a chat template seems to have written; "" of a few."""
    if rendered < max(2, RENDERED_SHARE * kept):
        return ""
    return (
        f"{rendered:,} of {kept:,} rows look rendered already: their content holds <|im_start|> or ends with "
        "<|im_end|>, and the chat template is applied to it once more; give plain messages"
    )


@dataclass(frozen=True)
class TokenDataset:
    """Token arrays of all kept rows of all sources, in order; `sources` carry the mixing weights."""

    dataset: Any
    report: TokenReport
    sources: list[Source]
    folder: Path

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def paths(self) -> list[str]:
        return [source.path for source in self.sources]

    def column(self, name: str) -> np.ndarray:
        """A column of single numbers (length, total_weight, source, row) as one array."""
        return np.asarray(self.dataset.data.column(name).to_numpy())

    def largest_id(self) -> int:
        """Of all token ids; reads every one."""
        names = [name for name in self.dataset.column_names if name.endswith("_ids")]
        chunks = (chunk.flatten().to_numpy() for name in names for chunk in self.dataset.data.column(name).chunks)
        return max((int(ids.max()) for ids in chunks if len(ids)), default=-1)

    def place(self, index: int) -> str:
        """`file:line` of a kept row."""
        row = self.dataset[index]
        source = int(row["source"])
        return row_place(self.paths[source], int(row["row"]), self.report.lines[source])


def tokenize(
    kind: Kind,
    paths: DataPaths,
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions,
    *,
    format: str = "auto",
    workers: int = DataConfig.workers,
    cache_dir: str | Path,
    name: str = "data.train",
) -> TokenDataset:
    """Rows as token arrays, from the cache where possible; ValueError lists rows in error (`name`: the field)."""
    sources = sources_of(paths, kind, format, name)
    Template(tokenizer)  # an unusable template is refused before any work, and before an old cache is looked at
    judging = _Judge(kind, tokenizer, options, format)
    root = Path(cache_dir) / "tokens"
    folder = root / _fingerprint(sources, judging)
    for left in clean_scratch(root):
        log.warning("%s: deleted, left by a process that died while tokenising", left)
    if not folder.exists():
        _build(sources, judging, workers, folder)
    try:
        dataset, report = _load(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: the token cache is damaged (%s); it is built again", folder, error)
        aside = beside(folder)  # and so deleted, if not by us
        _rename_away(folder, aside)
        _build(sources, judging, workers, folder)
        dataset, report = _load(folder)
    return TokenDataset(dataset, report, sources, folder)


def judge(
    kind: Kind,
    paths: DataPaths,
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions,
    *,
    format: str = "auto",
    name: str = "data.train",
) -> Iterator[JudgedRow]:
    """Every row's verdict in order; ValueError only for what is not a row's fault (a missing file, no template)."""
    sources = sources_of(paths, kind, format, name)
    judging = _Judge(kind, tokenizer, options, format)
    rows = (row for index, source in enumerate(sources) for row in read_rows(index, source.path))
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield from judging.verdicts(batch)


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """All that decides what becomes of a raw row. Called by the workers: columns in, columns out."""

    kind: Kind
    tokenizer: PreTrainedTokenizerBase
    options: ChatOptions
    format: str

    @cached_property
    def template(self) -> Template:
        return Template(self.tokenizer)

    def verdicts(self, rows: Sequence[RawRow]) -> list[JudgedRow]:
        """Parse and encode a batch of rows; nothing that a row holds raises."""
        parsed: list[Any] = []
        for row in rows:
            try:
                if row.error:
                    raise RowError(*row.error)
                parsed.append(parse_row(row.text, self.kind, self.format))
            except RowError as error:
                parsed.append(error)
        good = [item for item in parsed if not isinstance(item, RowError)]
        encoded = iter(self.template.encode(self.kind, good, self.options))
        judged = []
        for row, item in zip(rows, parsed, strict=True):
            place = (row.source, row.path, row.row, row.has_lines)
            record = None if isinstance(item, RowError) else item
            result = item if isinstance(item, RowError) else next(encoded)
            if isinstance(result, RowError):
                status: Status = "dropped" if result.drop else "error"
                verdict = (status, result.reason, str(result), result.notes)
                judged.append(JudgedRow(*place, *verdict, parsed=record, length=result.length))
            else:
                judged.append(JudgedRow(*place, "kept", notes=result.notes, parsed=record, encoded=result))
        return judged

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            RawRow(source, "", row, text, has_lines, tuple(json.loads(error)) if error else None)
            for source, row, text, has_lines, error in zip(*(batch[name] for name in RAW_COLUMNS), strict=True)
        ]
        encode = _conversation_columns if self.kind == "sft" else _preference_columns
        table: dict[str, list[Any]] = {name: [] for name in (*COLUMNS[self.kind], *VERDICT_COLUMNS)}
        for verdict in self.verdicts(rows):
            values = encode(verdict.encoded) | {
                "source": verdict.source,
                "row": verdict.row,
                "status": verdict.status,
                "reason": verdict.reason,
                "message": verdict.message,
                "notes": json.dumps(verdict.notes),
                "has_lines": verdict.has_lines,
            }
            for name, column in table.items():
                column.append(values[name])
        return table


def _conversation_columns(encoded: Any) -> dict[str, Any]:
    if encoded is None:
        encoded = EncodedConversation([], [])
    starts, ends, weights = zip(*encoded.spans, strict=True) if encoded.spans else ((), (), ())
    return {
        "input_ids": np.asarray(encoded.input_ids, dtype=np.int32),
        "span_starts": list(starts),
        "span_ends": list(ends),
        "span_weights": list(weights),
        "length": len(encoded.input_ids),
        "total_weight": encoded.total_weight,
    }


def _preference_columns(encoded: Any) -> dict[str, Any]:
    if encoded is None:
        encoded = EncodedPreference([], [], [])
    ids = (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)
    arrays = [np.asarray(part, dtype=np.int32) for part in ids]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {**dict(zip(names, arrays, strict=True)), "length": sum(map(len, arrays))}


# --- the cache --------------------------------------------------------------------------------------------------------


def _fingerprint(sources: list[Source], judging: _Judge) -> str:
    """Names the cache by all that decides its content: files, options, template, tokenizer, this code, libraries."""
    tokenizer = judging.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "kind": judging.kind,
        "format": judging.format,
        "options": asdict(judging.options),
        "sources": [(source.path, content_hash(source.path)) for source in sources],
        "template": tokenizer.chat_template,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest() if backend is not None else str(tokenizer),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "code": [file_sha256(Path(__file__).with_name(name)) for name in CODE],
        "versions": [importlib.metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")],
    }
    return json_sha256(parts)[:32]


def _build(sources: list[Source], judging: _Judge, workers: int, folder: Path) -> None:
    """Tokenise into a temporary folder beside `folder` and rename it there; whoever comes second keeps the first's."""
    try:
        with scratch_folder(folder) as work:
            raw = _RawRows(tuple(source.path for source in sources))
            if next(raw(), None) is None:
                raise ValueError(f"{', '.join(source.path for source in sources)}: no row in it; give a file with rows")
            table = build_table(
                raw,
                RAW_COLUMNS,
                judging,
                {**COLUMNS[judging.kind], **VERDICT_COLUMNS},
                workers=workers,
                rows_per_worker=ROWS_PER_WORKER,
                batch_size=BATCH_ROWS,
                folder=work / "work",
            )
            report, keep = _reported(judging.kind, table, sources)
            done = work / "done"
            save_table(table, keep, list(COLUMNS[judging.kind]), done)
            del table
            report.content = _content(judging.kind, load_table(done))
            (done / "report.json").write_text(json.dumps(asdict(report), indent=1))
            manifest = {file.name: file_sha256(file) for file in sorted(done.iterdir())}
            (done / "manifest.json").write_text(json.dumps(manifest, indent=1))
            try:
                os.rename(done, folder)
            except OSError:
                if not folder.exists():
                    raise
    except OSError as error:
        raise ValueError(
            f"{folder.parent}: the token cache cannot be written ({error}); free space or set data.cache_dir"
        ) from error


@dataclass(frozen=True)
class _RawRows:
    """The raw rows of all sources as columns, an iterable that `datasets` can call for."""

    paths: tuple[str, ...]

    def __call__(self) -> Iterator[dict[str, Any]]:
        for index, path in enumerate(self.paths):
            for raw in read_rows(index, path):
                error = json.dumps(raw.error) if raw.error else ""
                yield {
                    "source": index,
                    "row": raw.row,
                    "text": raw.text,
                    "has_lines": raw.has_lines,
                    "error": error,
                }


def _reported(kind: Kind, table: Any, sources: list[Source]) -> tuple[TokenReport, list[int]]:
    """The report and the indices of kept rows; ONE ValueError when rows are in error or none is left."""
    status = np.asarray(table["status"])
    report = TokenReport(kind, rows=len(status), lines=[False] * len(sources))
    origin = np.asarray(table.data.column("source").to_numpy())
    for source in range(len(sources)):
        first = np.flatnonzero(origin == source)[:1]
        report.lines[source] = bool(table[int(first[0])]["has_lines"]) if len(first) else False
    wrong = np.flatnonzero(status == "error")
    if len(wrong):
        raise ValueError(_problems(table, wrong, sources, report))
    dropped = np.flatnonzero(status == "dropped")
    keep = np.flatnonzero(status == "kept")
    report.dropped = dict(Counter(table.select(dropped)["reason"])) if len(dropped) else {}
    report.kept = len(keep)
    if not len(keep):
        raise ValueError(f"{', '.join(source.path for source in sources)}: {nothing_left(report.rows, report.dropped)}")
    notes: Counter[str] = Counter()
    for text, count in Counter(table.select(keep)["notes"]).items():
        for note, value in json.loads(text).items():
            notes[note] += value * count
    report.notes = dict(notes)
    report.tokens = int(table.data.column("length").to_numpy().sum())
    report.supervised_tokens = _supervised(kind, table)
    return report, keep.tolist()


def nothing_left(rows: int, dropped: Mapping[str, int], errors: int = 0) -> str:
    """What to say of rows of which none can be used: the rows left out by reason, those in error, what to do."""
    if errors == rows:
        wrong = (
            f"all {errors:,} rows are in error; repair them" if errors > 1 else "the only row is in error; repair it"
        )
        return f"{wrong} or give other data"
    reasons = [f"{name}: {count:,}" for name, count in dropped.items()]
    reasons += [f"in error: {errors:,}"] if errors else []
    remedy = "raise data.max_length or give other data" if dropped.get("too_long") else "give other data"
    return f"none of {rows:,} rows is left ({', '.join(reasons)}); {remedy}"


def _content(kind: Kind, table: Any) -> str:
    """`TokenReport.content`: of the columns but the rows' places, however they are cut into batches."""
    digests = {}
    for name, column in COLUMNS[kind].items():
        if name in PLACE_COLUMNS:
            continue
        lengths, values = hashlib.sha256(), hashlib.sha256()
        for chunk in table.data.column(name).chunks:
            if column.is_list:
                lengths.update(chunk.value_lengths().to_numpy())
                chunk = chunk.flatten()
            values.update(chunk.to_numpy())
        digests[name] = [lengths.hexdigest(), values.hexdigest()]
    return json_sha256(digests)


def _supervised(kind: Kind, table: Any) -> int:
    """Tokens with a weight above 0 (SFT) or of answers (DPO) in the kept rows; other rows hold empty lists."""
    if kind == "dpo":
        names = ("chosen_ids", "rejected_ids")
        return sum(len(chunk.flatten()) for name in names for chunk in table.data.column(name).chunks)
    starts, ends = (
        sum(int(chunk.flatten().to_numpy().sum()) for chunk in table.data.column(name).chunks)
        for name in ("span_starts", "span_ends")
    )
    return ends - starts


def _problems(table: Any, wrong: np.ndarray, sources: list[Source], report: TokenReport) -> str:
    lines = []
    for row in table.select(wrong[:MAX_LISTED]).remove_columns("notes"):
        place = row_place(sources[row["source"]].path, row["row"], report.lines[row["source"]])
        lines.append(f"  {place}: {row['message']} [{row['reason']}]")
    if len(wrong) > MAX_LISTED:
        lines.append(f"  ... and {len(wrong) - MAX_LISTED:,} more")
    counts = Counter(table.select(wrong)["reason"])
    shown = ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common())
    names = ", ".join(source.path for source in sources)
    head = f"{names}: {len(wrong):,} of {report.rows:,} rows cannot be used ({shown}); repair or remove them:"
    return "\n".join([head, *lines])


def _load(folder: Path) -> tuple[Any, TokenReport]:
    """Open a cache folder after comparing every file with the manifest; ValueError or OSError when it is damaged."""
    manifest = json.loads((folder / "manifest.json").read_text())
    present = {file.name for file in folder.iterdir()} - {"manifest.json"}
    if present != set(manifest):
        raise ValueError(f"files differ from the manifest: {', '.join(sorted(present ^ set(manifest)))}")
    for file, expected in manifest.items():
        if file_sha256(folder / file) != expected:
            raise ValueError(f"{file} does not match its checksum")
    report = TokenReport(**json.loads((folder / "report.json").read_text()))
    return load_table(folder), report


def _rename_away(folder: Path, aside: Path) -> None:
    """Move a damaged folder out of the way; another process may have done it just before."""
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
