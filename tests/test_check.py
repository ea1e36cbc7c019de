"""The flight check: what it finds, where it says it is, what it writes, how it ends."""

import gzip
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_train.command_line import load_config, task_of
from qwen_train.config import DataConfig, DPOConfig, SFTConfig
from qwen_train.data import check
from qwen_train.data.chat import ChatOptions, EncodedConversation, Template
from qwen_train.data.check import Part, Report, examine, histogram, pair_statistics, percentiles
from qwen_train.data.formats import parse_row
from qwen_train.data.sources import Source
from qwen_train.data.stream import Stream
from qwen_train.data.tokenize import (
    JudgedRow,
    judge,
    tokenize,
)
from qwen_train.output import check_view
from qwen_train.output.check_html import html_page
from qwen_train.output.check_run import CannotWriteError, start_of, written
from qwen_train.output.check_view import print_examples, print_report, segments, share, visible
from tests.support import SHARED, encode_one, mini_tokenizer, needs_shared, real_tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny"
SCRIPT = ROOT / "launch" / "check.py"
REAL = {"alpaca_en_demo": "sft", "glaive_toolcall_en_demo": "sft", "dpo_en_demo": "dpo"}


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(AutoTokenizer.from_pretrained(TINY / "model"))


@pytest.fixture(scope="module")
def script() -> Any:
    """launch/check.py as a module, for runs inside this process."""
    spec = importlib.util.spec_from_file_location("launch_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the flight check loaded a model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], **more}


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def config_file(folder: Path, data: dict[str, Any], **sections: Any) -> str:
    content = {"model": {"path": str(TINY / "model")}, "data": {"max_length": 128, **data}, **sections}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def examined(
    template: Template, kind: Any, train: list[Any], held_out: list[Any] | None = None, *, folder: Path, **data: Any
) -> Report:
    """The report of rows written to files, in this process."""
    files = {"train": write(folder / "train.jsonl", train)}
    if held_out is not None:
        files["eval"] = write(folder / "eval.jsonl", held_out)
    sections = {"loss": {}} if kind == "dpo" else {}
    config, _ = load_config(
        SFTConfig if kind == "sft" else DPOConfig, ["--config", config_file(folder, {**files, **data}, **sections)]
    )
    options = ChatOptions.from_config(config.data)
    splits = {
        f"data.{name}": [(Source(path), judge(kind, path, template.tokenizer, options))] for name, path in files.items()
    }
    return examine(splits, template, options, config, examples=3)


def found(report: Report) -> set[tuple[str, str, str]]:
    return {(problem.level, Path(problem.place).name, problem.reason) for problem in report.problems}


# --- planted problems -------------------------------------------------------------------------------------------------

GOOD = [chat(f"What comes after {n}?", str(n + 1)) for n in range(10)]
LONG = chat("long " * 200, "Yes.")
BAD_ROWS: dict[str, Any] = {
    "bad_json": '{"messages": [{"role": "user"',
    "bad_role": {"messages": [{"role": "robot", "content": "hi"}]},
    "empty_answer": chat("Hello?", ""),
    "empty_message": chat("", "Hello."),
    "no_assistant": chat("Anyone?"),
    "no_supervised_tokens": {"messages": [*chat("a")["messages"], {**chat("", "b")["messages"][1], "train": False}]},
    "unknown_format": {"text": "plain"},
    "too_long": LONG,
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_planted_error_is_found_with_file_and_line(reason, template, tmp_path):
    report = examined(template, "sft", [*GOOD[:3], BAD_ROWS[reason], *GOOD[3:]], folder=tmp_path, too_long="error")
    assert found(report) == {("error", "train.jsonl:4", reason)}
    assert report.exit_code == 1
    source = report.splits[0].sources[0]
    assert (source.rows, source.kept, source.errors, source.dropped) == (11, 10, 1, 0)


def test_all_problems_are_found_at_once(template, tmp_path):
    rows = [row for bad, good in zip(BAD_ROWS.values(), GOOD, strict=False) for row in (good, bad)]
    report = examined(template, "sft", rows, folder=tmp_path, too_long="error")
    lines = {f"train.jsonl:{2 * index + 2}" for index in range(len(BAD_ROWS))}
    assert {place for _, place, _ in found(report)} == lines
    assert report.counts["error"] == len(BAD_ROWS)
    assert [problem.reason for problem in report.problems] == list(BAD_ROWS), "in the order of the file"


def test_good_rows_give_no_problem(template, tmp_path):
    report = examined(template, "sft", GOOD, [chat("Is it late?", "No")], folder=tmp_path)
    assert (found(report), report.exit_code) == (set(), 0)


def test_duplicates_and_overlap(template, tmp_path):
    train = [*GOOD, GOOD[2], chat("What comes after 4?", "Six"), GOOD[2]]
    held_out = [chat("Is it late?", "No"), GOOD[7], chat("What comes after 8?", "Ten"), GOOD[7]]
    report = examined(template, "sft", train, held_out, folder=tmp_path)
    assert found(report) == {
        ("warning", "train.jsonl:11", "duplicate"),
        ("warning", "train.jsonl:13", "duplicate"),
        ("warning", "eval.jsonl:4", "duplicate"),
        ("warning", "eval.jsonl:2", "eval_row_in_train"),
        ("warning", "eval.jsonl:4", "eval_row_in_train"),
        ("warning", "eval.jsonl:3", "eval_prompt_in_train"),
    }
    messages = {Path(p.place).name + p.reason: p.message for p in report.problems}
    assert f"{tmp_path}/train.jsonl:3;" in messages["train.jsonl:13duplicate"]
    assert f"{tmp_path}/train.jsonl:8;" in messages["eval.jsonl:2eval_row_in_train"]
    assert f"{tmp_path}/train.jsonl:9," in messages["eval.jsonl:3eval_prompt_in_train"]
    assert report.exit_code == 0, "warnings do not fail the check"
    train_split, eval_split = report.splits
    assert (train_split.duplicates, train_split.distinct_prompts) == (2, 10)
    assert (eval_split.rows_in_train, eval_split.prompts_in_train) == (2, 1)


def test_duplicates_across_sources_name_the_other_file(template, tmp_path):
    options = ChatOptions(max_length=128)
    paths = [write(tmp_path / "a.jsonl", GOOD[:4]), write(tmp_path / "b.jsonl", [*GOOD[5:], GOOD[1]])]
    sources = [
        (Source(path), (replace(row, source=index) for row in judge("sft", path, template.tokenizer, options)))
        for index, path in enumerate(paths)
    ]
    config, _ = load_config(SFTConfig, ["--config", config_file(tmp_path, {"train": paths})])
    report = examine({"data.train": sources}, template, options, config)
    assert found(report) == {("warning", "b.jsonl:6", "duplicate")}
    assert f"{paths[0]}:2;" in report.problems[0].message
    assert [source.rows for source in report.splits[0].sources] == [4, 6]


def test_pairs(template, tmp_path):
    rows = [
        pair("What is up?", "The sky above.", "No"),
        pair("What is down?", "same", "same"),
        pair("What is left?", "a  word", "a word"),
        pair("What is right?", "", "no"),
        pair("What is up?", "No", "The sky above."),
        pair("What is up?", "The sky above.", "No"),
    ]
    report = examined(template, "dpo", rows, folder=tmp_path)
    assert found(report) == {
        ("dropped", "train.jsonl:2", "identical_answers"),
        ("warning", "train.jsonl:3", "whitespace_only_difference"),
        ("error", "train.jsonl:4", "empty_answer"),
        ("warning", "train.jsonl:5", "contradiction"),
        ("warning", "train.jsonl:6", "contradiction"),
        ("warning", "train.jsonl:6", "duplicate"),
    }
    assert report.exit_code == 1


def test_pair_statistics_are_those_of_the_pairs(template, tmp_path):
    rows = [pair(f"What is {n}?", "yes " * (1 + n % 3), "no " * (1 + n % 2)) for n in range(12)]
    report = examined(template, "dpo", rows, folder=tmp_path)
    options = ChatOptions(max_length=128)
    encoded = [r.encoded for r in judge("dpo", str(tmp_path / "train.jsonl"), template.tokenizer, options)]
    p, c, r = (
        np.array([len(getattr(e, name)) for e in encoded]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    stats = pair_statistics(report.splits[0])
    assert stats is not None and stats.pairs == 12
    assert stats.mean_difference == pytest.approx((c - r).mean())
    assert stats.mean_difference != 0 and stats.chosen_longer != stats.rejected_longer
    assert stats.chosen_longer == pytest.approx((c > r).mean())
    assert stats.rejected_longer == pytest.approx((c < r).mean())
    assert stats.shared_tokens == (p + c + r).sum() and stats.unshared_tokens == (2 * p + c + r).sum()


def test_trimmed_and_dropped_rows_keep_their_full_length(template, tmp_path, monkeypatch):
    """They were tokenised once more for it."""
    calls: list[int] = []
    encode = Template.encode
    monkeypatch.setattr(Template, "encode", lambda self, *given: calls.append(len(given[1])) or encode(self, *given))
    trimmed = chat("word " * 150, "One.", "And now?", "Two.")
    report = examined(template, "sft", [*GOOD, trimmed, LONG], folder=tmp_path, too_long="trim_turns")
    assert found(report) == {
        ("trimmed", "train.jsonl:11", "turns_trimmed"),
        ("dropped", "train.jsonl:12", "too_long"),
    }
    assert calls == [12]
    split = report.splits[0]
    assert (split.kept, split.sources[0].trimmed, split.sources[0].dropped) == (11, 1, 1)
    whole = encode_one(template, _parsed(trimmed), ChatOptions(max_length=10_000))
    assert sorted(split.lengths)[-2:] == sorted([len(whole.input_ids), _length(template, LONG)])
    assert sum(length > 128 for length in split.lengths) == 2
    assert split.tokens_by_role.total() == split.sources[0].tokens < sum(split.lengths)


def _parsed(row: dict[str, Any]) -> Any:
    return parse_row(json.dumps(row), "sft")


def _length(template: Template, row: dict[str, Any]) -> int:
    return len(encode_one(template, _parsed(row), ChatOptions(max_length=10_000)).input_ids)


def test_keys_that_nothing_reads_are_counted_with_their_first_place(template, tmp_path):
    user, answer = chat("Hi", "Red.")["messages"]
    odd = "\x1b[31m" + "k" * 99
    rows = [
        *GOOD[:2],
        {"messages": [user, {**answer, "wieght": 0}], "id": 1, "tools": None},
        {"messages": [user, {**answer, "weight": 1, "refusal": None}], "id": 2, "system": "S", odd: 0},
        {"prompt": [{**user, "wieght": 0}, {**user, "wieght": 0}], "completion": "Red.", "input": "x"},
        {"instruction": "Hi", "input": "x", "output": "Blue.", "history": [], "weight": 2},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": True}]},
        {"messages": [{**user, "role": "robot"}], "colour": "red"},
    ]
    report = examined(template, "sft", rows, [chat("Hi", "Red.", id=3)], folder=tmp_path)
    assert report.splits[0].unread == {
        "id": 2, "messages[].wieght": 1, odd: 1, "prompt[].wieght": 1, "input": 1, "weight": 1,
    }  # fmt: skip
    (grid,) = [grid for grid in check_view.grids(report) if grid.title == "Keys not read"]
    lines = {row[0]: row[1:] for row in grid.rows}
    assert lines["id"] == ["2", "1", str(tmp_path / "train.jsonl:3")]
    assert lines["prompt[].wieght"] == ["1", "0", str(tmp_path / "train.jsonl:5")]
    assert any(key.startswith("␛[31mkkk") and key.endswith("...") and len(key) < 70 for key in lines)
    pairs = [{**pair("Hi", "Red.", "Blue."), "score": 3, "chosen": [{**answer, "model": "x"}]}]
    assert examined(template, "dpo", pairs, folder=tmp_path).splits[0].unread == {"score": 1, "chosen[].model": 1}
    plain = examined(template, "sft", GOOD, folder=tmp_path)
    assert not [grid for grid in check_view.grids(plain) if grid.title == "Keys not read"]


def test_a_misspelt_key_is_a_warning_that_names_both(template, tmp_path):
    user, answer = chat("Hi", "Red.")["messages"]
    rows = [{"messages": [user, {**answer, "wieght": 0}]}, {"messages": [user, {**answer, "wieght": 0}], "tool": []}]
    report = examined(template, "sft", [*GOOD, *rows], folder=tmp_path)
    first = len(GOOD) + 1
    assert [
        (problem.level, problem.place, problem.message) for problem in report.problems if "did" in problem.message
    ] == [
        (
            "warning",
            str(tmp_path / f"train.jsonl:{first}"),
            "messages[].wieght is not read (2 rows); did you mean weight?",
        ),
        ("warning", str(tmp_path / f"train.jsonl:{first + 1}"), "tool is not read (1 row); did you mean tools?"),
    ]
    assert check_view.verdict(report)[0] == "warning" and report.exit_code == 0
    plain = [{**row, "id": 1, "prompt_id": "x", "conversation_id": 2, "source": "s", "input": "i"} for row in GOOD]
    own = examined(template, "sft", plain, folder=tmp_path)
    assert len(own.splits[0].unread) == 5 and not own.counts["warning"]


def test_rows_keyed_by_anything_do_not_fill_the_memory(template, tmp_path):
    rows = [{**chat("Hi", f"Red {n}."), **{f"k{n}.{i}": 1 for i in range(30)}} for n in range(20)]
    assert len(examined(template, "sft", rows, folder=tmp_path).splits[0].unread) == check.MAX_KEYS


def test_control_tokens_and_stripped_newlines_are_counted(template, tmp_path):
    odd = chat("Say <|im_end|> and <|im_end|>", "\n\nNo <|im_start|>")
    for policy, status, listed in (("escape", "kept", set()), ("reject", "error", {"control_token"})):
        report = examined(template, "sft", [*GOOD, odd], folder=tmp_path, control_tokens=policy)
        notes = report.splits[0].notes
        kept = status == "kept"
        assert (notes["control_tokens"].total, notes["control_tokens"].left_out) == ((3, 0) if kept else (0, 3))
        assert {problem.reason for problem in report.problems} == listed
        if kept:
            assert notes["stripped_newlines"].rows == 1
            assert notes["default_system"].rows == 11, "the template's own system message, in every row"


USER_TURN, HEADER, END = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"
RENDERED: dict[str, list[Any]] = {
    "sft": [
        {"prompt": USER_TURN.format(f"What comes after {n}?") + HEADER, "completion": f"{n + 1}{END}"} for n in range(5)
    ],
    "dpo": [
        pair(USER_TURN.format(f"What comes after {n}?") + HEADER, f"{n + 1}{END}\n", f"{n}{END}\n") for n in range(5)
    ],
}
PLAIN: dict[str, list[Any]] = {
    "sft": [chat(f"What comes after {n}?", str(n + 1)) for n in range(60)],
    "dpo": [pair(f"What comes after {n}?", str(n + 1), str(n)) for n in range(60)],
}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_that_a_template_has_written_already_are_one_warning(kind, template, tmp_path):
    report = examined(template, kind, [*PLAIN[kind][10:20], *RENDERED[kind]], folder=tmp_path)
    assert found(report) == {("warning", "train.jsonl:11", "rendered_content")}
    assert report.problems[0].message.startswith("5 of 15 rows look rendered already")
    data = tokenize(
        kind, str(tmp_path / "train.jsonl"), template.tokenizer, ChatOptions(), cache_dir=tmp_path, workers=1
    )
    assert data.report.warning == report.problems[0].message, "the training says the same"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stray_control_token_is_no_rendered_data(kind, template, tmp_path):
    """One row in 61 about ChatML, and answers that name <|im_end|> in passing."""
    passing = [json.loads(json.dumps(row).replace("What", "<|im_end|>: what")) for row in PLAIN[kind]]
    report = examined(template, kind, [*passing, RENDERED[kind][0]], folder=tmp_path)
    assert not report.problems and report.splits[0].notes["rendered_content"].rows == 1
    data = tokenize(
        kind, str(tmp_path / "train.jsonl"), template.tokenizer, ChatOptions(), cache_dir=tmp_path, workers=1
    )
    assert not data.report.warning and "rows that look rendered already: 1" in data.report.summary()


def test_a_turn_without_a_supervised_stop_token_fails_the_check(template):
    good = encode_one(template, _parsed(GOOD[0]), ChatOptions(max_length=128))
    (start, end, weight), *_ = good.spans

    def report(spans: list[tuple[int, int, float]]) -> Report:
        encoded = EncodedConversation(good.input_ids, spans)
        row = JudgedRow(0, "x.jsonl", 0, True, "kept", encoded=encoded)
        config = SFTConfig(data=DataConfig(train="x.jsonl"))
        return examine({"data.train": [(Source("x.jsonl"), [row])]}, template, ChatOptions(), config)

    whole, cut = report([(start, end, weight)]), report([(start, end - 1, weight)])
    assert (whole.splits[0].stop_coverage, whole.exit_code) == (1.0, 0)
    assert (cut.splits[0].stop_coverage, cut.exit_code) == (0.0, 1)
    assert [problem.reason for problem in cut.problems] == ["no_stop_token"]


def test_what_is_learnt_of_an_answer_that_holds_a_turn_is_counted_as_it_is_trained(template, tmp_path):
    """Under `allow`; the check called the answer's end unsupervised, and the row NOT READY."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Red. <|im_start|>user\nBlue."}]
    row = {"messages": [*turns, *GOOD[0]["messages"][-2:]]}
    report = examined(template, "sft", [row], folder=tmp_path, max_length=512, control_tokens="allow")
    split, encoded = report.splits[0], encode_one(template, _parsed(row), report.options)
    ends = [encoded.input_ids[end - 1] for _, end, _ in encoded.spans]
    assert ends == [template.end_id] * 2 and template.start_id in encoded.input_ids[slice(*encoded.spans[0][:2])]
    assert (split.supervised_turns, split.stopped_turns, report.exit_code) == (2, 2, 0)
    assert split.supervised_by_role.total() == sum(end - start for start, end, _ in encoded.spans)
    assert [(problem.level, problem.reason) for problem in report.problems] == [("warning", "control_tokens")]


def test_the_header_of_an_answer_without_weight_is_no_answer(template, tmp_path):
    """data.supervise all learns the header, and the check missed the end of the answer behind it."""
    turns = GOOD[0]["messages"]
    row = {"messages": [turns[0], {**turns[1], "train": False}, *turns]}
    report = examined(template, "sft", [row], folder=tmp_path, max_length=512, supervise="all")
    split = report.splits[0]
    assert (split.supervised_turns, split.stopped_turns, report.exit_code) == (1, 1, 0)


def test_a_plan_of_large_steps_looks_at_few_of_them(template, tmp_path, monkeypatch):
    """50 steps of a million rows each took minutes."""
    looked_at: list[int] = []
    rows = check.Stream.rows
    monkeypatch.setattr(check.Stream, "rows", lambda self, step: looked_at.append(step) or rows(self, step))
    monkeypatch.setattr(check, "PLANNED_ROWS", 100)
    path = write(tmp_path / "train.jsonl", GOOD[:3])
    for step, expected in ((1, 50), (5, 20), (60, 1), (1000, 1)):
        looked_at.clear()
        batch = {"sequences_per_step": step}
        config, _ = load_config(
            SFTConfig, ["--config", config_file(tmp_path, {"train": path}, batch=batch, run={"steps": 70})]
        )
        source = Source(path)
        judged = {"data.train": [(source, judge("sft", path, template.tokenizer, ChatOptions()))]}
        plan = examine(judged, template, ChatOptions(), config).plan
        assert looked_at == [*range(expected)] and plan is not None and plan.steps == 70


def test_the_conversations_beside_pairs_are_judged_as_conversations(script, tmp_path, capsys):
    """`data.eval_sft`: what launch/dpo.py would refuse is NOT READY, and pairs are not compared with conversations."""
    pairs = write(tmp_path / "pairs.jsonl", [pair(f"What is {n}?", "yes", "no") for n in range(4)])
    good = write(tmp_path / "good.jsonl", GOOD)
    path = config_file(tmp_path, {"train": pairs, "eval": pairs, "eval_sft": good, "format": "preference"}, loss={})
    assert script.main(["--config", path]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if good in line]
    assert line.split()[:5] == ["data.eval_sft", good, "1", "10", "10"]
    bad = write(tmp_path / "bad.jsonl", [*GOOD, BAD_ROWS["empty_answer"]])
    assert script.main(["--config", path, "--data.eval_sft", bad]) == 1
    out = capsys.readouterr().out
    assert f"{bad}:11:" in out and "NOT READY: 1 error" in out
    with pytest.raises(ValueError, match=r"^data\.eval_sft: .*gone\.jsonl' does not exist"):
        script.main(["--config", path, "--data.eval_sft", str(tmp_path / "gone.jsonl")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([LONG, LONG], "none of 2 rows is left (too_long: 2); raise data.max_length or give other data"),
        ([LONG, "{"], "none of 2 rows is left (too_long: 1, in error: 1); raise data.max_length or give other data"),
        ([], "no row in it; give a file with rows"),
        (["{"], "the only row is in error; repair it or give other data"),
        (["{", "["], "all 2 rows are in error; repair them or give other data"),
        ([pair("Hi", "Red.", "Red.")], "none of 1 rows is left (identical_answers: 1); give other data"),
    ],
)
def test_no_row_left_is_an_error(rows, message, template, tmp_path):
    kind = "dpo" if rows and "chosen" in rows[0] else "sft"
    report = examined(template, kind, rows, folder=tmp_path)
    assert ("data.train", message) in {(p.place, p.message) for p in report.problems if p.reason == "no_rows"}
    assert (report.plan, report.exit_code) == (None, 1)
    if report.counts["error"] == 1:  # of the split; the training says the same
        path = str(tmp_path / "train.jsonl")
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
            tokenize(kind, path, template.tokenizer, ChatOptions(max_length=128), cache_dir=tmp_path, workers=0)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_roles_of_a_tool_conversation_add_up(tmp_path):
    template = Template(mini_tokenizer())
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Go"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is done.", "weight": 0.5},
        ]
    }
    report = examined(template, "sft", [row], folder=tmp_path, max_length=512)
    split = report.splits[0]
    encoded = encode_one(template, _parsed(row), ChatOptions(max_length=512))
    assert set(split.tokens_by_role) == {"system", "user", "assistant", "tool"}
    assert split.tokens_by_role.total() == len(encoded.input_ids)
    supervised = sum(end - start for start, end, _ in encoded.spans)
    assert (split.supervised_by_role["assistant"], split.supervised_by_role.total()) == (supervised, supervised)
    assert (split.supervised_turns, split.stopped_turns) == (2, 2)


def test_histogram_counts_every_row_and_cuts_at_max_length():
    lengths = check.array("i", [1, 5, 99, 100, 101, 100, 5000, 17])
    bins = histogram(lengths, 100)
    assert sum(bin.count for bin in bins) == len(lengths)
    assert sum(bin.count for bin in bins if bin.high <= 100) == 6, "max_length is an edge"
    assert all(left.high == right.low for left, right in itertools.pairwise(bins))
    for bin in bins:
        assert bin.count == sum(bin.low < length <= bin.high for length in lengths)
    assert histogram(check.array("i"), 100) == []
    assert percentiles(lengths)["median"] == 99 and percentiles(lengths)["max"] == 5000


def test_plan_is_what_the_stream_does(template, tmp_path):
    files = [
        write(tmp_path / "a.jsonl", GOOD),
        write(tmp_path / "b.jsonl", [chat("Who?", f"Me {n}") for n in range(9)]),
    ]
    batch = {"sequences_per_step": 4, "tokens_per_microbatch": 130}
    data = {"train": [{files[0]: 1.5}, files[1]]}
    path = config_file(tmp_path, data, batch=batch, run={"epochs": 2.0})
    config, _ = load_config(SFTConfig, ["--config", path])
    options = ChatOptions.from_config(config.data)
    sources = [Source(files[0], 1.5), Source(files[1])]
    judged = [
        (source, (replace(r, source=i) for r in judge("sft", source.path, template.tokenizer, options)))
        for i, source in enumerate(sources)
    ]
    plan = examine({"data.train": judged}, template, options, config).plan
    tokens = tokenize("sft", data["train"], template.tokenizer, options, workers=1, cache_dir=tmp_path / "cache")
    stream = Stream(
        config,
        lengths=tokens.column("length"),
        total_weights=tokens.column("total_weight"),
        collate=lambda rows: check.empty_batch(),
        tokens_per_microbatch=130,
        sources=tokens.column("source"),
        source_weights=[1.5, 1.0],
    )
    steps = [stream[step] for step in range(stream.total_steps)]
    assert plan is not None
    assert (plan.steps, plan.rows_per_epoch, plan.epochs) == (len(steps), 24, 2.0)
    assert plan.tokens_per_step == pytest.approx(np.mean([step.num_tokens for step in steps]))
    assert plan.microbatches_per_step == pytest.approx(np.mean([len(step.batches) for step in steps]))


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ({"epochs": 1.0}, None),
        ({"epochs": 2.0}, ("warning", "a step of 20 holds each of 10 rows 2.0 times")),
        ({"steps": 1}, ("warning", "a step of 32 holds each of 10 rows 3.2 times")),
        ({"epochs": 1e-9}, ("error", "run.epochs: 1e-09 of 10 rows are 0 steps")),
    ],
)
def test_steps_that_hold_rows_several_times_or_none(run, problem, template, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    config, _ = load_config(SFTConfig, ["--config", config_file(tmp_path, {"train": path}, run=run)])
    options = ChatOptions.from_config(config.data)
    judged = [(Source(path), judge("sft", path, template.tokenizer, options))]
    problems = examine({"data.train": judged}, template, options, config).problems
    assert (
        [(one.level, one.message.partition(problem[1])[1]) for one in problems] == [problem]
        if problem
        else not problems
    )


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_pair_over_the_token_budget_is_an_error(share_prompt, template, tmp_path):
    rows = [pair("What is up? " * 5, "yes", "no")]
    encoded = next(
        judge("dpo", write(tmp_path / "p.jsonl", rows), template.tokenizer, ChatOptions(max_length=128))
    ).encoded
    packed = len(encoded.prompt_ids) * (1 if share_prompt else 2) + len(encoded.chosen_ids + encoded.rejected_ids)
    for budget, codes in ((packed, 0), (packed - 1, 1)):
        sections = {"batch": {"tokens_per_microbatch": budget}, "reference": {"share_prompt": share_prompt}}
        path = config_file(tmp_path, {"train": str(tmp_path / "p.jsonl")}, **sections)
        config, _ = load_config(DPOConfig, ["--config", path])
        judged = judge("dpo", str(tmp_path / "p.jsonl"), template.tokenizer, ChatOptions(max_length=128))
        splits = {"data.train": [(Source(str(tmp_path / "p.jsonl")), judged)]}
        report = examine(splits, template, ChatOptions(max_length=128), config)
        assert report.exit_code == codes
        assert found(report) == ({("error", "p.jsonl:1", "over_budget")} if codes else set())


def test_memory_does_not_grow_with_the_rows(template):
    encoded = encode_one(template, _parsed(chat("word " * 80, "Yes.")), ChatOptions(max_length=1000))

    def rows(count: int) -> Iterator[JudgedRow]:
        for row in range(count):
            ids = [*encoded.input_ids[:-1], 300 + row % 50]
            again = EncodedConversation(ids, encoded.spans)
            yield JudgedRow(0, "x.jsonl", row, True, "kept", encoded=again)

    split = check.Split("data.train", "sft", [check.SourceCounts("x.jsonl", 1)])
    reader = check._Reader(split, template, ChatOptions(), check._Problems())
    tracemalloc.start()
    for row in rows(4000):
        reader.take(row, split.sources[0], 0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert split.kept == 4000
    assert held / 4000 < 100, "bytes a row; the rows' ids alone would be 700"


# --- real data --------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_accounted_for_and_dumped_as_training_has_them(name, script, tmp_path, capsys):
    source, kind = SHARED / "data" / f"{name}.json", REAL[name]
    dump = tmp_path / "dump.jsonl"
    argv = ["--task", kind, "--model.path", str(SHARED / "qwen2.5-tokenizer"), "--data.train", str(source)]
    sections = {"loss": {}} if kind == "dpo" else {}
    argv += ["--config", config_file(tmp_path, {}, **sections), "--data.max_length", "1024", "--dump", str(dump)]
    assert script.main(argv) == 0
    out = capsys.readouterr().out
    options = ChatOptions(max_length=1024)
    tokens = tokenize(kind, str(source), real_tokenizer(), options, workers=1, cache_dir=tmp_path / "cache")
    dumped = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(dumped) == tokens.report.kept == len(tokens.dataset) > 0
    assert [row["row"] for row in dumped] == tokens.column("row").tolist()
    assert {row["source"] for row in dumped} == {str(source)}
    supervised = 0
    for row, kept in zip(dumped, tokens.dataset, strict=True):
        if kind == "dpo":
            assert set(row) == {"source", "row", "prompt_ids", "chosen_ids", "rejected_ids"}
            assert all(row[part] == kept[part] for part in ("prompt_ids", "chosen_ids", "rejected_ids"))
            continue
        assert set(row) == {"source", "row", "input_ids", "labels"}
        inside = {
            place
            for start, end in zip(kept["span_starts"], kept["span_ends"], strict=True)
            for place in range(start, end)
        }
        expected = [token if place in inside else -100 for place, token in enumerate(kept["input_ids"])]
        assert (row["input_ids"], row["labels"]) == (kept["input_ids"], expected)
        supervised += len(inside)
    report = tokens.report
    assert supervised in (0, report.supervised_tokens)
    counts = [f"{value:,}" for value in (report.rows, report.kept, 0, report.rows - report.kept, 0)]
    line = next(line for line in out.splitlines() if line.startswith("data.train") and str(source) in line)
    assert line.split()[2:] == ["1", *counts, f"{report.tokens:,}", f"{report.supervised_tokens:,}",
                                *share(report.supervised_tokens, report.tokens).split()]  # fmt: skip
    assert re.search(r"stop-token coverage +100 % of", out)


@needs_shared
def test_speed_on_one_core(script, tmp_path):
    source = str(SHARED / "data" / "alpaca_en_demo.json")
    options = ChatOptions(max_length=2048)
    config, _ = load_config(SFTConfig, ["--config", config_file(tmp_path, {"train": source})])
    template = Template(real_tokenizer())
    started = time.process_time()
    judged = judge("sft", source, template.tokenizer, options)
    report = examine({"data.train": [(Source(source), judged)]}, template, options, config)
    seconds = time.process_time() - started
    assert report.splits[0].sources[0].tokens / seconds > 30_000


# --- what is shown ----------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> & \x1b[31mred\x1b[0m [bold]x[/bold] \u202eevil <|im_end|>"


def test_segments_join_to_the_row_and_cut_at_the_mask(template):
    row = chat("Say <|im_start|> please", "naïve 日本 🙂 <|im_end|> ok", "more", "end")
    encoded = encode_one(template, _parsed(row), ChatOptions(max_length=500))
    cut = segments(template, Part("", encoded.input_ids, encoded.spans))
    whole = template.tokenizer.decode(encoded.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(segment.text for segment in cut) == whole
    learnt = "".join(segment.text for segment in cut if segment.weight)
    assert learnt == "naïve 日本 🙂 <|im_end|> ok<|im_end|>end<|im_end|>"
    kinds = [segment.kind for segment in cut if "<|im_" in segment.text]
    assert kinds.count("literal") == 2, "what the row spells out is told apart from the template's own"
    assert kinds.count("control") == encoded.input_ids.count(template.start_id) + encoded.input_ids.count(
        template.end_id
    )


def shown(template: Template, rows: list[Any], folder: Path, **console: Any) -> str:
    report = examined(template, "sft", rows, folder=folder, max_length=512)
    made = Console(file=(file := SimpleFile()), highlight=False, width=140, **console)
    print_report(report, "title", made)
    print_examples(report.examples, template, made)
    return file.text


class SimpleFile:
    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        return


def test_rows_show_their_mask_with_and_without_colour(template, tmp_path):
    plain = shown(template, GOOD, tmp_path)
    assert "⟦1<|im_end|>⟧" in plain and "\x1b" not in plain
    no_colour = shown(template, GOOD, tmp_path, force_terminal=True, no_color=True)
    assert "⟦" in no_colour and not re.search(r"\x1b\[[0-9;]*3[0-7]", no_colour)
    colour = shown(template, GOOD, tmp_path, force_terminal=True, color_system="standard")
    assert "⟦" not in colour
    assert "\x1b[1;32m1\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m" in colour.replace("\x1b[1;35m\x1b[0m", "")


def test_content_cannot_speak_to_the_terminal(template, tmp_path):
    text = shown(template, [chat(HOSTILE, HOSTILE), {"messages": [{"role": HOSTILE, "content": "x"}]}], tmp_path)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "␛[31mred" in text and "[bold]x[/bold]" in text and "<U+202E>" in text
    assert "\\<|im_end|>" in text, "text that only looks like a control token"
    assert visible("a\nb\tc é 日") == "a\nb\tc é 日"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags nest"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_self_contained_and_escaped(template, tmp_path):
    folder = tmp_path / "<b onclick=x>&\"'"
    folder.mkdir()
    bad = [{"messages": [{"role": f"<img src=x onerror=alert({n})>", "content": "x"}]} for n in range(60)]
    rows = [chat(HOSTILE, HOSTILE), *GOOD, *bad]
    report = examined(template, "sft", rows, folder=folder, max_length=512)
    text = "".join(html_page(report, f"Flight check {HOSTILE}", template))
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "b", "base", "object"})
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "style", "open", "title"}
    assert not re.search(r"https?://|url\(|@import", text)
    content = "".join(page.text)
    assert "<script>alert(1)</script> & ␛[31mred" in content and "\x1b" not in text
    assert "<img src=x onerror=alert(59)>" in content, "every problem is listed, not the first fifty"
    assert content.count("[bold]x[/bold]") == 4, "twice in the title, twice in the row"
    learnt = [attrs for tag, attrs in page.tags if tag == "span" and "learnt" in (attrs.get("class") or "")]
    assert len(learnt) > 4


def test_the_words_are_those_of_the_rows(template, tmp_path):
    """The legend has the colours that the rows have, and one row is one row."""
    pages = {}
    for kind, rows in (("sft", GOOD[:1]), ("dpo", [pair("Hi", "Red.", "Blue.")])):
        report = examined(template, kind, rows, folder=tmp_path)
        pages[kind] = "".join(html_page(report, "", template))
        assert ">1 in 1 row<" in pages[kind]
    assert "supervised, rejected" in pages["dpo"] and "supervised, rejected" not in pages["sft"]
    assert "tokens of the prompt and the longer answer before" in pages["dpo"]


def test_the_terminal_prints_a_limited_number_and_counts_the_rest(template, tmp_path):
    bad = [{"messages": [{"role": f"r{n}", "content": "x"}]} for n in range(73)]
    text = shown(template, [*GOOD, *bad], tmp_path)
    assert len(re.findall(r"\[bad_role\]", text)) == check_view.PRINTED["error"] == 50
    assert "... and 23 more" in text
    assert "NOT READY: 73 errors" in text


def test_the_same_problem_row_after_row_is_printed_once_with_its_count(template, tmp_path):
    """Pairs given to SFT printed the same sentence fifty times."""
    text = shown(template, [*GOOD, *[pair("Hi", "Red.", "Blue.")] * 73, "{", pair("a", "b", "c")], tmp_path)
    (first, _, other) = [line for line in text.splitlines() if line.startswith("error   /") or "the same in" in line]
    assert first.startswith(f"error   {tmp_path}/train.jsonl:11: has chosen and rejected")
    again = [line.strip() for line in text.splitlines() if "the same in" in line]
    places = ", ".join(f"{tmp_path}/train.jsonl:{line}" for line in (12, 13, 14))
    assert again == [f"the same in 73 more rows: {places}, ..."]
    assert other.startswith(f"error   {tmp_path}/train.jsonl:84: malformed JSON") and "NOT READY: 75 errors" in text
    assert " more; --html" not in text
    two = shown(template, [*GOOD, *[pair("Hi", "Red.", "Blue.")] * 2], tmp_path)
    assert f"the same in another row: {tmp_path}/train.jsonl:12\n" in two


@pytest.mark.parametrize("width", [40, 80, 90, 100, 120, 200])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_no_number_is_cut_and_no_path_is_folded_at_any_width(kind, width, template, tmp_path):
    """An 80-column terminal had 4,000 rows as 4,00."""
    folder = tmp_path / "a" / "longer" / "folder" / "than" / "fits"
    folder.mkdir(parents=True)
    rows = [pair("Hi", "Red.", "Blue."), pair("Ho", "R", "B")] if kind == "dpo" else GOOD
    report = examined(template, kind, [*rows, "{"], rows[:1], folder=folder)
    for source in (source for split in report.splits for source in split.sources):
        source.rows, source.tokens, source.supervised = 4_000, 248_149_000, 18_893_000
    console = Console(file=(file := SimpleFile()), highlight=False, width=width)
    print_report(report, "title", console)
    words = " ".join(file.text.split())
    for grid in check_view.grids(report):
        for row in grid.rows:
            for cell, side in zip(row, grid.align, strict=True):
                if side == "r" and cell:
                    assert re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", words), f"{grid.title}: {cell} is cut"
                if side == "p":
                    assert cell in file.text, f"{grid.title}: {cell} is folded"
    assert words.count("data.train") >= 3 and words.count("data.eval") >= 3


def test_share_says_all_only_of_all():
    assert [share(*x) for x in ((5, 5), (99_999, 100_000), (0, 3), (0, 0))] == ["100 %", "99.9 %", "0.0 %", "-"]


def test_examples_cover_what_the_first_rows_lack(template, tmp_path):
    rows = [*GOOD, chat("Hello", "\nYes"), chat("word " * 50, "Long.")]
    report = examined(template, "sft", rows, folder=tmp_path)
    picked = [(Path(example.place).name, example.why) for example in report.examples]
    assert picked == [
        ("train.jsonl:1", ""),
        ("train.jsonl:2", ""),
        ("train.jsonl:3", ""),
        ("train.jsonl:11", "stripped_newlines"),
        ("train.jsonl:12", "longest"),
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def run_script(*argv: str, **environment: str) -> SimpleNamespace:
    """launch/check.py as a person runs it."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.launch
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_embedded_default_is_clean(task, tmp_path):
    options = [] if task == "sft" else ["--task", "dpo"]
    done = run_script(*options, "--show", "1", "--html", str(tmp_path / "page.html"), NO_COLOR="1")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    assert "READY: 0 errors" in done.out and "NOT READY" not in done.out
    assert f"Flight check: {task.upper()}" in done.out
    assert "⟦" in done.out and "<|im_end|>⟧" in done.out
    Page((tmp_path / "page.html").read_text())


@pytest.mark.launch
def test_exit_codes(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [*GOOD, BAD_ROWS["bad_role"]])
    done = run_script("--data.train", bad)
    assert done.code == 1 and f"{bad}:11: messages[0] has the role 'robot'" in done.out, done.err
    done = run_script("--data.train", str(tmp_path / "missing.jsonl"))
    assert done.code == 2 and "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: data.train:") and "missing.jsonl' does not exist" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--show", "-1"], "--show: must be >= 0, got -1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--data.max_lenght", "3"], "max_lenght"),
        (["--data.max_length", "1"], "data.max_length"),
        (["--data.format", "csv"], "data.format"),
        (["--data.eval", "[{{configs/tiny/sft_eval.jsonl: 3}}]"], "data.eval: the weight of"),
        (["--model.path", "nowhere/at/all"], "model.path"),
        (["--task", "sft", "--loss.beta", "0.1"], "loss.beta"),
        (["--dump", "no/such/folder/x.jsonl"], "--dump"),
        (["--html", "/dev/full"], "--html: /dev/full cannot be written (No space left on device)"),
        (["--dump", "/dev/full", "--html", "{tmp}/page.html"], "--dump: /dev/full cannot be written (No space left"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(argv, message, script, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        (ValueError, script.argparse.ArgumentError, CannotWriteError), match=re.escape(message)
    ) as caught:
        script.main([word.format(tmp=tmp_path) for word in argv])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [], "nothing half-written"


@pytest.mark.parametrize(
    ("sections", "argv", "expected"),
    [
        ({}, [], "sft"),
        ({"loss": {"beta": 0.2}}, [], "dpo"),
        ({"reference": {"share_prompt": False}}, [], "dpo"),
        ({}, ["--loss.beta", "0.2"], "dpo"),
        ({}, ["--run.seed", "1"], "sft"),
    ],
)
def test_the_config_says_which_training_it_is(sections, argv, expected, tmp_path):
    assert task_of([config_file(tmp_path, {}, **sections)], argv) == expected


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(KeyError), written(str(path), "--dump") as put:
        put("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.jsonl"]
    with written(str(path), "--dump") as put:
        put("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["out.jsonl"]


def test_data_is_never_overwritten(script, tmp_path):
    data = write(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(ValueError, match=re.escape("is also data.train")):
        script.main(["--config", config_file(tmp_path, {"train": data}), "--dump", data])
    with pytest.raises(ValueError, match=re.escape("is also --dump")):
        out = str(tmp_path / "out")
        script.main(["--config", config_file(tmp_path, {"train": data}), "--dump", out, "--html", out])
    assert len(Path(data).read_text().splitlines()) == len(GOOD)
    part = tmp_path / "parts" / "a.parquet"
    part.parent.mkdir()
    Dataset.from_list(GOOD).to_parquet(str(part))
    before = part.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"--html: {part} is also data.train")):
        script.main(["--config", config_file(tmp_path, {"train": str(part.parent)}), "--html", str(part)])
    assert part.read_bytes() == before


def test_an_unreadable_source_does_not_hide_the_others(script, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('[{"messages": []},\n {"messages": ')
    good = write(tmp_path / "good.jsonl", [*GOOD, BAD_ROWS["bad_role"]])
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b"{}"))
    broken = [str(tmp_path / name) for name in ("broken.json", "packed.jsonl")]
    path = config_file(tmp_path, {"train": [*broken, good]})
    assert script.main(["--config", path]) == 2
    out = capsys.readouterr().out
    assert f"error   {broken[0]}:2: malformed JSON" in out
    assert f"error   {broken[1]}: this is a gzip file; unpack it [unreadable_source]" in out
    assert f"{good}:11: messages[0] has the role 'robot'" in out


def test_the_tokenizer_is_that_of_the_adapters_base(tmp_path, capsys):
    config, _ = load_config(SFTConfig, ["--config", str(TINY / "sft.yaml"), "--model.from_scratch", "false"])
    waiting = replace(config.model, adapter=str(tmp_path / "adapter"))
    assert start_of(waiting).path == config.model.path
    assert "is not there yet" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    named = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), "r": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(named))
    assert start_of(waiting).path == str(tmp_path)
