"""The flight check: judged rows in, a `Report` out. What a training of this config would see, counted and compared.

What a caller uses:
- `examine(splits, template, options, config, examples)`: streams the rows of every split once and keeps a few
  dozen bytes of each (lengths and hashes, never rows), so that a million rows fit;
- `dump_row(row)`: a kept row as `--dump` writes it;
- `Report`: splits with their counts, `problems` with file and line in order of severity, the training plan, examples;
- `histogram(lengths, max_length)`: bins for the reader of a report, with an edge at max_length.

Levels of a problem: `error` (training would refuse it, or teach nonsense: the check fails), `warning` (training runs,
a person should look), `dropped` and `trimmed` (the policies of the config at work). Duplicates and overlap are
compared by token ids, as the model would see them.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from qwen_train.config import DPOConfig, Kind, SFTConfig
from qwen_train.data.chat import ChatOptions, EncodedConversation, EncodedPreference, Template
from qwen_train.data.formats import misspelt
from qwen_train.data.packing import empty_batch
from qwen_train.data.sources import Source, data_splits, row_place
from qwen_train.data.stream import Stream, plan_microbatches
from qwen_train.data.tokenize import JudgedRow, nothing_left, rendered_warning

if TYPE_CHECKING:
    Ints: TypeAlias = array[int]
else:
    Ints = array  # not subscriptable before Python 3.12

Level = Literal["error", "warning", "dropped", "trimmed"]
LEVELS: tuple[Level, ...] = get_args(Level)
MAX_PROBLEMS = 100_000
"""Problems of one level kept with their text; more are only counted."""
UNREADABLE = "unreadable_source"
NO_LIMIT = 2**31 - 1
IGNORE_INDEX = -100
MAX_BINS = 20
PLANNED_STEPS = 50
PLANNED_ROWS = 100_000
"""Of the planned steps: about a second."""
MAX_KEYS = 100
"""Different unread keys of a split that are counted; rows may be keyed by anything."""
LISTED_NOTES = {
    "whitespace_only_difference": "chosen and rejected differ only in whitespace",
    "weight_ignored": "train or weight stands on a message that is not the assistant's; it has no effect",
}
"""Notes on a kept row that a person should look at, row by row; all others are only counted."""


@dataclass(frozen=True)
class Problem:
    level: Level
    place: str
    reason: str
    message: str


@dataclass(frozen=True)
class Part:
    """A stretch of an example: spans are `(start, end, weight)` of supervised tokens."""

    title: str
    ids: list[int]
    spans: list[tuple[int, int, float]]


@dataclass(frozen=True)
class Example:
    """A kept row to look at; `why` says what it was picked for, "" for the first ones of the data."""

    place: str
    why: str
    parts: list[Part]


@dataclass
class SourceCounts:
    """One path of a split. Tokens are those of kept rows, a pair's prompt once."""

    path: str
    weight: float
    rows: int = 0
    kept: int = 0
    trimmed: int = 0
    dropped: int = 0
    errors: int = 0
    tokens: int = 0
    supervised: int = 0
    has_lines: bool = False


@dataclass
class NoteCount:
    """Kept rows that carry a note, how often in all, and how often in rows that are left out."""

    rows: int = 0
    total: int = 0
    left_out: int = 0
    first: str = ""
    """Place of the first of the rows."""


