"""A folder of files of rows: whether it is one source, and if not, which option would be.

What a caller uses:
- `check_parquet_folder(path, name, files)`: ValueError with an option that can be pasted, unless all rows in it belong
  together;
- `as_option(name, files)`: the option that names these files;
- `files_within(folder)`: all files that are not hidden.
"""

import math
import os
import re
import shlex
from pathlib import Path

import yaml

LINE_SUFFIXES = (".jsonl", ".ndjson")
SPLIT_FILE = re.compile(r"(?:.*?[_.-])??(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
HUB_FILE = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")
LISTED_FILES = 4
"""Files that a remedy lists one by one; more are named by a pattern of the shell."""


def files_within(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))


def has_suffix(file: Path, *suffixes: str) -> bool:
    return file.suffix.lower() in suffixes


def check_parquet_folder(path: str, name: str, files: list[Path]) -> None:
    """ValueError for a folder without Parquet files, with those of several splits, or with rows that nobody would read.

    `files`: the Parquet files right in it. The hub names them `train-00000-of-00002.parquet`; other files of rows are
    .jsonl ones and all in nested folders.
    """
    within = files_within(Path(path))
    others = [file for file in within if file not in files and has_suffix(file, *LINE_SUFFIXES, ".parquet")]
    if not files:
        raise ValueError(
            f"{name}: the folder {path!r} holds no `datasets` set, and no .parquet file right in it; "
            f"{_files_to_name(name, others or [file for file in within if has_suffix(file, '.json')])}"
        )
    splits = _by_split(files)
    if len(splits) > 1:
        raise ValueError(
            f"{name}: the folder {path!r} holds the splits {', '.join(sorted(splits))}; list the files of one split: "
            f"{as_option(name, splits[min(splits, key=lambda split: _order(split, name))])}"
        )
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise ValueError(
            f"{name}: of the folder {path!r} only the .parquet files right in it are read, not {others[0]}{more}; list "
            f"the files to read: {as_option(name, files)}"
        )


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Files whose names say a split, by it."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        if known := SPLIT_FILE.match(file.stem):
            split = named["split"] if (named := HUB_FILE.fullmatch(file.stem)) else known[1].lower()
            splits.setdefault(split, []).append(file)
    return splits


def _order(split: str, name: str) -> tuple[bool, str]:
    """Of several splits a field most likely means the first by this."""
    return split.startswith("train") != (name == "data.train"), split


def _files_to_name(name: str, files: list[Path]) -> str:
    """The remedy for a folder that is no source, from the files of rows found in it: those of one folder and split."""
    if not files:
        return "name a file of rows"
    folder = min((file.parent for file in files), key=lambda folder: (_order(folder.name, name), folder))
    together = [file for file in files if file.parent == folder]
    if splits := _by_split(together):
        together = splits[min(splits, key=lambda split: _order(split, name))]
    found = f"{len(files):,} files of rows" if len(files) > 1 else "a file of rows"
    return f"{found} found in it: list those to read, as {as_option(name, together)}"


def as_option(name: str, files: list[Path]) -> str:
    """The option with these files, as a shell takes it; many by their pattern, where it fits no others."""
    if len(files) == 1:
        return f"--{name} {shlex.quote(str(files[0]))}"
    if len(files) > LISTED_FILES and (pattern := _pattern(files)):
        quoted = """'"%s",'"""
        return f'--{name} "[$(printf {quoted} {pattern})]"'
    listed = yaml.safe_dump([*map(str, files)], default_flow_style=True, width=math.inf, allow_unicode=True)
    return f"--{name} {shlex.quote(listed.strip())}"


def _pattern(files: list[Path]) -> str | None:
    """A shell's pattern that fits these files of a folder and no others; None where names have no such thing."""
    folder, end = files[0].parent, files[0].suffix
    start = os.path.commonprefix([file.stem for file in files])  # noqa: RUF071
    seen = [file for file in folder.iterdir() if file.name[0] != "."]
    fitting = [file for file in seen if file.name.startswith(start) and file.name.endswith(end)]
    quotable = not set('"\\') & set("".join(map(str, files)))
    return f"{shlex.quote(f'{folder}/{start}')}*{end}" if quotable and sorted(fitting) == sorted(files) else None
