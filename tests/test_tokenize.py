"""Files become cached token arrays that hold what the template gave, row by row, and nothing else."""

import json
import multiprocessing
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from qwen_train.data import tokenize
from qwen_train.data.chat import ChatOptions, EncodedConversation, EncodedPreference, Template
from qwen_train.data.formats import parse_row
from qwen_train.data.tokenize import (
    DPO_COLUMNS,
    SFT_COLUMNS,
    TokenDataset,
)
from tests.support import SHARED, encode_one, mini_tokenizer, needs_shared, real_tokenizer

OPTIONS = ChatOptions(max_length=2048)


def chat_row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def tool_row(tools: Any, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = {"role": "user", "content": "Go"}
    return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": tools}


DIFFERING = [
    tool_row([{"type": "function", "function": {"name": "f", "parameters": {}}}], {}),
    tool_row(
        [{"type": "function", "function": {"name": "g", "enum": [1, "a", None]}}], {"x": None, "y": [None, {}, []]}
    ),
    tool_row('[{"name": "h", "default": {"deep": {"deeper": null}}}]', '{"x": "text", "z": 1.5e-7}'),
    tool_row(None, {"x": {"nested": True}, "y": 3, "ключ": "значение"}),
    tool_row([{"name": "k", "parameters": {"x": 10**30}}], {"x": [1, "a", {"b": None}]}),
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(paths: Any, cache: Path, options: ChatOptions = OPTIONS, **more: Any) -> TokenDataset:
    return tokenize.tokenize("sft", paths, mini_tokenizer(), options, cache_dir=cache, **{"workers": 1, **more})


@pytest.mark.parametrize("workers", [1, 2])
def test_differing_tool_schemas_go_through_unharmed(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "ROWS_PER_WORKER", 1)  # two processes for five rows
    monkeypatch.setattr(tokenize, "BATCH_ROWS", 2)
    path = write(tmp_path / "a.jsonl", DIFFERING)
    data = run(path, tmp_path / "cache", workers=workers)
    assert len(data) == len(DIFFERING) and data.report.kept == 5
    for index, row in enumerate(DIFFERING):
        stored = data.dataset[index]
        calls = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
        call = {"function": {"name": "f", "arguments": json.loads(calls) if isinstance(calls, str) else calls}}
        messages = [row["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        tools = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        assert stored["input_ids"] == mini_tokenizer().apply_chat_template(messages, tools=tools)["input_ids"]
        assert stored["row"] == index and stored["source"] == 0 and data.place(index) == f"{path}:{index + 1}"
    arrow = datasets.Dataset.from_list([DIFFERING[index]["messages"][1] for index in (0, 3)])
    assert arrow[0] != DIFFERING[0]["messages"][1]  # the negative control: Arrow's own columns change the rows


def test_columns_hold_the_whole_mask(tmp_path: Path) -> None:
    halved = chat_row("Hi", "Red.")["messages"]
    rows = [
        chat_row("Hi", "Red."),
        {"messages": [*chat_row("Hi", "Blue.")["messages"], halved[0], {**halved[1], "weight": 0.5}]},
        chat_row("Long", "green " * 600),
    ]
    data = run(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", replace(OPTIONS, max_length=300))
    assert data.dataset.column_names == list(SFT_COLUMNS)
    types = {name: str(feature) for name, feature in data.dataset.features.items()}
    assert "int32" in types["input_ids"] and "float32" in types["span_weights"] and "int64" in types["row"]
    assert data.report.dropped == {"too_long": 1} and data.report.rows == 3 and data.report.kept == 2
    template = Template(mini_tokenizer())
    for stored, row in zip(data.dataset, rows, strict=False):
        expected = encode_one(template, parse_row(json.dumps(row), "sft"), OPTIONS)  # type: ignore[arg-type]
        spans = list(zip(stored["span_starts"], stored["span_ends"], stored["span_weights"], strict=True))
        assert stored["input_ids"] == expected.input_ids and spans == expected.spans
        assert stored["length"] == len(expected.input_ids) and stored["total_weight"] == expected.total_weight
    assert data.column("length").tolist() == [len(ids) for ids in data.dataset["input_ids"]]
    assert data.report.tokens == data.column("length").sum()
    assert data.report.supervised_tokens == sum(sum(row["span_ends"]) - sum(row["span_starts"]) for row in data.dataset)
    assert data.report.notes == {"default_system": 2}


def test_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Red.", "rejected": "Green."},
        {"prompt": "Hi", "chosen": "Red.", "rejected": "\nRed."},
        {"prompt": "Hi", "chosen": "Red.", "rejected": "Red. "},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = tokenize.tokenize("dpo", path, mini_tokenizer(), OPTIONS, cache_dir=tmp_path / "cache", workers=1)
    assert data.dataset.column_names == list(DPO_COLUMNS)
    assert data.report.dropped == {"identical_answers": 1} and data.column("row").tolist() == [0, 2]
    assert data.report.notes["whitespace_only_difference"] == 1
    for stored in data.dataset:
        parts = [stored[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert stored["length"] == sum(map(len, parts)) and parts[1][-1] == parts[2][-1] == 151645
    assert data.report.supervised_tokens == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in data.dataset)


def test_sources_keep_their_order_and_weights(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [chat_row("1", "Red."), chat_row("2", "Red.")])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"instruction": "3", "output": "Red."}]))
    data = run([first, {str(second): 0.5}], tmp_path / "cache")
    assert data.column("source").tolist() == [0, 0, 1] and data.column("row").tolist() == [0, 1, 0]
    assert [source.weight for source in data.sources] == [1.0, 0.5]
    assert data.place(2) == f"{second}: row 0"
    other = run([first, {str(second): 2.0}], tmp_path / "cache")
    assert other.folder == data.folder and other.sources[1].weight == 2.0


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    rows = ["{", *[json.dumps(chat_row("Hi", ""))] * 12, json.dumps(chat_row("Hi", "Red.")), '{"text": 1}']
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(rows).encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(ValueError) as caught:
        run(str(path), tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"{path}: 15 of 16 rows cannot be used (empty_answer: 12, bad_json: 1, unknown_format: 1, bad_encoding: 1); "
        "repair or remove them:"
    )
    assert len(lines) == 1 + 10 + 1 and lines[-1] == "  ... and 5 more"
    assert lines[1].startswith(f"  {path}:1: malformed JSON") and lines[2].startswith(f"  {path}:2: messages[1]")
    assert not list((tmp_path / "cache" / "tokens").iterdir())  # nothing half-written


def test_errors_that_end_the_run(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", [chat_row("Hi", "Red.")])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text("[{},")

    def refused(
        paths: str, problem: str, cache: Path = tmp_path / "cache", format: str = "auto", **options: Any
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(problem)):
            run(paths, cache, replace(OPTIONS, **options), format=format)

    refused(str(tmp_path / "no.jsonl"), "data.train: ")
    refused(str(tmp_path / "empty.jsonl"), "no row in it; give a file with rows")
    refused(str(tmp_path / "broken.json"), "broken.json:1: malformed JSON")
    refused(good, "none of 1 rows is left (too_long: 1); raise data.max_length or give other data", max_length=4)
    refused(good, "tokens, max_length is 4", max_length=4, too_long="error")
    refused(good, "data.format: 'jsonl'", format="jsonl")
    refused(good, "the token cache cannot be written", cache=tmp_path / "a.jsonl")


# --- the cache --------------------------------------------------------------------------------------------------------


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    builds: list[int] = []
    build = tokenize.build_table
    monkeypatch.setattr(tokenize, "build_table", lambda *args, **more: builds.append(1) or build(*args, **more))
    return builds


def test_the_cache_is_used_when_nothing_changed_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    path, cache = write(tmp_path / "a.jsonl", [chat_row("Hi", "Red.")]), tmp_path / "cache"
    first = run(path, cache)
    again = run(path, cache, workers=2)
    assert len(builds) == 1 and again.folder == first.folder and again.report == first.report
    assert again.dataset[0] == first.dataset[0]
    run(path, cache, replace(OPTIONS, system="Be kind."))
    assert len(builds) == 2
    write(tmp_path / "a.jsonl", [chat_row("Hi", "Blue.")])
    assert run(path, cache).dataset[0] != first.dataset[0]
    assert len(builds) == 3
    tokenize.tokenize("sft", path, mini_tokenizer("qwen3"), OPTIONS, cache_dir=cache, workers=1)
    assert len(builds) == 4
    assert len(list((cache / "tokens").iterdir())) == 4  # four whole folders and no rest of the work


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "report", "manifest", "empty"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path: Path, damage: str, caplog: Any) -> None:
    path, cache = write(tmp_path / "a.jsonl", [chat_row("Hi", "Red.")] * 20), tmp_path / "cache"
    good = run(path, cache)
    rows, folder = [dict(row) for row in good.dataset], good.folder
    (arrow,) = folder.glob("*.arrow")
    if damage == "flip":
        flip_a_byte(arrow)
    elif damage == "truncate":
        arrow.write_bytes(arrow.read_bytes()[:-100])
    elif damage == "remove":
        arrow.unlink()
    elif damage in ("report", "manifest"):
        (folder / f"{damage}.json").write_text("{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    caplog.clear()
    rebuilt = run(path, cache)
    assert [dict(row) for row in rebuilt.dataset] == rows
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "qwen_train.data.tokenize"]
    assert str(folder) in warning and "damaged" in warning
    caplog.clear()
    run(path, cache)
    assert not [record for record in caplog.records if record.name == "qwen_train.data.tokenize"]
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [folder.name]


def race(path: str, cache: str, results: Any) -> None:
    data = run(path, Path(cache))
    results.put((data.folder.name, data.dataset["input_ids"][0][:3], len(data)))


def test_two_processes_race_to_one_folder(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl", [chat_row("Hi", "Red.")] * 500), tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=race, args=(path, str(cache), results)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert got[0] == got[1] and got[0][2] == 500
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [got[0][0]]


def test_whoever_finishes_second_keeps_the_firsts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl", [chat_row("Hi", "Red.")]), tmp_path / "cache"
    build, seen = tokenize.build_table, []

    def overtaken(*args: Any, **more: Any) -> Any:
        monkeypatch.setattr(tokenize, "build_table", build)
        seen.append(run(path, cache).folder.stat().st_ino)
        return build(*args, **more)

    monkeypatch.setattr(tokenize, "build_table", overtaken)
    data = run(path, cache)
    assert len(data) == 1 and data.folder.stat().st_ino == seen[0]
    assert len(list((cache / "tokens").iterdir())) == 1


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_content_is_the_rows_and_not_their_file(tmp_path: Path) -> None:
    answers_by_file = {"a": ("Yes.", "No."), "b": ("Yes.", "No."), "c": ("Yes.", "Red."), "d": ("No.", "Yes.")}
    contents = []
    for name, answers in answers_by_file.items():
        path = write(tmp_path / f"{name}.jsonl", [chat_row("Sure?", answer) for answer in answers])
        contents.append(run(path, tmp_path / "cache").report.content)
    assert contents[0] == contents[1] and len({*contents}) == 3


def test_the_content_is_not_what_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens by another version of a package, from two files with empty lines, cut up by more workers."""
    rows = [chat_row("Sure?", answer) for answer in ("Yes.", "No.", "Red.") * 700]
    first = run(write(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    again = run(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert first.report.content == again.report.content and len(first.report.content) == 64

    version = tokenize.importlib.metadata.version
    monkeypatch.setattr(tokenize.importlib.metadata, "version", lambda package: version(package) + ".post1")
    paths = [write(tmp_path / "b.jsonl", rows[:900]), write(tmp_path / "c.jsonl", rows[900:])]
    (tmp_path / "c.jsonl").write_text("\n" + (tmp_path / "c.jsonl").read_text())
    other = run(paths, tmp_path / "cache", workers=2)
    assert other.folder != first.folder and other.report.content == first.report.content

    def content(ids: list[list[int]], weights: tuple[float, ...] = (1.0, 1.0)) -> str:
        spans = {name: [[0], [0]] for name in ("span_starts", "span_ends")}
        numbers = {"span_weights": [[weight] for weight in weights], "length": [2, 2], "total_weight": [1.0, 1.0]}
        columns = {"input_ids": ids} | spans | numbers | {"source": [0, 0], "row": [0, 1]}
        return tokenize._content("sft", datasets.Dataset.from_dict(columns))

    sent = [content([[1, 2], [3]]), content([[1], [2, 3]]), content([[1, 2], [3]], (1.0, 0.5)), content([[3], [1, 2]])]
    assert len({*sent}) == 4 and content([[1, 2], [3]]) == sent[0]


def test_judged_rows_hold_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [chat_row("Hi", "Red."), chat_row("Hi", ""), chat_row("Hi", "Red. " * 300)]
    path.write_text("\n".join(["{", *map(json.dumps, rows), json.dumps(rows[0])]))
    judged = list(tokenize.judge("sft", str(path), mini_tokenizer(), replace(OPTIONS, max_length=100)))
    assert [(row.status, row.reason) for row in judged] == [
        ("error", "bad_json"),
        ("kept", ""),
        ("error", "empty_answer"),
        ("dropped", "too_long"),
        ("kept", ""),
    ]
    assert [row.place for row in judged] == [f"{path}:{line}" for line in range(1, 6)]
    assert [row.parsed is not None for row in judged] == [False, True, False, True, True]
    assert isinstance(judged[1].encoded, EncodedConversation) and judged[3].encoded is None
    pair = write(tmp_path / "b.jsonl", [{"prompt": "Hi", "chosen": "Red.", "rejected": "Green."}])
    (verdict,) = tokenize.judge("dpo", pair, mini_tokenizer(), OPTIONS)
    assert isinstance(verdict.encoded, EncodedPreference)


@needs_shared
def test_the_cache_holds_what_the_template_gives_for_the_demo_files(tmp_path: Path) -> None:
    paths = [str(SHARED / "data" / f"{name}_demo.json") for name in ("alpaca_en", "glaive_toolcall_en")]
    data = tokenize.tokenize("sft", paths, real_tokenizer(), OPTIONS, cache_dir=tmp_path, workers=2)
    judged = list(tokenize.judge("sft", paths, real_tokenizer(), OPTIONS))
    kept = [row for row in judged if isinstance(row.encoded, EncodedConversation)]
    assert len(judged) == 1299 == data.report.rows and len(kept) == len(data)
    assert [(row.source, row.row) for row in kept] == list(zip(data.column("source"), data.column("row"), strict=True))
    for stored, row in zip(data.dataset.with_format("numpy"), kept, strict=True):
        assert isinstance(row.encoded, EncodedConversation)
        assert np.array_equal(stored["input_ids"], row.encoded.input_ids)
        spans = zip(
            stored["span_starts"].tolist(), stored["span_ends"].tolist(), stored["span_weights"].tolist(), strict=True
        )
        assert list(spans) == row.encoded.spans
