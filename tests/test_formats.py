"""Rows of every format become one form; what is wrong with a row is said with a reason and its place."""

import json
from typing import Any

import pytest

from qwen_train.data import formats
from qwen_train.data.formats import Conversation, Preference, RowError, parse_row

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": {}}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3"}
SYSTEM = {"role": "system", "content": "S"}
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
ARGUMENTS = '{"x": null, "y": {}}'
TWO_CALLS = [{"name": "f"}, {"name": "g", "arguments": '{"a": 1}'}]


def sft(row: Any, format: str = "auto") -> Conversation:
    parsed = parse_row(json.dumps(row), "sft", format)
    assert isinstance(parsed, Conversation)
    return parsed


def dpo(row: Any, format: str = "auto") -> Preference:
    parsed = parse_row(json.dumps(row), "dpo", format)
    assert isinstance(parsed, Preference)
    return parsed


def sharegpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": tag, "value": value} for tag, value in turns]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [U, A], "system": "S"}, [SYSTEM, U, A]),
        ({"messages": [{**SYSTEM, "role": "developer"}, U, A]}, [SYSTEM, U, A]),
        ({"messages": [U, {"role": "assistant", "content": PARTS}]}, [U, A]),
        ({"messages": [U, U, A, A]}, [U, U, A, A]),
        ({"messages": [U, {**A, "train": False}]}, [U, {**A, "weight": 0.0}]),
        ({"messages": [U, {**A, "train": True, "weight": 0.5}]}, [U, {**A, "weight": 0.5}]),
        ({"messages": [U, {**A, "train": False, "weight": 0.5}]}, [U, {**A, "weight": 0.0}]),
        ({"messages": [U, {**A, "thinking": "hm"}]}, [U, {**A, "reasoning_content": "hm"}]),
        ({"messages": [U, {**A, "reasoning_content": " ", "thinking": "hm"}]}, [U, {**A, "reasoning_content": "hm"}]),
        ({"messages": [U, {**A, "reasoning": "", "thinking": "\n"}]}, [U, A]),
        ({"messages": [U, {**A, "weight": 1e-30}]}, [U, {**A, "weight": 1e-30}]),
        ({"messages": [U, {**A, "function_call": None}]}, [U, A]),
        ({"messages": [U, {**CALLING, "content": None}, RESULT, RESULT, A]}, [U, CALLING, RESULT, RESULT, A]),
        ({"messages": [U, {**CALLING, "tool_calls": [{"name": "f", "arguments": ARGUMENTS}]}]}, [U, CALLING]),
        ({"prompt": "Hi", "completion": "Hello."}, [U, A]),
        ({"prompt": [U, A, U], "completion": [A]}, [U, {**A, "weight": 0.0}, U, A]),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, [U, A]),
        ({"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["Hi", "Hello."]]},
         [SYSTEM, U, A, {"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"conversations": sharegpt(("human", "Hi"), ("gpt", "Hello."))}, [U, A]),
        ({"conversations": sharegpt(("human", "Hi"), ("chatgpt", "Hello."), ("bing", "Hello."), ("bard", "Hello."))},
         [U, A, A, A]),
        ({"conversations": sharegpt(("system", "S"), ("human", "Hi"), ("function_call", json.dumps(CALL["function"])),
                                    ("observation", "3"), ("gpt", "Hello."))},
         [SYSTEM, U, CALLING, RESULT, A]),
        ({"conversations": sharegpt(("human", "Hi"), ("function_call", json.dumps(TWO_CALLS)))},
         [U, {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "f", "arguments": {}}},
             {"type": "function", "function": {"name": "g", "arguments": {"a": 1}}}]}]),
    ],
)  # fmt: skip
def test_sft_rows(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert sft(row).messages == messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "No."}]},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"prompt": "Hi", "chosen": A, "rejected": {**A, "content": "No."}},
        {"chosen": [U, A], "rejected": [U, {**A, "content": "No."}]},
        {"prompt": "Hi", "chosen": [U, A], "rejected": [U, {**A, "content": "No."}], "score": 1},
        {"prompt": [U], "chosen": [U, A], "rejected": [U, {**A, "content": "No."}]},
        {
            "conversations": sharegpt(("human", "Hi")),
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"conversations": sharegpt(("human", "Hi")), "chosen": "Hello.", "rejected": "No."},
    ],
)
def test_dpo_rows_of_all_shapes_are_one(row: dict[str, Any]) -> None:
    assert dpo(row) == Preference([U], [A], [{**A, "content": "No."}])
    assert dpo({**row, "tools": '[{"name": "f"}]'}).tools == [{"name": "f"}]


def test_system_field_of_a_pair() -> None:
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "system": "S"}
    assert dpo(row).prompt == [{"role": "system", "content": "S"}, U]


