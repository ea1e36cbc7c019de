"""Rows come from files, folders and the hub as they were written, each with its place."""

import bz2
import gzip
import json
import lzma
import math
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qwen_train.command_line import load_config
from qwen_train.config import DataConfig, DPOConfig, SFTConfig
from qwen_train.data import sources
from qwen_train.data.formats import Conversation, RowError, parse_row
from qwen_train.data.sources import (
    Source,
    content_hash,
    find_sources,
    read_rows,
    resolve_paths,
    row_place,
    source_files,
    sources_of,
)
from qwen_train.train.splits import _trained_on

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello."}


def test_sources_are_looked_for_without_asking_anybody(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("{}\n")
    data = DataConfig(
        train=str(there), eval=[{"user/set:test": 1.0, "user/other": 0.0}], eval_sft=str(tmp_path / "gone.jsonl")
    )
    assert find_sources(SFTConfig(data=data)) == {
        "data.train": [Source(str(there))],
        "data.eval": [Source("user/set:test")],
    }, "SFT reads no data.eval_sft"
    with pytest.raises(ValueError, match=r"^data\.eval_sft: '.*gone\.jsonl' does not exist"):
        find_sources(DPOConfig(data=data))
    with pytest.raises(ValueError, match=r"^data\.format: 'alpaca' is not a format of dpo rows"):
        find_sources(DPOConfig(data=replace(data, format="alpaca")))


def test_paths() -> None:
    assert resolve_paths("a.jsonl") == [Source("a.jsonl", 1.0)]
    assert resolve_paths(["a.jsonl", {"b.json": 0.5, "c.json": 2, "d.json": 0}]) == [
        Source("a.jsonl", 1.0),
        Source("b.json", 0.5),
        Source("c.json", 2.0),
    ], "0 leaves a path out"
    bad: list[Any] = [
        "",
        [],
        None,
        [""],
        [{"a": -1}],
        [{"a": float("nan")}],
        [{"a": float("inf")}],
        [{"a": True}],
        [{"a": 0}],
        ["a", {"a": 2.0}],
        [3],
    ]
    for paths in bad:
        with pytest.raises(ValueError, match=r"^data\.train: "):
            resolve_paths(paths)


@pytest.mark.parametrize("weight", [0.1, 0.5, 3, 1.000001])
@pytest.mark.parametrize(
    ("config", "field"), [(SFTConfig, "eval"), (DPOConfig, "eval"), (DPOConfig, "eval_sft")], ids=str
)
def test_held_out_rows_have_no_weight(config: Any, field: str, weight: float, tmp_path: Path) -> None:
    """Each is scored once: a weight that would have no effect is refused, and of a training's rows it is taken."""
    there, other = tmp_path / "there.jsonl", tmp_path / "other.jsonl"
    there.write_text("{}\n")
    other.write_text("{}\n")
    weighted: Any = [str(other), {str(there): weight}]
    data = DataConfig(train=weighted, eval=str(other))
    assert find_sources(config(data=data))["data.train"][1] == Source(str(there), weight)
    with pytest.raises(ValueError) as caught:
        find_sources(config(data=replace(data, **{field: weighted})))
    assert str(caught.value) == (
        f"data.{field}: the weight of '{there}' must be 0 or 1, got {weight}, since held-out rows are scored once "
        "each; give the path alone, or 0 to leave it out"
    )
    once: Any = [{str(there): 1.0}, {str(other): 0}]
    assert find_sources(config(data=replace(data, **{"eval": str(there), field: once})))[f"data.{field}"] == [
        Source(str(there))
    ]
    with pytest.raises(ValueError, match=rf"^data\.{field}: .* is listed 2 times; list it once$"):
        find_sources(config(data=replace(data, **{field: [str(there), str(there)]})))


SPELLINGS = {
    "dot": lambda file: f"./{file.name}",
    "absolute": lambda file: str(file.resolve()),
    "up and down": lambda file: f"folder/../{file.name}",
    "link": lambda file: "link.jsonl",
    "of a linked folder": lambda file: f"linked/{file.name}",
}


@pytest.mark.parametrize("name", ["data.train", "data.eval"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_named_twice_in_two_spellings_is_refused(
    spelling: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows were trained on twice without a word."""
    monkeypatch.chdir(tmp_path)
    for file in ("a.jsonl", "b.jsonl"):
        Path(file).write_text("{}\n")
    Path("folder").mkdir()
    Path("link.jsonl").symlink_to("a.jsonl")
    Path("linked").symlink_to(tmp_path)
    other = SPELLINGS[spelling](Path("a.jsonl"))
    remedy = "list it once, with a weight" if name == "data.train" else "list it once"
    with pytest.raises(ValueError) as caught:
        sources_of(["b.jsonl", "a.jsonl", {other: 1}], "sft", "auto", name)
    assert str(caught.value) == f"{name}: 'a.jsonl' and {other!r} are both {tmp_path}/a.jsonl; {remedy}"
    assert len(sources_of(["b.jsonl", "a.jsonl", {other: 0}], "sft", "auto", name)) == 2, "one of them is left out"


def test_a_folder_and_a_file_in_it_and_a_hub_set_by_two_names_are_the_same_rows_too(tmp_path: Path) -> None:
    file = parquet(tmp_path / "set" / "a.parquet", "one")
    with pytest.raises(ValueError, match=rf"^data\.train: '{file.parent}' and '{file}' are both {file}; list it once"):
        sources_of([str(file.parent), str(file)], "sft", "auto", "data.train")
    with pytest.raises(ValueError, match=r"^data\.train: 'user/set' and 'user/set:train' are both user/set:train; "):
        sources_of(["user/set", "user/set:train"], "sft", "auto", "data.train")
    assert len(sources_of(["user/set:test", "user/set", str(file)], "sft", "auto", "data.train")) == 3


def places_and_rows(path: Any) -> list[tuple[str, Any]]:
    return [(row_place("", row.row, row.has_lines), json.loads(row.text)) for row in read_rows(0, str(path))]


def test_lines_keep_their_numbers(tmp_path: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"n": 1}\n\n  \n{"n": "\xe2\x80\xa8"}\r\n{"n": 3}')
    assert places_and_rows(file) == [(":1", {"n": 1}), (":4", {"n": "\u2028"}), (":5", {"n": 3})]
    file.write_bytes(b'{"n": 1}\n{"n": "\xff"}\n{"n": 3}\n')
    rows = list(read_rows(0, str(file)))
    assert [row.error and row.error[0] for row in rows] == [None, "bad_encoding", None]


def test_json_lists_lines_and_single_objects(tmp_path: Any) -> None:
    file = tmp_path / "a.json"
    rows = [{"n": None, "m": {"x": None}}, {"n": 2}]
    file.write_text(json.dumps(rows, indent=2))
    assert places_and_rows(file) == [(": row 0", rows[0]), (": row 1", rows[1])]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert places_and_rows(file) == [(":1", rows[0]), (":2", rows[1])]
    file.write_text(json.dumps(rows[0], indent=2))
    assert places_and_rows(file) == [(": row 0", rows[0])]
    file.write_text('[{"n": 1},\n {"n": }]')
    with pytest.raises(ValueError, match=r"a\.json:2: malformed JSON"):
        list(read_rows(0, str(file)))


@pytest.mark.parametrize("indent", [None, 2, "lines"])
def test_a_json_list_named_as_lines_is_one_error(indent: Any, tmp_path: Any) -> None:
    """It was one error a line, each in other words."""
    rows = [{"n": 1}, {"n": [2]}]
    text = "[" + ",\n".join(map(json.dumps, rows)) + "]" if indent == "lines" else json.dumps(rows, indent=indent)
    for mark in ("", "\n", "\ufeff"):
        (tmp_path / "a.jsonl").write_text(mark + text + "\n")
        with pytest.raises(
            ValueError, match=r"a\.jsonl: this is a JSON list, not one object a line; name the file \.json$"
        ):
            list(read_rows(0, str(tmp_path / "a.jsonl")))
    (tmp_path / "a.json").write_text(text)
    assert [row for _, row in places_and_rows(tmp_path / "a.json")] == rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [("[1]\n[2]\n", 2), ('[INFO] 1 row\n{"n": 1}\n', 2), ('{"n": [1]}\n', 1), ("", 0), ("\n", 0)],
)
def test_lists_line_by_line_are_rows_of_their_own(text: str, rows: int, tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert len(list(read_rows(0, str(tmp_path / "a.jsonl")))) == rows


def test_parquet_files_of_other_columns_are_named_by_what_differs(tmp_path: Any) -> None:
    for name, more in (("a", {}), ("b", {"extra": 1})):
        datasets.Dataset.from_list([{"messages": [U, A], **more}]).to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(ValueError, match=r"its Parquet files differ in the columns extra; give them the same ones"):
        list(read_rows(0, str(tmp_path)))


def parquet(file: Path, *answers: str) -> Path:
    """A Parquet file of one conversation an answer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list([{"messages": [U, {**A, "content": text}]} for text in answers]).to_parquet(str(file))
    return file


def answers_of(path: Path) -> list[str]:
    return [row["messages"][1]["content"] for _, row in places_and_rows(path)]


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train-00000-of-00001", ["test-00000-of-00001", "validation-00000-of-00001"]),
        ("train_sft-00000-of-00001", ["train_gen-00000-of-00001"]),
        ("Train", ["Eval"]),
        ("train.1", ["dev.1", "valid", "val"]),
        ("train1", ["test1"]),
        ("chat_train", ["chat_test"]),
        ("train_sft-00000-of-00001-a3ecf92756993580", ["train_gen-00000-of-00001-a3ecf92756993580"]),
    ],
)
def test_a_folder_of_several_splits_is_refused(train: str, others: list[str], tmp_path: Path) -> None:
    """The test and validation rows of a downloaded hub set were trained on without a word."""
    for name in (train, *others):
        parquet(tmp_path / f"{name}.parquet", name)
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path))))
    (start, option) = str(caught.value).split("list the files of one split: ")
    assert start.startswith(f"data.train: the folder '{tmp_path}' holds the splits ") and "\n" not in start
    if "_gen" not in str(others):
        assert option == f"--data.train {tmp_path}/{train}.parquet"
    with pytest.raises(ValueError, match=r"^data\.eval: .* list the files of one split: --data\.eval "):
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path / f"{train}.parquet"), eval=str(tmp_path))))
    for name in others:
        (tmp_path / f"{name}.parquet").unlink()
    assert answers_of(tmp_path) == [train]


