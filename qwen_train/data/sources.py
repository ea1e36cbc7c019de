"""Where rows come from: JSON, JSONL, Parquet, `datasets` folders and hub sets; and the token tables made of them.

What a caller uses:
- `data_splits(config)`: all rows that a training reads; `find_sources(config)`: their sources, each looked for;
- `sources_of(...)`, `resolve_paths(...)`: one value of the config as `[Source(path, weight), ...]`;
- `read_rows(source_index, path)`: `RawRow`s: the JSON text of one row and its place (`file:line`);
- `source_files(path)`: the files that a source is read from; `content_hash(path)` names what they hold;
- `build_table`, `save_table`, `load_table`: token tables, for `data/tokenize.py`.

JSON and JSONL are read with `json` alone, so tool schemas and arguments that differ between rows (and the user's own
nulls in them) pass unharmed; Arrow gives every struct of a column the same keys and fills the absent ones with null,
which is undone here for Parquet, `datasets` folders and hub sets. Nothing else touches the `datasets` package.
"""

import codecs
import glob
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qwen_train.config import DataPaths, DPOConfig, Kind, SFTConfig
from qwen_train.data.digest import file_sha256
from qwen_train.data.folders import LINE_SUFFIXES, as_option, check_parquet_folder, files_within, has_suffix
from qwen_train.data.formats import check_format, is_json, one_line

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BINARY = {
    b"\x1f\x8b": "this is a gzip file; unpack it",
    b"\x28\xb5\x2f\xfd": "this is a zstd file; unpack it",
    b"\xfd7zXZ": "this is an xz file; unpack it",
    b"BZh": "this is a bzip2 file; unpack it",
    b"PK\x03\x04": "this is a zip archive or a spreadsheet; unpack it, or save its rows as .jsonl",
    b"PAR1": "this is a Parquet file; name it .parquet",
}
"""First bytes of what is renamed by mistake, and what to do."""
SPLIT = re.compile(r"[\w.-]+")
NOT_BLANK = re.compile(r"[^ \t\n\r]")  # for JSON
MANY_ROWS = 10_000
"""Rows that are announced where no progress bar shows that they take some seconds."""
PARQUET_ROWS = 1000
"""Rows of a Parquet file in memory at a time; datasets' own number is that of its first group, none in an empty one."""


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class RawRow:
    """One row as JSON text, or the reason why it could not even be read; `row` counts from 0 (JSONL: line - 1)."""

    source: int
    path: str
    row: int
    text: str
    has_lines: bool
    error: tuple[str, str] | None = None


def row_place(path: str, row: int, has_lines: bool) -> str:
    """`file:line` for files of lines (1-based), `file: row n` (0-based, as in dumps) for all others."""
    return f"{path}:{row + 1}" if has_lines else f"{path}: row {row}"