@dataclass
class Split:
    """What was counted of `data.train`, `data.eval` or `data.eval_sft`."""

    name: str
    kind: Kind
    sources: list[SourceCounts]
    reasons: Counter[tuple[Level, str]] = field(default_factory=Counter)
    first_places: dict[tuple[Level, str], str] = field(default_factory=dict)
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    supervised_by_role: Counter[str] = field(default_factory=Counter)
    notes: dict[str, NoteCount] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    """Rows with a key that nothing reads, left-out rows too."""
    unread_places: dict[str, str] = field(default_factory=dict)
    """The first of them."""
    supervised_turns: int = 0
    """Assistant turns with a supervised token."""
    stopped_turns: int = 0
    """Those of them whose `<|im_end|>` is supervised."""
    lengths: Ints = field(default_factory=lambda: array("i"))
    """Tokens that max_length limits, of every row that could be rendered, before the length policy."""
    # one entry a kept row:
    row_sources: Ints = field(default_factory=lambda: array("i"))
    row_numbers: Ints = field(default_factory=lambda: array("q"))
    row_hashes: Ints = field(default_factory=lambda: array("Q"))
    prompt_hashes: Ints = field(default_factory=lambda: array("Q"))
    prompt_lengths: Ints = field(default_factory=lambda: array("i"))
    chosen_lengths: Ints = field(default_factory=lambda: array("i"))
    """Answer tokens; of pairs `rejected_lengths` too. SFT: all tokens after the prompt."""
    rejected_lengths: Ints = field(default_factory=lambda: array("i"))
    swapped_hashes: Ints = field(default_factory=lambda: array("Q"))
    """What the row's hash would be with chosen and rejected swapped (pairs only)."""
    # found by comparison, when all rows are in:
    duplicates: int = 0
    swapped_pairs: int = 0
    distinct_prompts: int = 0
    rows_in_train: int = 0
    prompts_in_train: int = 0

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def stop_coverage(self) -> float:
        """Share of supervised assistant turns that end in a supervised stop token; 1 where there is none at all."""
        return self.stopped_turns / self.supervised_turns if self.supervised_turns else 1.0

    def place(self, index: int) -> str:
        """`file:line` of the index-th kept row."""
        source = self.sources[self.row_sources[index]]
        return row_place(source.path, self.row_numbers[index], source.has_lines)


@dataclass(frozen=True)
class PairStatistics:
    """Lengths of a split's kept pairs, in tokens."""

    pairs: int
    mean_prompt: float
    mean_chosen: float
    mean_rejected: float
    mean_difference: float
    """chosen - rejected."""
    chosen_longer: float
    """Share of pairs."""
    rejected_longer: float
    shared_tokens: int
    """With the prompt laid out once: prompt + chosen + rejected."""
    unshared_tokens: int


@dataclass(frozen=True)
class Plan:
    """What the training would do with the kept rows."""

    rows_per_epoch: int
    steps: int
    epochs: float
    tokens_per_step: float
    microbatches_per_step: float | None
    """On one GPU, mean over the first steps; None where the budget is `auto`."""


@dataclass
class Report:
    kind: Kind
    options: ChatOptions
    splits: list[Split]
    plan: Plan | None
    problems: list[Problem]
    examples: list[Example]
    counts: Counter[Level]
    """All problems by level, also those beyond what `problems` holds."""

    @property
    def exit_code(self) -> int:
        """0 clean; 1 rows or masks in error; 2 a source that could not be read at all."""
        if any(problem.reason == UNREADABLE for problem in self.problems):
            return 2
        return 1 if self.counts["error"] else 0


class _Problems:
    """Problems by level, each level up to MAX_PROBLEMS; the rest is counted."""

    def __init__(self) -> None:
        self.known: dict[Level, list[Problem]] = {level: [] for level in LEVELS}
        self.counts: Counter[Level] = Counter()

    def add(self, split: Split, level: Level, place: str, reason: str, message: str) -> None:
        self.counts[level] += 1
        split.reasons[level, reason] += 1
        split.first_places.setdefault((level, reason), place)
        if len(self.known[level]) < MAX_PROBLEMS:
            self.known[level].append(Problem(level, place, reason, message))