def test_several_files_of_one_split_are_one_source(tmp_path: Path) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002"]
    for name in names:
        parquet(tmp_path / f"{name}.parquet", name)
    assert answers_of(tmp_path) == names
    parquet(tmp_path / "test-00000-of-00001.parquet", "test")
    files = ", ".join(f"{tmp_path}/{name}.parquet" for name in names)
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path))))
    assert str(caught.value).endswith(
        f"holds the splits test, train; list the files of one split: --data.train '[{files}]'"
    )
    assert typed(str(caught.value)) == [f"{tmp_path}/{name}.parquet" for name in names]
    for name in ("training", "traintest", "tests", "testimonials", "a"):
        parquet(tmp_path / "other" / f"{name}.parquet", name)
    assert len(answers_of(tmp_path / "other")) == 5, "these are no names of splits"


def typed(message: str) -> Any:
    """The training data that the option at the end of a message gives, pasted into a shell."""
    option = message[message.index("--data.train ") :]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {option}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    return load_config(SFTConfig, words)[0].data.train


@pytest.mark.parametrize("folder", ["plain", "with space", "a, b", "it's", 'say "so"', "a: b #c", "[x]", "$HOME"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_remedy_can_be_pasted(folder: str, count: int, tmp_path: Path) -> None:
    """Three files ended in `...`, and a comma in a name made two of one."""
    names = [f"train-{number:05}-of-{count:05}" for number in range(count)]
    for name in (*names, "test-00000-of-00001", ".train-hidden"):
        parquet(tmp_path / folder / f"{name}.parquet", name)
    with pytest.raises(ValueError, match="list the files of one split: ") as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path / folder))))
    files = [str(tmp_path / folder / f"{name}.parquet") for name in names]
    assert typed(str(caught.value)) == (files if count > 1 else files[0])
    if (count, folder) == (7, "plain"):
        assert str(caught.value).endswith(
            f"""--data.train "[$(printf '"%s",' {tmp_path}/plain/train-0000*.parquet)]\""""
        )
    parquet(tmp_path / folder / "train-x-test.parquet", "of neither")
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path / folder))))
    assert typed(str(caught.value)) == (sorted([*files, str(tmp_path / folder / "train-x-test.parquet")])), (
        "its name says train first"
    )