def test_tools_as_text_and_as_nothing() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    for given in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        assert sft({"messages": [U, A], "tools": given}).tools == tools
    for given in (None, [], "", "[]"):
        assert sft({"messages": [U, A], "tools": given}).tools is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "empty_messages"),
        ({"messages": "Hi"}, "bad_messages"),
        ({"messages": [U, "Hello."]}, "bad_messages"),
        ({"messages": [U, {"role": "bot", "content": "x"}]}, "bad_role"),
        ({"messages": [U, {"role": "assistant"}]}, "no_content"),
        ({"messages": [U, {"role": "assistant", "content": 3}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, A]}, "bad_content"),
        ({"messages": [U, {"role": "assistant", "content": " \n"}]}, "empty_answer"),
        ({"messages": [{"role": "user", "content": ""}, A]}, "empty_message"),
        ({"messages": [U, {**A, "weight": -1}]}, "bad_weight"),
        ({"messages": [U, {**A, "weight": True}]}, "bad_weight"),
        ({"messages": [U, {**A, "weight": 1e-50}]}, "bad_weight"),
        ({"messages": [U, {**A, "weight": 1e39}]}, "bad_weight"),
        ({"messages": [U, {**A, "weight": 10**400}]}, "bad_weight"),
        ({"messages": [U, {**A, "train": 1}]}, "bad_weight"),
        ({"messages": [U, {**A, "reasoning_content": 3}]}, "bad_content"),
        ({"messages": [U, {"role": "system", "content": "S"}, A]}, "bad_order"),
        ({"messages": [A, U, A]}, "bad_order"),
        ({"messages": [{"role": "system", "content": "S"}, A]}, "bad_order"),
        ({"messages": [{"role": "system", "content": "S"}]}, "bad_order"),
        ({"messages": [U, RESULT, A]}, "bad_order"),
        ({"messages": [U, A, RESULT, A]}, "bad_order"),
        ({"messages": [U, CALLING, U, RESULT, A]}, "bad_order"),
        ({"messages": [SYSTEM, U, A], "system": "T"}, "bad_order"),
        ({"messages": [U, U]}, "no_assistant"),
        ({"messages": [{**U, "tool_calls": [CALL]}, A]}, "bad_tool_call"),
        ({"messages": [U, {**A, "tool_calls": "f()"}]}, "bad_tool_call"),
        ({"messages": [U, {**A, "function_call": {"name": "f", "arguments": "{}"}}]}, "bad_tool_call"),
        ({"messages": [U, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "bad_tool_call"),
        ({"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": '{"x": 1e400}'}]}]}, "bad_tool_call"),
        ({"messages": [U, {**A, "tool_calls": [{"arguments": {}}]}]}, "bad_tool_call"),
        ({"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "bad_tool_call"),
        ({"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "bad_tool_call"),
        ({"messages": [U, A], "tools": "{"}, "bad_tools"),
        ({"messages": [U, A], "tools": {"name": "f"}}, "bad_tools"),
        ({"messages": [U, A], "tools": [3]}, "bad_tools"),
        ({"conversations": sharegpt(("human", "Hi"), ("narrator", "x"))}, "bad_role"),
        ({"conversations": sharegpt(("human", "Hi"), ("function_call", "f(1)"))}, "bad_tool_call"),
        ({"conversations": sharegpt(("human", "Hi"), ("gpt", None))}, "no_content"),
        ({"instruction": "Hi", "output": ""}, "empty_answer"),
        ({"instruction": "", "input": " ", "output": "x"}, "empty_message"),
        ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "bad_messages"),
        ({"text": "Hi"}, "unknown_format"),
        ([1], "bad_json"),
    ],
)
def test_bad_sft_rows(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        sft(row)
    assert caught.value.reason == reason and not caught.value.drop
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "", "rejected": "No."}, "empty_answer"),
        ({"prompt": "Hi", "chosen": [], "rejected": "No."}, "empty_messages"),
        ({"prompt": [U], "chosen": [A, U, A], "rejected": [A]}, "bad_answer"),
        ({"prompt": [U, A], "chosen": [A], "rejected": [A]}, "bad_order"),
        ({"prompt": [A], "chosen": [A], "rejected": [A]}, "bad_order"),
        ({"prompt": "Hi", "chosen": [{**A, "weight": 2}], "rejected": [A]}, "bad_weight"),
        ({"chosen": [U, A], "rejected": [{**U, "content": "Ho"}, A]}, "prompt_mismatch"),
        ({"chosen": [U, A, U, A], "rejected": [U, A]}, "prompt_mismatch"),
        ({"prompt": "Other", "chosen": [U, A], "rejected": [U, A]}, "prompt_mismatch"),
        ({"chosen": [U, A], "rejected": [U]}, "bad_answer"),
        ({"chosen": [A], "rejected": [A]}, "no_prompt"),
        ({"prompt": "Hi", "completion": "Hello."}, "unknown_format"),
    ],
)
def test_bad_dpo_rows(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        dpo(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["auto", "preference"])
@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"system": "S", "question": "Hi", "chosen": "Hello.", "rejected": "No."},
            "rename the one of these unread keys that holds it: question",
        ),
        (
            {"instruction": "Hi", "input": "x", "chosen": A, "rejected": A},
            "rename the one of these unread keys that holds it: instruction, input",
        ),
        ({"chosen": [A], "rejected": [A]}, "add one"),
    ],
)
def test_answers_to_nothing_name_the_keys_that_may_hold_the_prompt(row: Any, remedy: str, format: str) -> None:
    with pytest.raises(RowError) as caught:
        dpo(row, format)
    assert caught.value.reason == "no_prompt"
    assert str(caught.value) == f"chosen is an answer alone and the row has no prompt; {remedy}"