def examine(
    splits: Mapping[str, Sequence[tuple[Source, Iterable[JudgedRow]]]],
    template: Template,
    options: ChatOptions,
    config: SFTConfig,
    examples: int = 0,
) -> Report:
    """Judge the rows of every split (sources and their judged rows, by the names of `data_splits`) as one data set.

    A source whose iterator raises ValueError or OSError is unreadable: an error of its own; the others are judged all
    the same. `examples` is how many of the first training rows to keep for showing.
    """
    problems = _Problems()
    picker = _Picker(examples)
    done: list[Split] = []
    for name, sources in splits.items():
        kind = data_splits(config)[name].kind
        split = Split(name, kind, [SourceCounts(source.path, source.weight) for source, _ in sources])
        reader = _Reader(split, template, options, problems)
        for index, (source, rows) in enumerate(sources):
            try:
                for row in rows:
                    reader.take(row, split.sources[index], index)
                    if not done:
                        picker.look(row)
            except (ValueError, OSError) as error:
                place, message = _placed(str(error), source.path)
                problems.add(split, "error", place, UNREADABLE, message)
        _compare_within(split, problems)
        if done and split.kind == done[0].kind:
            _compare_with_train(split, done[0], problems)
        _check_split(split, problems)
        done.append(split)
    plan = _plan(done[0], config, problems) if done[0].kept else None
    listed = [problem for level in LEVELS for problem in problems.known[level]]
    return Report(done[0].kind, options, done, plan, listed, picker.examples(), problems.counts)


def _placed(message: str, path: str) -> tuple[str, str]:
    """Place and rest of a message about a source, which most often begins with its path, or its path and line."""
    if not message.startswith(path):
        return path, message
    line, _, rest = message.removeprefix(path).partition(": ")
    return path + line, rest


# --- one row ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Counts rows into a split."""

    def __init__(self, split: Split, template: Template, options: ChatOptions, problems: _Problems) -> None:
        self.split, self.template, self.options, self.problems = split, template, options, problems

    def take(self, row: JudgedRow, source: SourceCounts, index: int) -> None:
        source.rows += 1
        source.has_lines = row.has_lines
        if row.parsed is not None:
            self._count_unread(row.parsed.unread, row.place)
        if row.encoded is None:
            self._left_out(row, source)
            return
        encoded = row.encoded
        source.kept += 1
        turns = row.notes.get("turns_trimmed", 0)
        if turns:
            source.trimmed += 1
            message = f"{turns} oldest turn{'s' * (turns > 1)} left out to fit {self.options.max_length:,} tokens"
            self.problems.add(self.split, "trimmed", row.place, "turns_trimmed", message)
        self._add_length(encoded.trimmed_from or encoded.longest)
        for name, count in row.notes.items():
            note = self.split.notes.setdefault(name, NoteCount())
            note.rows += 1
            note.total += count
            note.first = note.first or row.place
            if name in LISTED_NOTES:
                self.problems.add(self.split, "warning", row.place, name, LISTED_NOTES[name])
        if self.options.control_tokens == "allow" and row.notes.get("control_tokens"):
            message = "control tokens in content pass through as control tokens (data.control_tokens: allow)"
            self.problems.add(self.split, "warning", row.place, "control_tokens", message)
        self.split.row_sources.append(index)
        self.split.row_numbers.append(row.row)
        if isinstance(encoded, EncodedConversation):
            self._conversation(encoded, source)
        else:
            self._preference(encoded, source)

    def _count_unread(self, keys: Sequence[str], place: str) -> None:
        for key in keys:
            if key in self.split.unread or len(self.split.unread) < MAX_KEYS:
                self.split.unread[key] += 1
                self.split.unread_places.setdefault(key, place)

    def _left_out(self, row: JudgedRow, source: SourceCounts) -> None:
        if row.status == "dropped":
            source.dropped += 1
        else:
            source.errors += 1
        level: Level = "dropped" if row.status == "dropped" else "error"
        self.problems.add(self.split, level, row.place, row.reason, row.message)
        for name, count in row.notes.items():
            self.split.notes.setdefault(name, NoteCount()).left_out += count
        self._add_length(row.length)

    def _add_length(self, length: int | None) -> None:
        if length is not None:
            self.split.lengths.append(min(length, NO_LIMIT))

    def _conversation(self, encoded: EncodedConversation, source: SourceCounts) -> None:
        split = self.split
        ids = np.asarray(encoded.input_ids, dtype=np.int32)
        supervised = encoded.weights() > 0
        source.tokens += len(ids)
        source.supervised += int(supervised.sum())
        last_turn = self._count_turns(ids, supervised)
        split.row_hashes.append(_hash(ids))
        split.prompt_hashes.append(_hash(ids[:last_turn]))
        split.prompt_lengths.append(last_turn)
        split.chosen_lengths.append(len(ids) - last_turn)

    def _count_turns(self, ids: np.ndarray, supervised: np.ndarray) -> int:
        """Tokens by role and stop-token coverage; returns where the last assistant turn begins.

        An answer is what training takes for one: under `allow` the text of one may hold turns of its own.
        """
        split = self.split
        before = np.concatenate(([0], np.cumsum(supervised))).tolist()
        for role, start, end in self.template.role_spans(ids):
            split.tokens_by_role[role] += end - start
            split.supervised_by_role[role] += before[end] - before[start]
        answers = self.template.assistant_spans(ids)
        for start, end in answers:
            split.supervised_turns += before[end] > before[start]
            split.stopped_turns += bool(supervised[end - 1])
        return answers[-1][0] - len(self.template.header) if answers else 0

    def _preference(self, encoded: EncodedPreference, source: SourceCounts) -> None:
        split = self.split
        prompt, chosen, rejected = (
            np.asarray(ids, dtype=np.int32) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)
        )
        for role, start, end in self.template.role_spans(prompt):
            split.tokens_by_role[role] += end - start
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            split.tokens_by_role[name] += len(answer)
            split.supervised_by_role[name] += len(answer)
            split.supervised_turns += 1
            split.stopped_turns += int(answer[-1]) == self.template.end_id
        source.tokens += len(prompt) + len(chosen) + len(rejected)
        source.supervised += len(chosen) + len(rejected)
        split.row_hashes.append(_hash(prompt, chosen, rejected))
        split.swapped_hashes.append(_hash(prompt, rejected, chosen))
        split.prompt_hashes.append(_hash(prompt))
        split.prompt_lengths.append(len(prompt))
        split.chosen_lengths.append(len(chosen))
        split.rejected_lengths.append(len(rejected))