@pytest.mark.parametrize(
    ("files", "option"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            "{}/data/train-00000-of-00001.parquet",
        ),
        (["data/a.parquet", "README.md", "infos.json"], "{}/data/a.parquet"),
        (["main/train/0000.parquet", "main/test/0000.parquet"], "{}/main/train/0000.parquet"),
        (["a.jsonl", "b.jsonl"], "'[{0}/a.jsonl, {0}/b.jsonl]'"),
        (["rows.json"], "{}/rows.json"),
    ],
)
def test_a_folder_that_is_no_source_says_where_its_files_are(files: list[str], option: str, tmp_path: Path) -> None:
    """A download of the hub has its files in data/; all that was said is that there are none."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path))))
    start, end = str(caught.value).split("; ", 1)
    assert start == f"data.train: the folder '{tmp_path}' holds no `datasets` set, and no .parquet file right in it"
    assert end.endswith(f"found in it: list those to read, as --data.train {option.format(tmp_path)}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"right in it; name a file of rows$"):
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path / "empty"))))


@pytest.mark.parametrize(
    "given", ["{0}/*.jsonl", "{0}/a.jsonl,{0}/b c.jsonl", "{0}/a.jsonl, {0}/b c.jsonl", "{0}/[ab]*"]
)
def test_what_other_tools_take_for_several_files_is_answered_with_the_list(given: str, tmp_path: Path) -> None:
    """Of a pattern and of names with commas all that was said is that they do not exist."""
    for name in ("a.jsonl", "b c.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=(path := given.format(tmp_path)))))
    assert str(caught.value).startswith(f"data.train: '{path}' is no single path; list the files: --data.train ")
    assert typed(str(caught.value)) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b c.jsonl"]
    for missing in (f"{tmp_path}/*.json", f"{tmp_path}/a.jsonl,{tmp_path}/c.jsonl"):
        with pytest.raises(ValueError, match=r"does not exist; give a file"):
            find_sources(SFTConfig(data=DataConfig(train=missing)))
    (tmp_path / "a,[b].jsonl").write_text("{}\n")
    assert len(find_sources(SFTConfig(data=DataConfig(train=str(tmp_path / "a,[b].jsonl"))))["data.train"]) == 1


@pytest.mark.parametrize("unread", ["part/b.parquet", "part/deep/b.PARQUET", "more.jsonl", "part/more.ndjson"])
def test_rows_of_a_folder_that_nobody_would_read_are_refused(unread: str, tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", "one")
    for name in ("README.md", "dataset_infos.json", ".cache/part/b.parquet", "part/._b.parquet", "._a.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert answers_of(tmp_path) == ["one"]
    (tmp_path / unread).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / unread).write_text("{}\n")
    with pytest.raises(ValueError) as caught:
        find_sources(SFTConfig(data=DataConfig(train=str(tmp_path))))
    assert str(caught.value) == (
        f"data.train: of the folder '{tmp_path}' only the .parquet files right in it are read, not "
        f"{tmp_path}/{unread}; list the files to read: --data.train {file}"
    )


def test_what_a_source_holds_is_the_files_that_are_read(tmp_path: Path) -> None:
    """A .DS_Store that a file manager leaves was part of the data's identity: a run would not resume."""
    parquet(tmp_path / "parts" / "a.parquet", "one")
    datasets.Dataset.from_list([{"messages": [U, A]}]).save_to_disk(str(tmp_path / "set"))
    for folder in (tmp_path / "parts", tmp_path / "set"):
        before, files = content_hash(str(folder)), source_files(str(folder))
        for name in (".DS_Store", "._a.parquet"):
            (folder / name).write_text("x")
        assert content_hash(str(folder)) == before and source_files(str(folder)) == files
        files[0].write_bytes(files[0].read_bytes() + b"x")
        assert content_hash(str(folder)) != before
    before = content_hash(str(tmp_path / "parts"))
    (tmp_path / "parts" / "README.md").write_text("x")
    assert content_hash(str(tmp_path / "parts")) == before