def test_a_named_format_takes_whole_conversations_without_a_prompt() -> None:
    """The keys of `preference` hold a prompt, so `auto` never sees such a row there; a format that is named does."""
    row = {"chosen": [U, A], "rejected": [U, {**A, "content": "No."}]}
    assert parse_row(json.dumps(row), "dpo", "preference") == dpo(row)
    with pytest.raises(RowError) as caught:
        parse_row(json.dumps({**row, "prompt": "Other"}), "dpo", "preference")
    assert caught.value.reason == "prompt_mismatch"


PAIR = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": sharegpt(("human", "Hi"), ("gpt", "Hello."), ("human", "2 + 2?")), **PAIR},
        {"messages": [U, A], "chosen": [A], "rejected": [A]},
        {"prompt": "Hi", "completion": "Ho", "chosen": "Hello.", "rejected": "No."},
        {"chosen": [U, A], "rejected": [U, A]},
    ],
)
def test_pairs_are_no_conversations(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=r"these are preference pairs, for launch/dpo\.py .*--task dpo") as caught:
        sft(row)
    assert caught.value.reason == "preference_pair"


def test_a_named_format_takes_a_pair_as_a_conversation() -> None:
    row = {"conversations": sharegpt(("human", "Hi"), ("gpt", "Hello.")), **PAIR}
    parsed = parse_row(json.dumps(row), "sft", "sharegpt")
    assert isinstance(parsed, Conversation) and [m["role"] for m in parsed.messages] == ["user", "assistant"]
    del row["rejected"]
    assert isinstance(sft(row), Conversation), "half a pair is a row with a column more"


def test_unknown_format_names_keys_and_formats() -> None:
    with pytest.raises(
        RowError, match=r"the keys question, text; rename them to those of one: messages \(messages\), sharegpt"
    ):
        sft({"text": "x", "question": "y"})
    with pytest.raises(
        RowError, match=r"^no dpo format fits the keys label, prompt; rename them to those of one: prefer"
    ):
        dpo({"prompt": "x", "label": True})
    with pytest.raises(ValueError, match=r"data\.format: 'preference' is not a format of sft rows"):
        formats.check_format("preference", "sft")


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"instruction": "x", "input": "", "output": None}, "output"),
        ({"prompt": None, "completion": None}, "prompt and completion"),
        ({"messages": None, "text": "x"}, "messages"),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "rejected"),
    ],
)
def test_a_row_whose_key_is_null_is_told_so(row: dict[str, Any], keys: str) -> None:
    """It was told that no format fits the very keys of one."""
    with pytest.raises(RowError, match=f"^{keys} of the row is null; fill it in, or leave the row out$"):
        (dpo if "chosen" in row else sft)(row)
    assert isinstance(sft({"messages": [U, A], **dict.fromkeys(row)} | {"messages": [U, A]}), Conversation)


@pytest.mark.parametrize("key", ["data", "train"])
@pytest.mark.parametrize("many", [True, False])
def test_rows_within_a_row_are_named_by_their_key(key: str, many: bool) -> None:
    rows = {"messages": [U, A]}, {"prompt": "x", "chosen": "y", "rejected": "z"}
    for read, row in zip((sft, dpo), rows, strict=True):
        with pytest.raises(RowError, match=f"^the rows lie within the key '{key}'; save that list alone as the file$"):
            read({"version": [1], "meta": {}, "empty": [], key: [row, row] if many else row})


@pytest.mark.parametrize("key", ["content", "role"])
def test_a_key_given_twice_is_refused_by_name(key: str) -> None:
    """`json` takes the last of the two; one of them was trained without a word."""
    text = json.dumps({"messages": [U, A], "tools": [{"name": "f"}]})
    parse_row(text, "sft")
    value = json.dumps(A[key])
    twice = text.replace(f'"{key}": {value}', f'"{key}": {value}, "{key}": {value}')
    assert twice != text
    with pytest.raises(RowError, match=f"^malformed JSON: the key '{key}' is given twice in one object$"):
        parse_row(twice, "sft")
    call = {**A, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}
    with pytest.raises(RowError, match=r"arguments is not JSON: .* the key 'x' is given twice in one object$"):
        sft({"messages": [U, call]})


@pytest.mark.parametrize("text", ["prompt,completion", "// x", "-", "", "nothing"])
def test_what_is_no_json_at_all_is_told_alike(text: str) -> None:
    """A table named .jsonl gave another message of the JSON reader in each line."""
    with pytest.raises(RowError, match=r"^not JSON: a row is an object, which begins with \{$"):
        parse_row(text, "sft")


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', '{"a": 1e400}', '{"a": -1e400}', "", '{"a": 1} x', "[" * 100_000])
def test_malformed_json(text: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(text, "sft")
    assert caught.value.reason == "bad_json" and len(str(caught.value)) < 300
