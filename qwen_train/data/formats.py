"""One row of JSON -> `Conversation` (SFT) or `Preference` (DPO), or a `RowError` with a reason.

What a caller uses:
- `parse_row(text, kind, format)`: one JSON text -> `Conversation` or `Preference`, or a `RowError`;
- `FORMATS`: the table a new format is added to: a function `row -> Conversation | Preference` and its line here.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qwen_train.config import Kind

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
ROW_KEYS = ("system", "tools")
"""Read in a row of any format."""
MESSAGE_KEYS = {
    *("role", "content", "from", "value", "tool_calls", "function_call", "name", "tool_call_id", "weight", "train"),
    *REASONING_KEYS,
}
MISSPELT = 0.8  # difflib's ratio of names: wieght and weight have 0.83
MAX_MESSAGE = 600  # characters of an error about a row
MAX_DEPTH = 100  # levels of lists and objects in a row
LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30  # sums over a step of weights between these stay within fp32's range


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error of another library with its type, at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


class RowError(ValueError):
    """One row cannot be used: `reason` is a short key to count by, `drop` says it is left out rather than an error.

    `length`: tokens of a row that is too long.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        drop: bool = False,
        notes: dict[str, int] | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(_printable(message))
        self.reason = reason
        self.drop = drop
        self.notes = notes or {}
        self.length = length