def test_a_replaced_parquet_file_is_read_anew(tmp_path: Path) -> None:
    """`rsync -a` and `tar` keep the time of change, by which a copy of the old rows was taken for the file."""
    file = tmp_path / "a.parquet"
    for text in ("old rows", "new rows"):
        parquet(file, text)
        os.utime(file, (1, 1))
        assert answers_of(file) == [text] and answers_of(tmp_path) == [text]


def test_an_empty_part_is_no_broken_file(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"messages": [U, A]}] * 2500)
    table.to_parquet(str(tmp_path / "b.parquet"))
    for name in ("a", "c"):
        table.select([]).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert len(answers_of(tmp_path)) == 2500 and answers_of(tmp_path / "c.parquet") == []


def test_a_parquet_files_name_is_no_pattern(tmp_path: Path) -> None:
    odd = parquet(tmp_path / "a[1].parquet", "odd")
    plain = parquet(tmp_path / "a1.parquet", "plain")
    assert answers_of(odd) == ["odd"] and answers_of(plain) == ["plain"]


def test_held_out_rows_that_are_trained_are_told_by_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, and the folder that holds it, gave no warning."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        parquet(tmp_path / "parts" / f"{name}.parquet", name)
    parquet(tmp_path / "c.parquet", "c")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "parts" / "b.parquet")

    def warned(train: Any, *held_out: str) -> list[str]:
        config = SFTConfig(data=DataConfig(train=train, eval=list(held_out)))
        warnings = _trained_on(config, "data.eval", SimpleNamespace(paths=list(held_out)))  # type: ignore[arg-type]
        end = " is trained on as well; take it out of one of the two"
        assert all(line.startswith("warning: data.eval: ") and line.endswith(end) for line in warnings)
        return [line.removeprefix("warning: data.eval: ").removesuffix(end) for line in warnings]

    assert warned("parts/a.parquet", "parts") == [f"{tmp_path}/parts/a.parquet of parts"]
    assert warned("parts", "parts/a.parquet", "c.parquet") == ["parts/a.parquet"]
    assert warned("parts", "link.parquet", str(tmp_path / "parts")) == ["link.parquet", f"{tmp_path}/parts"]
    assert warned(["user/set", "c.parquet"], "user/set:train", "user/set:test") == ["user/set:train"]
    assert warned("parts/a.parquet", "parts/b.parquet", "link.parquet") == []


