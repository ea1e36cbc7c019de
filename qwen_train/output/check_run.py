"""What launch/check.py does beside judging rows: which tokenizer it takes, files that appear whole, rows counted.

What a caller uses:
- `start_of(model)`: the model whose tokenizer the training takes;
- `refuse_overwriting(outputs, sources)`, `written(path, option)`: outputs that are no data, whole or not there;
- `progress()`: rows counted on the terminal while they are judged.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from qwen_train.command_line import print_warnings
from qwen_train.config import ModelConfig
from qwen_train.data.scratch import beside
from qwen_train.data.sources import Source, source_places
from qwen_train.model.adapters import find_base


def start_of(model: ModelConfig) -> ModelConfig:
    """The model whose tokenizer the training takes: the base of `model.adapter`, or `model.path`."""
    if model.adapter is None:
        return model
    if not Path(model.adapter).exists():
        print_warnings([f"model.adapter: {model.adapter} is not there yet; checking with {model.path}"])
        return model
    base = find_base(model.adapter) or model.path
    return model if base == model.path else replace(model, path=base, revision=None)


def refuse_overwriting(outputs: dict[str, str], sources: dict[str, list[Source]]) -> None:
    """ValueError for an output (path by option) that is a file of the data (sources by field), or another output."""
    taken = {
        place: name for name, listed in sources.items() for source in listed for place in source_places(source.path)
    }
    for name, path in outputs.items():
        place = str(Path(path).expanduser().resolve())
        if place in taken:
            raise ValueError(f"{name}: {path} is also {taken[place]}; choose another file")
        taken[place] = name


class CannotWriteError(Exception):
    """An output file cannot be written; no ValueError, which would pass for a source that cannot be read."""


@contextmanager
def written(path: str, option: str) -> Iterator[Callable[[str], object]]:
    """`write` of a text file that appears whole at the end, or not at all (a device is written to directly)."""
    final = Path(path).expanduser()
    direct = final.exists() and not final.is_file()
    temporary = final if direct else beside(final)

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotWriteError(
                f"{option}: {path} cannot be written ({error.strerror}); free space or choose another file"
            ) from None

    def write(text: str) -> None:
        with named():
            file.write(text)

    with named():
        file = open(temporary, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    try:
        yield write
        with named():
            file.close()
            if not direct:
                os.replace(temporary, final)
    finally:
        if not direct:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # after a failed write, what is still buffered fails once more
            file.close()


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Counts rows on stderr where that is a terminal; the value is called with the split's name for every row."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    columns = (TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def count(name: str) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=None)
            bar.advance(tasks[name])

        yield count