def _hash(*parts: np.ndarray) -> int:
    """64 bits: among a million rows a false match has a chance of 3e-8."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest(), "little")


# --- all rows ---------------------------------------------------------------------------------------------------------


def _compare_within(split: Split, problems: _Problems) -> None:
    """Exact duplicates, and pairs that another pair contradicts."""
    hashes = _numbers(split.row_hashes)
    for index, first in _repeated(hashes):
        split.duplicates += 1
        problems.add(
            split, "warning", split.place(index), "duplicate", f"the same tokens as {split.place(first)}; keep one"
        )
    swapped = _numbers(split.swapped_hashes)
    for index, other in _matches(swapped, hashes):
        if other < index:
            split.swapped_pairs += 1
            message = f"chosen and rejected of {split.place(other)} swapped: the two contradict each other; keep one"
            problems.add(split, "warning", split.place(index), "contradiction", message)
    split.distinct_prompts = len(np.unique(_numbers(split.prompt_hashes)))


def _compare_with_train(split: Split, train: Split, problems: _Problems) -> None:
    """Held-out rows, or only their prompts, that are trained on as well."""
    same = dict(_matches(_numbers(split.row_hashes), _numbers(train.row_hashes)))
    for index, other in _matches(_numbers(split.prompt_hashes), _numbers(train.prompt_hashes)):
        if index in same:
            split.rows_in_train += 1
            message = f"trained on as well, as {train.place(same[index])}; take it out of one of the two"
            problems.add(split, "warning", split.place(index), "eval_row_in_train", message)
        else:
            split.prompts_in_train += 1
            message = f"its prompt is trained on, in {train.place(other)}, with another answer"
            problems.add(split, "warning", split.place(index), "eval_prompt_in_train", message)


def _repeated(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """`(index, first index)` of every entry that an earlier one equals."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = first[inverse]
    for index in np.flatnonzero(earliest != np.arange(len(hashes))).tolist():
        yield index, int(earliest[index])


def _matches(wanted: np.ndarray, known: np.ndarray) -> Iterator[tuple[int, int]]:
    """`(index in wanted, first index in known)` of equal entries."""
    if not len(known):
        return
    values, first = np.unique(known, return_index=True)
    places = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    for index in np.flatnonzero(values[places] == wanted).tolist():
        yield index, int(first[places[index]])