def test_arrow_nulls_are_removed_and_own_nulls_are_not(tmp_path: Any) -> None:
    rows = [
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]},
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"y": "a"}}]}]},
    ]
    table = datasets.Dataset.from_list(rows)
    arguments = [row["messages"][1]["tool_calls"][0]["arguments"] for row in table]
    assert arguments == [{"x": 1, "y": None}, {"x": None, "y": "a"}]  # what Arrow makes of it: the negative control
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("a.parquet", "folder", "splits"):
        assert [row for _, row in places_and_rows(tmp_path / name)] == rows
    own = {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": {"x": None, "y": [None, {}]}}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(own))
    ((_, row),) = places_and_rows(tmp_path / "a.jsonl")
    parsed = parse_row(json.dumps(row), "sft")
    assert isinstance(parsed, Conversation)
    call = parsed.messages[1]["tool_calls"][0]
    assert call["function"]["arguments"] == {"x": None, "y": [None, {}]}


def test_bytes_are_no_text_and_nan_is_no_value(tmp_path: Path) -> None:
    """b'Hi' was trained as these five characters, and a column that pandas left empty made every row an error."""
    texts: dict[str, Any] = {"instruction": ["Hi", "Ho"], "input": [math.nan, math.nan], "output": ["x", "y"]}
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({**texts, "image": [b"\xff", b"1"]}), file)
    assert [row["instruction"] for _, row in places_and_rows(file)] == ["Hi", "Ho"]
    (first, _) = (parse_row(raw.text, "sft") for raw in read_rows(0, str(file)))
    assert isinstance(first, Conversation) and [m["content"] for m in first.messages] == ["Hi", "x"]
    assert first.unread == ("image",)
    pyarrow.parquet.write_table(pyarrow.table({**texts, "output": [b"x", b"y"]}), file)
    for raw in read_rows(0, str(file)):
        with pytest.raises(RowError, match=r"^output\.content must be text, got dict$"):
            parse_row(raw.text, "sft")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"n": 1e400}', "the number 1e400 is beyond the range of a float"),
        ('{"n": NaN}', "NaN is not JSON"),
        ('{"messages": [{"content": "GOOD", "content": "BAD"}]}', "the key 'content' is given twice in one object"),
    ],
)
def test_a_row_of_a_list_is_refused_by_itself(row: str, problem: str, tmp_path: Path) -> None:
    """The reader of lists took the last of two keys, and one number that no float holds for a broken file."""
    good = {"messages": [U, A], "n": 1e308}
    (tmp_path / "a.json").write_text(f"\n[ {json.dumps(good)},\n{row} ,{json.dumps(good, indent=1)}]\n")
    rows = list(read_rows(0, str(tmp_path / "a.json")))
    assert [r.row for r in rows] == [0, 1, 2] and [json.loads(rows[i].text) for i in (0, 2)] == [good, good]
    with pytest.raises(RowError) as caught:
        parse_row(rows[1].text, "sft")
    assert caught.value.reason == "bad_json" and str(caught.value).endswith(problem)