def _printable(message: str) -> str:
    """One line of reasonable length that any terminal can print: values of a row may be anything."""
    line = " ".join(message.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"


@dataclass(frozen=True)
class Conversation:
    """One SFT row. A message: role, content (str), and where given tool_calls, reasoning_content, name, weight."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the row that nothing reads, those of messages as `messages[].key`."""


@dataclass(frozen=True)
class Preference:
    """One DPO row: a prompt that ends in a user or tool message, and two answers to it; `unread` as above."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = field(default=(), compare=False)


# --- one row ----------------------------------------------------------------------------------------------------------


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def finite_float(text: str) -> float:
    """A number of JSON; ValueError for 1e400 and its like, which would become an infinity that JSON cannot write."""
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text} is beyond the range of a float")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key given twice, of which `json` would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return found


DECODER = json.JSONDecoder(
    parse_constant=refuse_constant, parse_float=finite_float, object_pairs_hook=unique_keys
)  # made once: json.loads makes one a call when it is given any of these


def _loads(text: str) -> Any:
    """JSON as the standard has it, its numbers finite, each key given once, and at most MAX_DEPTH deep.

    What renders and counts values later recurses. Raises ValueError with the problem in one line.
    """
    try:
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            level = [value]
            for _ in range(MAX_DEPTH):
                level = [child for item in level for child in _children(item)]
            if level:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {one_line(error).partition(': ')[2]}") from None
    return value


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_json(text: str) -> bool:
    """Whether the text has JSON's form, be it a row that can be used or not."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_row(text: str, kind: Kind, format: str = "auto") -> Conversation | Preference:
    """One JSON text -> `Conversation` (kind "sft") or `Preference` (kind "dpo"), or RowError."""
    try:
        row = _loads(text)
    except ValueError as error:
        if text.lstrip()[:1] not in tuple('{["'):  # a table, a log: what a JSON reader says of each line differs
            raise RowError("bad_json", "not JSON: a row is an object, which begins with {") from None
        raise RowError("bad_json", str(error)) from None
    if not isinstance(row, dict):
        raise RowError("bad_json", f"a row must be a JSON object, got {type(row).__name__}")
    name = detect_format(row, kind) if format == "auto" else format
    return replace(FORMATS[name].parse(row), unread=tuple(dict.fromkeys(_unread(row, FORMATS[name]))))


def _unread(row: dict[str, Any], format: "Format") -> Iterator[str]:
    """Keys that a row of this format, or its messages, hold beside those that are read; null counts as absent."""
    for key, value in row.items():
        if value is None:
            continue
        if key not in (*format.keys, *format.others, *ROW_KEYS):
            yield key
            continue
        messages = value if isinstance(value, list) else [value]
        for message in messages if key in format.keys else []:
            named = message.items() if isinstance(message, dict) else ()
            yield from (f"{key}[].{name}" for name, item in named if item is not None and name not in MESSAGE_KEYS)


def detect_format(row: dict[str, Any], kind: Kind) -> str:
    """The first format of this kind whose keys the row has; the table's order decides. Pairs are no conversations."""
    if kind == "sft" and row.get("chosen") is not None and row.get("rejected") is not None:
        raise RowError(
            "preference_pair",
            "has chosen and rejected: these are preference pairs, for launch/dpo.py (launch/check.py --task dpo); "
            "to learn the row as a conversation name data.format",
        )
    if (name := _fitting(row, kind)) is None:
        raise _unknown_format(row, kind)
    return name


def _fitting(row: dict[str, Any], kind: Kind) -> str | None:
    fitting = (
        name for name, f in FORMATS.items() if f.kind == kind and all(row.get(key) is not None for key in f.keys)
    )
    return next(fitting, None)


def _unknown_format(row: dict[str, Any], kind: Kind) -> RowError:
    """What to say of a row that no format fits: what of it is null, where the rows lie, or what keys they need."""
    known = {name: format.keys for name, format in FORMATS.items() if format.kind == kind}
    for keys in known.values():
        if row.keys() >= {*keys}:
            nulls = " and ".join(key for key in keys if row[key] is None)
            return RowError("no_content", f"{nulls} of the row is null; fill it in, or leave the row out")
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and _fitting(first, kind):
            return RowError("unknown_format", f"the rows lie within the key {key!r}; save that list alone as the file")
    names = ", ".join(f"{name} ({' + '.join(keys)})" for name, keys in known.items())
    found = ", ".join(sorted(map(str, row))) or "none"
    return RowError("unknown_format", f"no {kind} format fits the keys {found}; rename them to those of one: {names}")


def check_format(format: str, kind: Kind) -> None:
    """ValueError unless `format` is "auto" or a format of this kind."""
    known = [name for name, entry in FORMATS.items() if entry.kind == kind]
    if format != "auto" and format not in known:
        raise ValueError(
            f"data.format: {format!r} is not a format of {kind} rows; use auto or one of {', '.join(known)}"
        )


# --- messages ---------------------------------------------------------------------------------------------------------


def _message(value: Any, name: str) -> Message:
    """A message with role, content, tool calls and weight validated and brought to one form."""
    if not isinstance(value, dict):
        raise RowError("bad_messages", f"{name} must be an object with role and content, got {type(value).__name__}")
    role = value.get("role")
    role = "system" if role == "developer" else role  # OpenAI's later name for it
    if role not in ROLES:
        raise RowError("bad_role", f"{name} has the role {role!r}; known roles: {', '.join(ROLES)}")
    message: Message = {"role": role}
    if value.get("function_call"):
        raise RowError("bad_tool_call", f"{name}.function_call is the old form of a call; write it as tool_calls")
    tool_calls = value.get("tool_calls")
    if tool_calls:
        if role != "assistant":
            raise RowError("bad_tool_call", f"{name} ({role}) has tool_calls; only an assistant calls tools")
        message["tool_calls"] = _tool_calls(tool_calls, f"{name}.tool_calls")
    message["content"] = _content(value, name, optional=bool(tool_calls))
    for key in REASONING_KEYS:
        if (reasoning := value.get(key)) is not None and role == "assistant":
            if not isinstance(reasoning, str):
                raise RowError("bad_content", f"{name}.{key} must be text, got {type(reasoning).__name__}")
            if reasoning.strip():
                message["reasoning_content"] = reasoning
                break
    for key in ("name", "tool_call_id"):
        if value.get(key) is not None:
            if not isinstance(value[key], str):
                raise RowError("bad_messages", f"{name}.{key} must be text, got {type(value[key]).__name__}")
            message[key] = value[key]
    if not message["content"].strip() and not tool_calls:
        if role == "assistant":
            raise RowError("empty_answer", f"{name} is an assistant message without text or tool calls")
        if role == "user":
            raise RowError("empty_message", f"{name} is a user message without text")
    if (weight := _weight(value, name)) is not None:
        message["weight"] = weight
    return message


def _messages(value: Any, name: str, parse: Callable[[Any, str], Message] = _message) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("bad_messages", f"{name} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise RowError("empty_messages", f"{name} is empty")
    return [parse(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _content(message: dict[str, Any], name: str, optional: bool) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if content is None:
        raise RowError("no_content", f"{name} ({message['role']}) has no content")
    if not isinstance(content, list):
        raise RowError("bad_content", f"{name}.content must be text, got {type(content).__name__}")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError("bad_content", f"{name}.content holds a part of type {kind!r}; only text is trained")
        texts.append(part["text"])
    return "".join(texts)


def _weight(message: dict[str, Any], name: str) -> float | None:
    """`train: false` is weight 0; `weight` is 0 or a number that fp32 holds; None where the message says neither."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("bad_weight", f"{name}.train must be true or false, got {train!r}")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise RowError("bad_weight", f"{name}.weight must be a finite number >= 0, got {weight!r}")
        if weight and not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            limits = f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
            raise RowError("bad_weight", f"{name}.weight must be 0 or {limits}, as fp32 needs it, got {weight!r}")
        return 0.0 if train is False else float(weight)
    return None if train is None else float(train)


def _tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Calls as `{"type": "function", "function": {"name", "arguments": object}}`, arguments parsed from JSON text."""
    if not isinstance(value, list):
        raise RowError("bad_tool_call", f"{name} must be a list, got {type(value).__name__}")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError("bad_tool_call", f"{name}[{index}] must be an object with a name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json_value(arguments or "{}", f"{name}[{index}].arguments", "bad_tool_call")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            got = type(arguments).__name__
            raise RowError("bad_tool_call", f"{name}[{index}].arguments must be a JSON object, got {got}")
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _json_value(text: str, name: str, reason: str) -> Any:
    try:
        return _loads(text)
    except ValueError as error:
        raise RowError(reason, f"{name} is not JSON: {error}") from None


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json_value(tools, "tools", "bad_tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("bad_tools", f"tools must be a list of objects (or its JSON text), got {type(tools).__name__}")
    parsed = [_json_value(t, f"tools[{i}]", "bad_tools") if isinstance(t, str) else t for i, t in enumerate(tools)]
    for index, tool in enumerate(parsed):
        if not isinstance(tool, dict) or not tool:
            raise RowError("bad_tools", f"tools[{index}] must be an object with the tool's schema")
    return parsed


def _check_order(messages: list[Message]) -> None:
    """System only first, then a user; a tool result follows an assistant's call. Runs of one role are legal."""
    body = messages[1:] if messages[0]["role"] == "system" else messages
    if any(message["role"] == "system" for message in body):
        raise RowError("bad_order", "a system message stands after the first place; join it to the first message")
    if not body or body[0]["role"] != "user":
        first = body[0]["role"] if body else "nothing"
        raise RowError("bad_order", f"the first message after the system prompt must be a user's, got {first}")
    called = False
    for index, message in enumerate(messages):
        if message["role"] == "tool" and not called:
            raise RowError(
                "bad_order",
                f"message {index} is a tool result that follows no assistant tool call; write calls as tool_calls",
            )
        called = bool(message.get("tool_calls")) or (called and message["role"] == "tool")


def _conversation(messages: list[Message], row: dict[str, Any]) -> Conversation:
    messages = _with_system(messages, row)
    _check_order(messages)
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no_assistant", "the conversation holds no assistant message, so there is nothing to learn")
    return Conversation(messages, _tools(row))


def _preference(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], row: dict[str, Any]
) -> Preference:
    prompt = _with_system(prompt, row)
    _check_order(prompt)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("bad_order", f"the prompt must end with a user or tool message, got {prompt[-1]['role']}")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in answer]
        if roles != ["assistant"]:
            shown = ", ".join(roles) or "nothing"
            raise RowError("bad_answer", f"{name} must be exactly one assistant message after the prompt, got {shown}")
        if answer[0].get("weight", 1.0) != 1.0:
            raise RowError("bad_weight", f"{name} carries train or weight; answers of a pair are weighed alike")
    return Preference(prompt, chosen, rejected, _tools(row))


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise RowError("bad_content", f"system must be text, got {type(system).__name__}")
    if messages and messages[0]["role"] == "system":
        raise RowError("bad_order", "the row has a system field and a system message; keep one")
    return [{"role": "system", "content": system}, *messages]


def _text_or_messages(value: Any, name: str, role: str) -> list[Message]:
    if not isinstance(value, str | list):
        raise RowError("bad_messages", f"{name} must be text or a list of messages, got {type(value).__name__}")
    return [_message({"role": role, "content": value}, name)] if isinstance(value, str) else _messages(value, name)


# --- the formats ------------------------------------------------------------------------------------------------------


def from_messages(row: dict[str, Any]) -> Conversation:
    """`{"messages": [{"role", "content", ...}], "tools"?, "system"?}`."""
    return _conversation(_messages(row.get("messages"), "messages"), row)


def from_prompt_completion(row: dict[str, Any]) -> Conversation:
    """`{"prompt", "completion", "system"?, "tools"?}`, texts or message lists; only the completion is supervised."""
    prompt = _text_or_messages(row.get("prompt"), "prompt", "user")
    completion = _text_or_messages(row.get("completion"), "completion", "assistant")
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0.0
    return _conversation(prompt + completion, row)


def from_alpaca(row: dict[str, Any]) -> Conversation:
    """`{"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}`; input on its own line."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(
            "bad_messages", f"history must be a list of [user, assistant] pairs, got {type(history).__name__}"
        )
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("bad_messages", f"history[{index}] must be a [user, assistant] pair")
        messages += [
            _message({"role": role, "content": text}, f"history[{index}]")
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    for key in ("instruction", "input"):
        if not isinstance(row.get(key) or "", str):
            raise RowError("bad_content", f"{key} must be text, got {type(row[key]).__name__}")
    user = "\n".join(text for text in (row.get("instruction"), row.get("input")) if text and text.strip())
    messages.append(_message({"role": "user", "content": user}, "instruction"))
    messages.append(_message({"role": "assistant", "content": row.get("output")}, "output"))
    return _conversation(messages, row)


SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


def _sharegpt_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise RowError("bad_messages", f"{name} must be an object with from and value, got {type(value).__name__}")
    if "from" not in value and "role" in value:
        return _message(value, name)
    tag = value.get("from")
    role = SHAREGPT_ROLES.get(tag) if isinstance(tag, str) else None
    if role is None:
        raise RowError("bad_role", f"{name} is from {tag!r}; known: {', '.join(SHAREGPT_ROLES)}")
    message = {key: item for key, item in value.items() if key not in ("from", "value")}
    if role != "call":
        return _message({**message, "role": role, "content": value.get("value")}, name)
    call = value.get("value")
    if isinstance(call, str):
        call = _json_value(call, f"{name}.value", "bad_tool_call")
    calls = call if isinstance(call, list) else [call]
    if not calls:
        raise RowError("bad_tool_call", f"{name}.value holds no call")
    return _message({**message, "role": "assistant", "content": "", "tool_calls": calls}, name)


def from_sharegpt(row: dict[str, Any]) -> Conversation:
    """`{"conversations": [{"from", "value"}], "system"?, "tools"?}`; a function_call's value is the call as JSON."""
    return _conversation(_messages(row.get("conversations"), "conversations", _sharegpt_message), row)


def from_sharegpt_preference(row: dict[str, Any]) -> Preference:
    """`{"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}, "system"?, "tools"?}`."""
    prompt = _messages(row.get("conversations"), "conversations", _sharegpt_message)
    answers = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, str):
            value = {"from": "gpt", "value": value}
        answers.append(_messages(value if isinstance(value, list) else [value], name, _sharegpt_message))
    return _preference(prompt, answers[0], answers[1], row)


def from_preference(row: dict[str, Any]) -> Preference:
    """`{"prompt", "chosen", "rejected", "system"?, "tools"?}`: message lists or texts, the answers without the prompt.

    An answer may be its message alone, without the list.
    Answers that are whole conversations (they start with a system or user message) count as implicit prompts; a prompt
    given besides must then be among their messages.
    """
    chosen = row.get("chosen")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and chosen[0].get("role") != "assistant":
        preference = from_implicit_preference(row)
        given = row.get("prompt")
        if given is None:
            return preference
        if isinstance(given, str):
            agrees = any(message["content"].strip() == given.strip() for message in preference.prompt)
        else:
            agrees = _with_system(_messages(given, "prompt"), row) == preference.prompt
        if not agrees:
            raise RowError("prompt_mismatch", "prompt is not the conversation that chosen and rejected begin with")
        return preference
    if row.get("prompt") is None:
        raise _no_prompt("chosen", row)
    prompt = _text_or_messages(row["prompt"], "prompt", "user")
    given_answers = [(name, row.get(name)) for name in ("chosen", "rejected")]
    answers = [_text_or_messages([v] if isinstance(v, dict) else v, name, "assistant") for name, v in given_answers]
    return _preference(prompt, answers[0], answers[1], row)


def from_implicit_preference(row: dict[str, Any]) -> Preference:
    """`{"chosen": [...], "rejected": [...], "system"?, "tools"?}`: conversations that share all but the answer."""
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), str | dict):
            raise _no_prompt(name, row)
    chosen, rejected = _messages(row.get("chosen"), "chosen"), _messages(row.get("rejected"), "rejected")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise RowError("bad_answer", f"{name} must end with the assistant's answer, got {messages[-1]['role']}")
        if len(messages) < 2:
            raise _no_prompt(name, row)
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        raise RowError("prompt_mismatch", f"chosen and rejected differ at message {first}, before their last answer")
    return _preference(chosen[:-1], chosen[-1:], rejected[-1:], row)


def _no_prompt(name: str, row: dict[str, Any]) -> RowError:
    """What to say of an answer to nothing; the question often stands under a key of its own."""
    unread = ", ".join(_unread(row, FORMATS["preference"]))
    remedy = f"rename the one of these unread keys that holds it: {unread}" if unread else "add one"
    return RowError("no_prompt", f"{name} is an answer alone and the row has no prompt; {remedy}")


@dataclass(frozen=True)
class Format:
    """A way to write rows: the keys that tell it apart, the function that reads it, other keys that this reads."""

    kind: Kind
    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Conversation | Preference]
    others: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "messages": Format("sft", ("messages",), from_messages),
    "sharegpt": Format("sft", ("conversations",), from_sharegpt),
    "prompt_completion": Format("sft", ("prompt", "completion"), from_prompt_completion),
    "alpaca": Format("sft", ("instruction", "output"), from_alpaca, ("input", "history")),
    "preference": Format("dpo", ("prompt", "chosen", "rejected"), from_preference),
    "sharegpt_preference": Format("dpo", ("conversations", "chosen", "rejected"), from_sharegpt_preference),
    "implicit_preference": Format("dpo", ("chosen", "rejected"), from_implicit_preference),
}


def misspelt(unread: str) -> str | None:
    """The key that is meant by one that nothing reads (`wieght`, `messages[].wieght`); None for one of its own.

    A name with a word more or less (`prompt_id`) is one of its own.
    """
    inside, _, name = unread.rpartition("[].")
    of_rows = {key for format in FORMATS.values() for key in (*format.keys, *format.others, *ROW_KEYS)}
    known = MESSAGE_KEYS if inside else of_rows
    if name in known:  # of another format
        return None
    alike = sorted(key for key in known if key.count("_") == name.count("_"))
    return next(iter(difflib.get_close_matches(name.lower(), alike, n=1, cutoff=MISSPELT)), None)