def _check_split(split: Split, problems: _Problems) -> None:
    if split.stopped_turns < split.supervised_turns:
        missing = split.supervised_turns - split.stopped_turns
        message = (
            f"{missing:,} of {split.supervised_turns:,} supervised assistant turns do not end in a supervised "
            "<|im_end|>, so the model would not learn to stop; look at the chat template"
        )
        problems.add(split, "error", split.name, "no_stop_token", message)
    rendered = split.notes.get("rendered_content", NoteCount())
    if message := rendered_warning(rendered.rows, split.kept):
        problems.add(split, "warning", rendered.first, "rendered_content", message)
    for key, count in split.unread.items():
        if meant := misspelt(key):
            message = f"{key} is not read ({count:,} row{'s' * (count != 1)}); did you mean {meant}?"
            problems.add(split, "warning", split.unread_places[key], "misspelt_key", message)
    if not split.kept and not split.reasons["error", UNREADABLE]:
        dropped = {name: count for (level, name), count in split.reasons.items() if level == "dropped"}
        errors = sum(source.errors for source in split.sources)
        message = nothing_left(split.rows, dropped, errors) if split.rows else "no row in it; give a file with rows"
        problems.add(split, "error", split.name, "no_rows", message)


def pair_statistics(split: Split) -> PairStatistics | None:
    """Lengths of the pairs of a split; None without pairs."""
    if not split.rejected_lengths:
        return None
    prompt, chosen, rejected = (
        _numbers(values).astype(np.int64)
        for values in (split.prompt_lengths, split.chosen_lengths, split.rejected_lengths)
    )
    answers = int((chosen + rejected).sum())
    return PairStatistics(
        pairs=len(prompt),
        mean_prompt=float(prompt.mean()),
        mean_chosen=float(chosen.mean()),
        mean_rejected=float(rejected.mean()),
        mean_difference=float((chosen - rejected).mean()),
        chosen_longer=float((chosen > rejected).mean()),
        rejected_longer=float((chosen < rejected).mean()),
        shared_tokens=int(prompt.sum()) + answers,
        unshared_tokens=2 * int(prompt.sum()) + answers,
    )