@pytest.mark.parametrize(
    "text", ['[{"n": 1},]', '[{"n": 1} {"n": 2}]', '[{"n": 1}', '[{"n": 1}]]', '[{"n": 1}] {', "[,]", '[{"n": 1},', "["]
)
def test_a_broken_list_is_one_error_and_no_row(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json:1: malformed JSON"):
        next(read_rows(0, str(tmp_path / "a.json")))
    with pytest.raises(ValueError):
        json.loads(text)
    (tmp_path / "a.json").write_text("[ ]\n")
    assert list(read_rows(0, str(tmp_path / "a.json"))) == []


def test_many_rows_are_announced_where_no_bar_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """400,000 rows were two minutes of silence in a log."""
    monkeypatch.setattr(sources, "MANY_ROWS", 3)
    column = {"n": sources.TableColumn("int32")}
    for count, announced in ((3, "tokenising 3 rows\n"), (2, "")):
        table = sources.build_table(
            lambda count=count: iter([{"n": n} for n in range(count)]),  # type: ignore[misc]
            column, lambda batch: {"m": batch["n"]}, {"m": column["n"]},
            workers=0, rows_per_worker=1000, batch_size=2, folder=tmp_path / str(count),
        )  # fmt: skip
        assert len(table) == count and capsys.readouterr().err == announced


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_lines_that_end_in_carriage_returns_alone(tmp_path: Path, suffix: str) -> None:
    file, rows = tmp_path / f"rows{suffix}", [json.dumps({"messages": [U, A]})] * 3
    for ends in ("\n", "\r\n"):
        file.write_bytes(ends.join(rows).encode())
        assert len(list(read_rows(0, str(file)))) == 3
    file.write_bytes(rows[0].replace(", ", ",\r").encode())  # blanks of one row
    assert [row.error for row in read_rows(0, str(file))] == [None]
    for mark in ("", "\ufeff"):
        file.write_bytes((mark + "\r".join(rows)).encode())
        with pytest.raises(ValueError, match=rf"rows{suffix}: its lines end in carriage returns alone, .* line feeds$"):
            list(read_rows(0, str(file)))


@pytest.mark.parametrize("message", [U, {"from": "human", "value": "Hi"}])
def test_a_list_of_messages_is_no_list_of_rows(tmp_path: Path, message: dict[str, str]) -> None:
    """Under .json each message would be a row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps([message, message]))
    with pytest.raises(ValueError, match=r'rows.jsonl: this is one list of messages; write .*"messages": \[\.\.\.\]'):
        list(read_rows(0, str(file)))
    file.write_text(json.dumps([{"messages": [message]}]))
    with pytest.raises(ValueError, match=r"name the file \.json$"):
        list(read_rows(0, str(file)))


def test_hub_ids_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"messages": [U, A]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(list(read_rows(0, "org/set"))) == 1
    assert len(list(read_rows(0, "org/set:test_sft"))) == 1
    assert asked == [("org/set", "train"), ("org/set", "test_sft")]


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing/file.json", "./nothing", "/no/where", "a--b/c", "org/set:a:b"]
)
def test_missing_files_are_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list(read_rows(0, name))


def test_unreadable_sources(tmp_path: Any) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict(
        {"a": datasets.Dataset.from_dict({"n": [1]}), "b": datasets.Dataset.from_dict({"n": [1]})}
    ).save_to_disk(str(tmp_path / "splits"))
    for folder, listing in (("odd", "[]"), ("none", '{"splits": []}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dataset_dict.json").write_text(listing)
    for name, problem in (
        ("odd", "not a readable `datasets` folder"),
        ("none", "holds no split"),
        ("a.csv", "unknown suffix"),
        ("a.parquet", "not a readable Parquet file"),
        ("empty", "holds no"),
        ("splits", r"^data: '.*splits' holds the splits a, b; name one of them: .*splits:a or .*splits:b"),
        ("splits:c", r"the splits there are a, b; name one of them"),
        ("splits/a:b", r"holds one set without splits; leave out :b"),
    ):
        with pytest.raises(ValueError, match=problem):
            list(read_rows(0, str(tmp_path / name)))


def test_a_split_of_a_folder_is_named_as_on_the_hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.eval took the split train of such a folder without a word."""
    splits = {
        name: datasets.Dataset.from_list([{"messages": [U, {**A, "content": name}]}]) for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "set"), "set", "./set"):
        for name in splits:
            (row,) = read_rows(0, f"{folder}:{name}")
            assert (row.path, row.row) == (f"{folder}:{name}", 0)
            assert json.loads(row.text)["messages"][1]["content"] == name
    with pytest.raises(ValueError, match=r"^data\.eval: 'set' holds the splits train, test; name one of them"):
        find_sources(SFTConfig(data=DataConfig(train="set:train", eval="set")))
    hashes = [content_hash(path) for path in ("set:train", "set:test", "set/train")]
    assert hashes[0] != hashes[1] and hashes[0] == hashes[2]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_file_that_is_no_text_is_one_error(suffix: str, tmp_path: Path) -> None:
    """Each of its lines was one of a broken encoding."""
    row = json.dumps({"messages": [U, A]}).encode()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", row)
    parquet(tmp_path / "a.parquet", "one")
    contents = {
        "this is a gzip file; unpack it": gzip.compress(row),
        "this is a bzip2 file; unpack it": bz2.compress(row),
        "this is an xz file; unpack it": lzma.compress(row),
        "this is a zstd file; unpack it": pyarrow.compress(row, "zstd", asbytes=True),
        "this is a zip archive or a spreadsheet; unpack it, or save its rows as .jsonl": (
            tmp_path / "a.zip"
        ).read_bytes(),
        "this is a Parquet file; name it .parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    path = tmp_path / f"rows.{suffix}"
    for problem, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            list(read_rows(0, str(path)))
        assert str(caught.value) == f"{path}: {problem}"
    path.write_bytes(row)
    assert len(list(read_rows(0, str(path)))) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_another_encoding_is_one_error(encoding: str, suffix: str, tmp_path: Any) -> None:
    rows = [{"messages": [U, {**A, "content": "日本語"}]}] * 40
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{path}: the file is {encoding[:6].upper()}, not UTF-8; save it as UTF-8$"):
        list(read_rows(0, str(path)))
    for mark in ("", "\ufeff"):
        path.write_text(mark + text)
        assert [row for _, row in places_and_rows(path)] == rows


def test_a_nul_at_the_beginning_of_a_file_is_one_rows_error(tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\0{"messages": []}\n{"messages": []}\n')
    assert len(list(read_rows(0, str(tmp_path / "a.jsonl")))) == 2
