"""Valid rows of every format, and random ways to spoil one: types, nesting, text, numbers, keys, the JSON itself."""

import copy
import json
import re
from random import Random
from typing import Any

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
TEXTS = [
    "", " ", "\n", "\r\n\r\n x", "\u2028\n", "\x00", "\x1b[31m", "a" * 3000, "\ud800", "\udfff tail", "\ufeff",
    "\u200b", "é", "e\u0301", "\u0338", "🙂", "👨‍👩‍👧", "日本語", "\u202eabc", "\uffff", "\ue000", "\uf8ff\ue001",
    "{{ 7 * 7 }}", "{% raw %}", "<|im_start|>assistant\nyes<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\u0338", "<|im_", "start|>", "<|fim_prefix|>", "</think>", "<tool_response>", "\nassistant\n",
    "assistant", "system", "null", "NaN", "1e999", '{"name": "f", "arguments": {}}', '{"name": "f"', "[" * 30,
    "\\", '"', "'", "%s%n", "../../etc/passwd", "A\u030a" * 50,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, 1e-300, 1e308, -0.0, 10**18, -(10**30), 10**400, 2**63, 3.141592653589793]
KEYS = [
    "role", "content", "messages", "tools", "tool_calls", "function", "name", "arguments", "weight", "train",
    "system", "from", "value", "chosen", "rejected", "prompt", "reasoning_content", "thinking", "history",
    "input", "type", "text", "", "__class__", "<|im_end|>", "\ud800", "0",
]  # fmt: skip


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {
    "type": "function",
    "function": {"name": "get", "arguments": {"city": "Oslo", "days": [1, 2], "deep": {"a": None}}},
}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}]
SFT_ROWS: list[dict[str, Any]] = [
    {"messages": [say("user", "What is 1 + 1?"), say("assistant", "2")]},
    {
        "messages": [
            say("system", "Be short."), say("user", "Hi"), say("assistant", "Red.", train=False), say("user", "And?"),
            say("assistant", "\n\nGreen.", weight=0.5), say("user", "So?"), say("assistant", "Blue."),
        ]
    },
    {
        "messages": [
            say("user", "Weather?"), say("assistant", "", tool_calls=[CALL, CALL]), say("tool", '{"t": 3}'),
            say("tool", "cold"), say("assistant", "3 degrees.", reasoning_content="It says 3."),
        ],
        "tools": TOOLS,
    },
    {"messages": [say("user", [{"type": "text", "text": "parts"}]), say("assistant", "yes", reasoning_content="hm")]},
    {"prompt": "Say ten.", "completion": "ten", "system": "Count."},
    {"prompt": [say("user", "Say"), say("assistant", "?"), say("user", "ten")], "completion": [say("assistant", "10")]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"], ["Who?", "Me"]]},
    {
        "conversations": [
            {"from": "human", "value": "Now?"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Cold."},
        ],
        "tools": json.dumps(TOOLS),
        "system": "Be kind.",
    },
]  # fmt: skip
DPO_ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi", "chosen": "Hello there.", "rejected": "What?"},
    {
        "prompt": [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Yes?"), say("user", "Bye")],
        "chosen": [say("assistant", "Good bye!")],
        "rejected": [say("assistant", "Go.")],
        "tools": TOOLS,
    },
    {"chosen": [say("user", "1?"), say("assistant", "2")], "rejected": [say("user", "1?"), say("assistant", "3")]},
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    {
        "prompt": [say("user", "Weather?"), say("assistant", "", tool_calls=[CALL]), say("tool", "3")],
        "chosen": [say("assistant", "Three.", reasoning_content="3")],
        "rejected": [say("assistant", "", tool_calls=[CALL])],
    },
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value of a tree, itself included."""
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*path, index))
    return found


def junk(dice: Random, depth: int = 2) -> Any:
    """A random JSON value."""
    kind = dice.randrange(9 if depth else 6)
    if kind == 0:
        return dice.choice([None, True, False])
    if kind == 1:
        return dice.choice(NUMBERS)
    if kind < 4:
        return dice.choice(TEXTS)
    if kind == 4:
        return "".join(dice.choice([*CONTROL, *TEXTS[:12], "word "]) for _ in range(dice.randrange(4)))
    if kind == 5:
        return dice.choice([[], {}, [[]], [{}], {"": {}}])
    if kind == 6:
        return [junk(dice, depth - 1) for _ in range(dice.randrange(3))]
    if kind == 7:
        return {dice.choice(KEYS): junk(dice, depth - 1) for _ in range(dice.randrange(3))}
    return f"@{dice.choice('[{')}{dice.choice([20, 90, 200, 330, 600, 990])}@"  # see `mutated_text`


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    _at(tree, path[:-1])[path[-1]] = value
    return tree


def mutate(row: Any, dice: Random) -> Any:
    """One random change somewhere in a row."""
    row = copy.deepcopy(row)
    path = dice.choice(places(row))
    texts = [place for place in places(row) if isinstance(_at(row, place), str)]
    if texts and dice.random() < 0.4:  # the row stays a row: the mask is what is at stake
        path = dice.choice(texts)
        text = _at(row, path)
        cut = dice.randrange(len(text) + 1)
        return replaced(row, path, text[:cut] + dice.choice([*TEXTS, *CONTROL]) + text[cut:])
    target = _at(row, path)
    change = dice.randrange(8)
    if change <= 1:
        return replaced(row, path, junk(dice))
    if change == 3 and path:
        del _at(row, path[:-1])[path[-1]]
        return row
    if change == 4 and isinstance(target, dict):
        target[dice.choice(KEYS)] = junk(dice)
        return row
    if change == 5 and isinstance(target, list):
        target.insert(dice.randrange(len(target) + 1), copy.deepcopy(dice.choice([*target, junk(dice)])))
        return row
    if change == 6 and isinstance(target, list):
        dice.shuffle(target)
        return row
    if change == 7:
        return replaced(row, path, dice.choice([[target], {"content": target}, str(target), json.dumps(target)]))
    return replaced(row, path, junk(dice))


def nested(opening: str, depth: int) -> str:
    left, right = {"[": ("[", "]"), "{": ('{"a": ', "}")}[opening]
    return left * depth + '"deep"' + right * depth


def mutated_text(row: Any, dice: Random) -> str:
    """The row as one line of a file, sometimes with the JSON itself spoilt."""
    text = json.dumps(row, ensure_ascii=dice.random() < 0.7)
    text = re.sub(r'"@([\[{])(\d+)@"', lambda match: nested(match[1], int(match[2])), text)
    change = dice.randrange(40)
    if change == 0:
        return text[: dice.randrange(len(text) + 1)]
    if change == 1:
        return text.replace(
            dice.choice('{}[]":,'), dice.choice(["", "{", "\x00", "NaN", "-Infinity", "1e999", "//"]), 1
        )
    if change == 2:
        return dice.choice(["[", '{"a":']) * dice.choice([50, 1000, 100_000])
    if change == 3:
        return text.replace("1", dice.choice(["9" * 5000, "1e400", "-", "0x1", "1_0", "01"]))
    if change == 4:
        return dice.choice(["null", "3", '"text"', "[]", "{}", "\ufeff{}", "{} {}", '{"messages": 1, "messages": []}'])
    return text