def resolve_paths(paths: DataPaths | dict[str, float] | None, name: str = "data.train") -> list[Source]:
    """The config's value as a list of sources: a path, or a list of paths and `path: weight` entries.

    A weight of 0 leaves the path out. Held-out rows (every `name` but data.train) are scored once each: there no other
    weight than 0 and 1 means anything. Raises ValueError.
    """
    mixes = name == "data.train"
    if paths is None or paths == "" or paths == []:
        raise ValueError(f"{name}: no path given; give a file, a folder or a hub id")
    entries = paths if isinstance(paths, list) else [paths]
    sources: list[Source] = []
    for entry in entries:
        pairs = entry.items() if isinstance(entry, dict) else [(entry, 1.0)]
        for path, weight in pairs:
            if not isinstance(path, str) or not path.strip():
                raise ValueError(
                    f"{name}: a path must be a non-empty string, got {path!r}; give a file, folder or hub id"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(
                    f"{name}: the weight of {path!r} must be a number >= 0, got {weight!r}; 1 is one pass an epoch, "
                    "0 leaves the path out"
                )
            if not mixes and weight not in (0, 1):
                raise ValueError(
                    f"{name}: the weight of {path!r} must be 0 or 1, got {weight}, since held-out rows are scored once "
                    "each; give the path alone, or 0 to leave it out"
                )
            sources.append(Source(path, float(weight)))
    seen = [source.path for source in sources]
    for path in seen:
        if seen.count(path) > 1:
            remedy = "list it once, with a weight" if mixes else "list it once"
            raise ValueError(f"{name}: {path!r} is listed {seen.count(path)} times; {remedy}")
    if not any(source.weight for source in sources):
        raise ValueError(f"{name}: every path has the weight 0; give one of them another")
    return [source for source in sources if source.weight]


@dataclass(frozen=True)
class DataSplit:
    """Rows that a training reads: where they are, what they are, how they are written."""

    paths: DataPaths
    kind: Kind
    format: str


def data_splits(config: SFTConfig) -> dict[str, DataSplit]:
    """All rows that a training of this config reads, by the name of the field; those it trains on come first."""
    data = config.data
    kind: Kind = "dpo" if isinstance(config, DPOConfig) else "sft"
    splits = {"data.train": DataSplit(data.train, kind, data.format)}
    if data.eval:
        splits["data.eval"] = DataSplit(data.eval, kind, data.format)
        if kind == "dpo" and data.eval_sft:
            splits["data.eval_sft"] = DataSplit(data.eval_sft, "sft", "auto")
    return splits


def find_sources(config: SFTConfig) -> dict[str, list[Source]]:
    """Sources of all rows that a training reads, by field name. Asks no network; ValueError for one that is not there,
    or for a format that rows of its kind do not have."""
    return {
        name: sources_of(split.paths, split.kind, split.format, name) for name, split in data_splits(config).items()
    }


def sources_of(paths: DataPaths, kind: Kind, format: str, name: str) -> list[Source]:
    """`find_sources` of one field's value."""
    check_format(format, kind)
    sources = resolve_paths(paths, name)
    known: dict[str, str] = {}
    for source in sources:
        source_kind(source.path, name)
        for place in source_places(source.path):
            if place in known:
                remedy = "list it once, with a weight" if name == "data.train" else "list it once"
                raise ValueError(f"{name}: {known[place]!r} and {source.path!r} are both {place}; {remedy}")
            known[place] = source.path
    return sources


def source_kind(path: str, name: str = "data") -> Literal["lines", "json", "parquet", "folder", "hub"]:
    """How a path will be read; ValueError when it is neither a readable file or folder nor a hub id."""
    if _set_folder(path, name) is not None:
        return "folder"
    file = Path(path)
    if file.is_dir():
        check_parquet_folder(path, name, source_files(path))
        return "parquet"
    if file.exists():
        suffix = file.suffix.lower()
        if suffix in LINE_SUFFIXES:
            return "lines"
        if suffix == ".json":
            return "json"
        if suffix == ".parquet":
            return "parquet"
        raise ValueError(
            f"{name}: {path!r} has the unknown suffix {suffix!r}; unpack or save it as .jsonl, .json or .parquet"
        )
    looks_like_file = Path(path).suffix.lower() in (*LINE_SUFFIXES, ".json", ".parquet")
    found = [sorted(map(Path, glob.glob(part.strip()))) for part in path.split(",")]  # as other tools take it
    if all(found):
        files = [file for part in found for file in part]
        raise ValueError(f"{name}: {path!r} is no single path; list the files: {as_option(name, files)}")
    hub_id, colon, split = path.partition(":")
    if looks_like_file or not is_hub_id(hub_id) or (colon and not SPLIT.fullmatch(split)):
        raise ValueError(f"{name}: {path!r} does not exist; give a file, a folder or a hub id (name[:split])")
    return "hub"


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub: `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _set_folder(path: str, name: str) -> Path | None:
    """The folder of the one `datasets` set that a path means: itself, or one split of it as folder:split.

    None for all other paths; ValueError for a split that is not there, and where several are and none is named.
    """
    folder, split = Path(path), ""
    if not folder.exists():
        before, _, split = path.rpartition(":")
        folder = Path(before)
        if not (before and split):
            return None
    if (listing := folder / "dataset_dict.json").exists():
        try:
            splits: list[str] = [*json.loads(listing.read_text())["splits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}: {path!r}: not a readable `datasets` folder: {one_line(error)}") from error
        if not splits:
            raise ValueError(f"{name}: {path!r} holds no split; give a folder with rows")
        if not split and len(splits) > 1:
            examples = " or ".join(f"{path}:{known}" for known in splits[:2])
            raise ValueError(f"{name}: {path!r} holds the splits {', '.join(splits)}; name one of them: {examples}")
        if split and split not in splits:
            raise ValueError(f"{name}: {path!r}: the splits there are {', '.join(splits)}; name one of them")
        return folder / (split or splits[0])
    if (folder / "state.json").exists():
        if split:
            raise ValueError(f"{name}: {path!r}: the folder holds one set without splits; leave out :{split}")
        return folder
    return None


def source_files(path: str) -> list[Path]:
    """The files that a source is read from, in order; none of a hub set. Hidden ones (.DS_Store) are no part of it."""
    if (folder := _set_folder(path, "data")) is not None:
        return files_within(folder)
    file = Path(path)
    if file.is_dir():
        return [found for found in files_within(file) if found.parent == file and has_suffix(found, ".parquet")]
    return [file] if file.exists() else []


def source_places(path: str) -> set[str]:
    """What a source is read from, so that two can be compared: its files wherever links lead, or hub id and split."""
    files = {str(file.resolve()) for file in source_files(path)}
    return files or {path if ":" in path else f"{path}:train"}


def content_hash(path: str) -> str:
    """sha256 of what a source holds: the bytes of its files; for a hub set the fingerprint that `datasets` gives it."""
    if source_kind(path) == "hub":
        return str(_load_set(path)._fingerprint)
    digest = hashlib.sha256()
    root = _set_folder(path, "data") or Path(path)
    for file in source_files(path):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def read_rows(source: int, path: str) -> Iterator[RawRow]:
    """Every row of a source in order; a row that is not a JSON object arrives with its `error` set and is not lost."""
    kind = source_kind(path)
    if kind == "lines":
        yield from _read_lines(source, path)
    elif kind == "json":
        yield from _read_json(source, path)
    else:
        for index, row in enumerate(_read_parquet(path) if kind == "parquet" else _load_set(path)):
            text = json.dumps(_without_nulls(row), default=_plain)
            yield RawRow(source, path, index, text, has_lines=False)


def _refuse_binary(path: str, head: bytes) -> None:
    """One error for a file that is no text by its first bytes, and for text of another encoding.

    That is told by its byte order mark, or by the NULs between its ASCII characters.
    """
    for magic, remedy in BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: {remedy}")
    encoding = json.detect_encoding(head[:4])
    if encoding.startswith(("utf-16", "utf-32")) and (head[:2] in UTF16_MARKS or 3 * head.count(0) > len(head)):
        raise ValueError(f"{path}: the file is {encoding[:6].upper()}, not UTF-8; save it as UTF-8")


def _read_lines(source: int, path: str) -> Iterator[RawRow]:
    with open(Path(path), "rb") as stream:
        _refuse_binary(path, stream.read(64))
        stream.seek(0)
        _refuse_list(path, stream)
        stream.seek(0)
        _refuse_carriage_returns(path, stream.readline())
        stream.seek(0)
        for index, line in enumerate(stream):
            if not (line := line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line).strip():
                continue
            try:
                yield RawRow(source, path, index, line.decode(), has_lines=True)
            except UnicodeDecodeError as error:
                problem = ("bad_encoding", f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8")
                yield RawRow(source, path, index, "", has_lines=True, error=problem)


def _refuse_list(path: str, lines: Iterable[bytes]) -> None:
    """One error for a JSON list under the suffix of lines: the list in one line, or a bracket that a later one closes.

    Lines that are each a list are rows in error, each with its number.
    """
    filled = (line for line in (raw.removeprefix(codecs.BOM_UTF8).strip() for raw in lines) if line)
    first = next(filled, b"")
    alone = first.startswith(b"[") and next(filled, None) is None
    opens = re.match(rb"\[\s*(\{|$)", first) is not None and not is_json(first.decode(errors="replace"))
    if alone and re.match(rb'\[\s*\{\s*"(role|from)"', first) and is_json(first.decode(errors="replace")):
        raise ValueError(
            f'{path}: this is one list of messages; write each conversation as {{"messages": [...]}} in a line'
        )
    if alone or opens:
        raise ValueError(f"{path}: this is a JSON list, not one object a line; name the file .json")


def _refuse_carriage_returns(path: str, line: bytes) -> None:
    """One error for rows that are apart by carriage returns alone; between the tokens of one row they are blanks."""
    parts = [part for part in line.decode("utf-8-sig", errors="replace").split("\r") if part.strip()]
    if len(parts) > 1 and is_json(parts[0]):
        raise ValueError(f"{path}: its lines end in carriage returns alone, as on an old Mac; save it with line feeds")


def _read_json(source: int, path: str) -> Iterator[RawRow]:
    """A JSON list of objects; a file of one object a line is read as lines, a single object as one row."""
    data = Path(path).read_bytes()
    _refuse_binary(path, data[:64])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not text.lstrip().startswith("["):
        first_line = text.lstrip().split("\n", 1)[0]
        if is_json(first_line) or not is_json(text):
            yield from _read_lines(source, path)
        else:
            yield RawRow(source, path, 0, text, has_lines=False)
        return
    try:
        items = list(_list_items(text))
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise ValueError(f"{place}: malformed JSON: {error}; repair it, or save one object a line as .jsonl") from None
    for index, (start, end) in enumerate(items):
        yield RawRow(source, path, index, text[start:end], has_lines=False)


def _list_items(text: str) -> Iterator[tuple[int, int]]:
    """Where each item of a JSON list begins and ends; whether it makes a row is not asked here.

    Raises JSONDecodeError or RecursionError.
    """

    decoder, place = json.JSONDecoder(), _after_blanks(text, text.index("[") + 1)
    while not text.startswith("]", place):
        _, end = decoder.raw_decode(text, place)
        yield place, end
        place = _after_blanks(text, end)
        if not text.startswith(",", place):
            break
        place = _after_blanks(text, place + 1)
        if text.startswith("]", place):
            raise json.JSONDecodeError("Expecting value", text, place)
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if (rest := _after_blanks(text, place + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _after_blanks(text: str, place: int) -> int:
    found = NOT_BLANK.search(text, place)
    return found.start() if found else len(text)


def _read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """Rows straight from the files: a copy that `datasets` keeps of them goes by path and time of change alone."""
    import datasets

    files = source_files(path)
    try:
        # its paths are patterns: a[1].parquet would be a1.parquet
        paths: Any = [glob.escape(str(file)) for file in files]
        rows = datasets.IterableDataset.from_parquet(paths, batch_size=PARQUET_ROWS)
        for batch in rows.iter(PARQUET_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    except Exception as error:  # pyarrow and datasets raise a dozen types for an unreadable file
        if isinstance(error, datasets.table.CastError) and len(files) > 1:  # its own text is two schemas
            odd = sorted({*error.table_column_names} ^ {*error.requested_column_names})
            raise ValueError(
                f"{path}: its Parquet files differ in the columns {', '.join(odd)}; give them the same ones, or "
                "list the files"
            ) from error
        raise ValueError(f"{path}: not a readable Parquet file: {one_line(error)}") from error


def _load_set(path: str) -> Any:
    """A `datasets.Dataset` from a save_to_disk folder or a hub id with an optional :split."""
    import datasets

    if folder := _set_folder(path, "data"):
        try:
            return datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{path}: not a readable `datasets` folder: {one_line(error)}") from error
    name, _, split = path.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        reason = one_line(error)
        raise ValueError(f"{path}: no such file, and no data set of the hub: {reason}; check the name") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if not _is_null(item)}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _is_null(value: Any) -> bool:
    """None, or the NaN that pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """What JSON lacks: dates as text; bytes as no text, since that would be trained as b'...'."""
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


# --- token tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableColumn:
    """A column of a token table: its number type and whether a row holds a list of them."""

    dtype: str
    is_list: bool = False


def _features(columns: dict[str, TableColumn]) -> Any:
    import datasets

    return datasets.Features(
        {
            name: datasets.List(datasets.Value(column.dtype)) if column.is_list else datasets.Value(column.dtype)
            for name, column in columns.items()
        }
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    import datasets

    hide = not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


@contextmanager
def _one_tokenizer_thread_a_process(processes: int) -> Iterator[None]:
    """Forked workers must not use the tokenizer's thread pool: it does not survive the fork, and warns."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if processes > 1:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def build_table(
    rows: Callable[[], Iterator[dict[str, Any]]],
    row_columns: dict[str, TableColumn],
    judge: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    out_columns: dict[str, TableColumn],
    *,
    workers: int,
    rows_per_worker: int,
    batch_size: int,
    folder: Path,
) -> Any:
    """Rows through `judge` (batches in, batches out) in up to `workers` processes: a `datasets.Dataset` in `folder`."""
    import datasets

    with _without_bars():  # those of reading and saving speak of splits and shards that nobody asked for
        try:
            raw = datasets.Dataset.from_generator(
                rows, features=_features(row_columns), cache_dir=str(folder / "raw"), fingerprint="raw"
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None  # what `rows` itself raised
    processes = min(workers, len(raw) // rows_per_worker)
    bars = nullcontext() if sys.stderr.isatty() else _without_bars()
    if len(raw) >= MANY_ROWS and not sys.stderr.isatty():
        print(f"tokenising {len(raw):,} rows", file=sys.stderr, flush=True)
    with bars, _one_tokenizer_thread_a_process(processes):
        return raw.map(
            judge,
            batched=True,
            batch_size=batch_size,
            num_proc=processes if processes > 1 else None,
            remove_columns=list(row_columns),
            features=_features(out_columns),
            load_from_cache_file=False,
            cache_file_name=str(folder / "judged.arrow"),
            new_fingerprint="judged",
            desc="tokenize",
        )


def save_table(table: Any, keep: list[int], columns: list[str], folder: Path) -> None:
    """Write the kept rows and columns of a table as a `datasets` folder."""
    with _without_bars():
        table.select_columns(columns).select(keep).save_to_disk(str(folder))


def load_table(folder: Path) -> Any:
    """A folder of `save_table`, memory-mapped."""
    import datasets

    return datasets.load_from_disk(str(folder))