def _plan(train: Split, config: SFTConfig, problems: _Problems) -> Plan | None:
    """Steps, tokens and micro-batches that the training would take; an error where a row exceeds the budget."""
    lengths = _numbers(train.prompt_lengths) + _numbers(train.chosen_lengths)
    if isinstance(config, DPOConfig):
        lengths = lengths + _numbers(train.rejected_lengths)
        if not config.reference.share_prompt:
            lengths = lengths + _numbers(train.prompt_lengths)
    budget = config.batch.tokens_per_microbatch
    if budget != "auto" and int(lengths.max()) > budget:
        over = np.flatnonzero(lengths > budget)
        message = (
            f"{int(lengths[over[0]]):,} tokens do not fit batch.tokens_per_microbatch {budget:,} ({len(over):,} such "
            f"rows); raise it to {int(lengths.max()):,} or lower data.max_length"
        )
        problems.add(train, "error", train.place(int(over[0])), "over_budget", message)
        return None
    try:
        stream = Stream(
            config,
            lengths=lengths,
            total_weights=np.ones(len(lengths)),
            collate=lambda rows: empty_batch(),
            tokens_per_microbatch=int(lengths.max()) if budget == "auto" else budget,
            sources=_numbers(train.row_sources),
            source_weights=[source.weight for source in train.sources],
        )
    except ValueError as error:  # weights by which an epoch has no row, or epochs without one
        problems.add(train, "error", train.place(0), "no_rows", str(error))
        return None
    if stream.repeats:
        problems.add(train, "warning", train.place(0), "repeated_rows", stream.repeats)
    steps = stream.total_steps
    planned = min(steps, PLANNED_STEPS, max(1, PLANNED_ROWS // stream.sequences_per_step))
    looked_at = [lengths[stream.rows(step)] for step in range(planned)]
    microbatches = None
    if budget != "auto":
        microbatches = float(np.mean([len(plan_microbatches(step, budget, 1)) for step in looked_at]))
    return Plan(
        rows_per_epoch=stream.rows_per_epoch,
        steps=steps,
        epochs=stream.epochs or stream.passes(steps * stream.sequences_per_step),
        tokens_per_step=float(np.mean([step.sum() for step in looked_at])),
        microbatches_per_step=microbatches,
    )


def _numbers(values: Ints) -> np.ndarray:
    return np.frombuffer(values, dtype=np.dtype(values.typecode)) if len(values) else np.empty(0, values.typecode)


# --- lengths, examples, dumped rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Rows of low < tokens <= high."""

    low: int
    high: int
    count: int


def histogram(lengths: Ints, max_length: int) -> list[Bin]:
    """Bins whose edges grow by 1.5 and 1.33 in turn (or by 2, where that is too many), one of them max_length."""
    values = _numbers(lengths)
    if not len(values):
        return []
    for factors in ((2, 3), (2,)):
        edges = sorted({factor << power for power in range(31) for factor in factors} | {max_length})
        low = int(np.searchsorted(edges, values.min()))
        high = int(np.searchsorted(edges, values.max()))
        if high - low < MAX_BINS:
            break
    edges = [0, *edges]
    counts = np.bincount(np.searchsorted(edges, values), minlength=high + 2)
    return [Bin(edges[index], edges[index + 1], int(counts[index + 1])) for index in range(low, high + 1)]


def percentiles(lengths: Ints) -> dict[str, float]:
    """Mean and the usual percentiles (nearest rank) of the lengths."""
    values = _numbers(lengths)
    if not len(values):
        return {}
    marks = {"min": 0, "p5": 5, "median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    found = {name: float(np.percentile(values, mark, method="inverted_cdf")) for name, mark in marks.items()}
    return {"mean": float(values.mean()), **found}


class _Picker:
    """Rows worth a look: the first ones, the first with each note that these lack, the longest."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.picked: list[Example] = []
        self.noted: list[Example] = []
        self.known_notes: set[str] = {"rows_trimmed"}
        self.longest: tuple[int, Example | None] = (0, None)

    def look(self, row: JudgedRow) -> None:
        if row.encoded is None or not self.first:
            return
        new_notes = sorted(row.notes.keys() - self.known_notes)
        self.known_notes |= row.notes.keys()
        is_longest = row.encoded.longest > self.longest[0]
        if len(self.picked) < self.first:
            self.picked.append(_example(row, ""))
            if is_longest:
                self.longest = (row.encoded.longest, None)
            return
        if new_notes:
            self.noted.append(_example(row, new_notes[0]))
        if is_longest:
            self.longest = (row.encoded.longest, None if new_notes else _example(row, "longest"))

    def examples(self) -> list[Example]:
        longest = [self.longest[1]] if self.longest[1] else []
        return [*self.picked, *self.noted, *longest]


def _example(row: JudgedRow, why: str) -> Example:
    encoded = row.encoded
    if isinstance(encoded, EncodedConversation):
        return Example(row.place, why, [Part("", encoded.input_ids, encoded.spans)])
    assert isinstance(encoded, EncodedPreference)
    answers = [("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)]
    parts = [Part(name, ids, [(0, len(ids), 1.0)]) for name, ids in answers]
    return Example(row.place, why, [Part("prompt", encoded.prompt_ids, []), *parts])


def dump_row(row: JudgedRow) -> dict[str, Any]:
    """Source path, row (0-based) and token ids of a kept row; labels are the ids, IGNORE_INDEX where unsupervised."""
    encoded, place = row.encoded, {"source": row.path, "row": row.row}
    if isinstance(encoded, EncodedConversation):
        labels = np.where(encoded.weights() > 0, encoded.input_ids, IGNORE_INDEX)
        return {**place, "input_ids": encoded.input_ids, "labels": labels.tolist()}
    assert isinstance(encoded, EncodedPreference), "only kept rows are dumped"
    ids = {"prompt_ids": encoded.prompt_ids, "chosen_ids": encoded.chosen_ids, "rejected_ids": encoded.rejected_ids}
    return {**place, **ids}
