"""The chat template: conversations and preference pairs -> token ids and what is supervised. Nothing else knows it.

What a caller uses:
- `Template(tokenizer)`: one per process; ValueError when the tokenizer has no usable chat template;
- `template.encode(kind, rows, options)`: a batch of rows, each result an encoding or the `RowError` that row deserves,
  never raising for a row;
- `template.role_spans(ids)`: `(role, start, end)` of every turn on the ids of a rendering, for counts by role;
- `template.prompt_ids(messages, tools, options)`: a prompt with the generation header, for sampling.

Supervised is what the model has to generate in an assistant turn: everything after the ids of
`<|im_start|>assistant\\n` up to and including the next `<|im_end|>`. It is found on the ids of the rendering; the
number of such spans must equal the number of assistant messages. Under `allow` an answer must not hold an `<|im_end|>`
of its own, where it would end.

Control tokens: any added token of the tokenizer, special or not, that occurs inside content (messages, names,
reasoning, tool schemas, tool-call arguments, their keys too). Under `escape` each occurrence is replaced before
rendering by one private-use character that the row does not hold; the rendered text is then cut at the control tokens
that are left, which are the template's own; the text between gets its literal characters back and is encoded by a copy
of the tokenizer that knows no added tokens. A template that looks for such a token in content (Qwen3 splits at
`</think>`) does not see it: thinking belongs in `reasoning_content`, where the template writes the tokens itself.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qwen_train.config import DataConfig, Kind
from qwen_train.data.formats import ROLES, Conversation, Message, Preference, RowError, one_line
from qwen_train.data.packing import FloatArray, token_weights

START, END = "<|im_start|>", "<|im_end|>"
LEADING_NEWLINES = re.compile(r"\s*[\r\n]+")
PRIVATE_USE = range(0xE000, 0xF900)
MAX_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How rows become tokens: what `DataConfig` says of it under the same names, and has checked."""

    max_length: int = DataConfig.max_length
    too_long: str = DataConfig.too_long
    supervise: str = DataConfig.supervise
    system: str = DataConfig.system
    control_tokens: str = DataConfig.control_tokens

    @classmethod
    def from_config(cls, data: DataConfig) -> "ChatOptions":
        return cls(
            max_length=data.max_length,
            too_long=data.too_long,
            supervise=data.supervise,
            system=data.system,
            control_tokens=data.control_tokens,
        )


@dataclass(frozen=True)
class EncodedConversation:
    """`spans` are `(start, end, weight)`: tokens start..end-1 are predicted, start >= 1; `notes` counts.

    `trimmed_from`: `longest` before turns were left out.
    """

    input_ids: list[int]
    spans: list[tuple[int, int, float]]
    notes: dict[str, int] = field(default_factory=dict)
    trimmed_from: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the row, which is what max_length limits."""
        return len(self.input_ids)

    @property
    def total_weight(self) -> float:
        return sum((end - start) * weight for start, end, weight in self.spans)

    def weights(self) -> FloatArray:
        """Weight of each token. Shape [L], float32."""
        return token_weights(len(self.input_ids), self.spans)


@dataclass(frozen=True)
class EncodedPreference:
    """`prompt_ids` ends with the generation header; each answer runs from there to its `<|im_end|>` inclusive.

    `trimmed_from` as above.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    notes: dict[str, int] = field(default_factory=dict)
    trimmed_from: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences, which is what max_length limits."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


Row = TypeVar("Row", Conversation, Preference)
Encoded = TypeVar("Encoded", EncodedConversation, EncodedPreference)


@dataclass
class _Rendering:
    """One rendered text, and for escaped rows the literal text that each private-use character stands for.

    `max_turns`: one a message, one for a default system prompt or tool list, one for a generation header.
    """

    text: str
    messages: list[Message]
    literals: dict[str, str]
    notes: Counter[str]
    max_turns: int


class Template:
    """The tokenizer with its chat template; see the module's docstring for what it offers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        where = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{where}: the tokenizer has no chat template; use an instruct model's tokenizer")
        self.where = where
        self.control_tokens = sorted(
            {str(token) for token in tokenizer.get_added_vocab()}, key=lambda token: (-len(token), token)
        )
        missing = [token for token in (START, END) if token not in self.control_tokens]
        if missing:
            raise ValueError(
                f"{where}: the tokenizer lacks the ChatML tokens {', '.join(missing)}; use a Qwen tokenizer"
            )
        self._control = re.compile("|".join(map(re.escape, self.control_tokens)))
        self._control_ids = {token: tokenizer.get_added_vocab()[token] for token in self.control_tokens}
        self._is_control = np.zeros(max(len(tokenizer), *self._control_ids.values()) + 1, dtype=bool)
        self._is_control[list(self._control_ids.values())] = True
        self.start_id, self.end_id = self._control_ids[START], self._control_ids[END]
        self.header = self._encode_plainly(f"{START}assistant\n")
        self._roles = {role: self._encode_plainly(f"{START}{role}") for role in ROLES}
        result = self._encode_plainly(f"{START}user\n<tool_response>")
        self._tool_result = result if "<tool_response>" in self._control_ids else result[:-1]  # ">" merges with "\n"
        self._probe()

    def _encode_plainly(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _probe(self) -> None:
        """Render small conversations once: does the template work, end turns as ChatML does, add a system prompt?"""
        user: Message = {"role": "user", "content": "u"}
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        self.adds_default: dict[bool, bool] = {}
        try:
            text = self._apply([user, {"role": "assistant", "content": "a"}], None)
            for tools in (None, [tool]):
                bare = self._apply([user], tools)
                empty = self._apply([{"role": "system", "content": ""}, user], tools)
                self.adds_default[bool(tools)] = len(bare) > len(empty)
        except (TemplateError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.where}: the chat template fails on a plain conversation: {one_line(error, 200)}"
            ) from error
        ids = np.asarray(self._encode_plainly(text))
        if len(self.assistant_spans(ids)) != 1:
            raise ValueError(
                f"{self.where}: the chat template does not write an assistant turn as {START}assistant\\n ... {END}; "
                "only ChatML templates of the Qwen family are supported"
            )

    # --- rendering ----------------------------------------------------------------------------------------------------

    def _apply(self, messages: list[Message], tools: Any, **kwargs: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs))

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, options: ChatOptions, **kwargs: Any
    ) -> _Rendering:
        """Apply the policies on system prompt, leading newlines and control tokens, then the template."""
        notes: Counter[str] = Counter()
        messages = self._with_system_policy(messages, tools, options.system)
        if messages[0]["role"] != "system" and self.adds_default[bool(tools)]:
            notes["default_system"] += 1
        shown = [_shown(message, notes) for message in messages]
        literals: dict[str, str] = {}
        found = list(self._found_in({"messages": shown, "tools": tools}))
        if found:
            notes["control_tokens"] += len(found)
            if any(_looks_rendered(message["content"]) for message in shown):
                notes["rendered_content"] = 1
            if options.control_tokens == "reject":
                names = ", ".join(sorted(set(found))[:MAX_LISTED])
                raise RowError("control_token", f"content holds the control token(s) {names}", notes=dict(notes))
            if options.control_tokens == "escape":
                literals = self._private_characters(set(found), shown, tools)
                stand_ins = {literal: character for character, literal in literals.items()}
                shown, tools = self._hidden((shown, tools), stand_ins)
            if options.control_tokens == "allow" and any(_ends_itself(message) for message in shown):
                raise RowError(
                    "end_in_answer",
                    f"an assistant message holds {END}, where its answer would be cut; take it out, or escape it "
                    "(data.control_tokens)",
                    notes=dict(notes),
                )
        try:
            text = self._apply(shown, tools, **kwargs)
        except (TemplateError, ValueError, TypeError, AttributeError) as error:
            raise RowError("template_error", f"the chat template refuses the row: {one_line(error, 200)}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError("bad_text", f"the text holds a lone surrogate (U+{ord(text[error.start]):04X})") from None
        for message in shown:
            if (reasoning := message.get("reasoning_content")) and reasoning.strip() not in text:
                notes["reasoning_left_out"] += 1
        max_turns = len(messages) + 1 + bool(kwargs.get("add_generation_prompt"))
        return _Rendering(text, messages, literals, notes, max_turns)

    def _render_or_error(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, options: ChatOptions
    ) -> _Rendering | RowError:
        try:
            return self._render(messages, tools, options)
        except RowError as error:
            return error

    def _with_system_policy(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, policy: str
    ) -> list[Message]:
        if policy == "keep":
            return messages
        body = messages[1:] if messages[0]["role"] == "system" else messages
        if policy == "none":
            return [{"role": "system", "content": ""}, *body] if self.adds_default[bool(tools)] else body
        return [{"role": "system", "content": policy}, *body]

    # --- control tokens -----------------------------------------------------------------------------------------------

    def _found_in(self, value: Any) -> Iterator[str]:
        for text in _strings(value):
            yield from self._control.findall(text)

    def _private_characters(self, tokens: set[str], *content: Any) -> dict[str, str]:
        """A private-use character for each control token, none of which occurs in the row or in the template."""
        used = set(str(self.tokenizer.chat_template)).union(*(set(text) for text in _strings(content)))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        literals = dict(zip(free, sorted(tokens), strict=False))
        if len(literals) < len(tokens):
            raise RowError("control_token", "content uses the whole private-use area, so nothing can be escaped in it")
        return literals

    def _hidden(self, value: Any, stand_ins: dict[str, str]) -> Any:
        def hide(text: str) -> str:
            return self._control.sub(lambda match: stand_ins[match.group()], text)

        return _map_strings(value, hide)

    @cached_property
    def _literal_tokenizer(self) -> Tokenizer:
        """A copy of the backend without added tokens; ValueError where it would not encode as the tokenizer does."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{self.where}: data.control_tokens: escape needs a fast tokenizer; use reject or allow")
        state = json.loads(backend.to_str())
        flags = ("lstrip", "rstrip", "single_word")
        odd = [token["content"] for token in state["added_tokens"] if any(token[flag] for flag in flags)]
        odd += [token for token in self.control_tokens if json.dumps(token, ensure_ascii=False) != f'"{token}"']
        state["added_tokens"] = []
        literal = Tokenizer.from_str(json.dumps(state))
        literal.no_truncation()
        literal.no_padding()
        sample = "".join(f"{text}{token}" for text, token in zip(_PROBE_TEXTS * 99, self.control_tokens, strict=False))
        pieces = self._encode_pieces(_Rendering(sample, [], {}, Counter(), 0), literal)
        if odd or pieces != self._encode_plainly(sample):
            raise ValueError(
                f"{self.where}: data.control_tokens: escape is not possible with this tokenizer (its control tokens "
                f"{', '.join(odd[:MAX_LISTED]) or 'change the text around them'}); use reject or allow"
            )
        return literal

    def _encode_pieces(self, rendering: _Rendering, literal: Tokenizer) -> list[int]:
        """Encode an escaped rendering: the template's control tokens by id, all text between them literally."""
        texts, tokens = self._control.split(rendering.text), self._control.findall(rendering.text)
        restore = str.maketrans(rendering.literals)
        encoded = literal.encode_batch([text.translate(restore) for text in texts], add_special_tokens=False)
        ids: list[int] = []
        for index, piece in enumerate(encoded):
            if self._is_control[piece.ids].any():
                raise RowError("control_token", "the tokenizer makes a control token out of plain text; use reject")
            ids += piece.ids
            if index < len(tokens):
                ids.append(self._control_ids[tokens[index]])
        return ids

    def _encode(self, renderings: Sequence[_Rendering | RowError], options: ChatOptions) -> list[np.ndarray | RowError]:
        """Token ids of renderings (errors pass through); rows without control tokens in content go in one batch."""
        direct = [index for index, item in enumerate(renderings) if isinstance(item, _Rendering) and not item.literals]
        texts = [cast(_Rendering, renderings[index]).text for index in direct]
        batch = (
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )
        encoded = dict(zip(direct, batch, strict=True))
        results: list[np.ndarray | RowError] = []
        for index, rendering in enumerate(renderings):
            try:
                known = _result(rendering)
                ids = encoded[index] if index in encoded else self._encode_pieces(known, self._literal_tokenizer)
                array = np.asarray(ids, dtype=np.int64)
                if options.control_tokens != "allow":
                    self._check_own(array, known)
                results.append(array)
            except RowError as error:
                results.append(error)
        return results

    def _check_own(self, ids: np.ndarray, rendering: _Rendering) -> None:
        """Every control id is the template's own: as many as it wrote, and at most `max_turns` turns."""
        written = len(self._control.findall(rendering.text))
        if int(self._is_control[ids].sum()) != written:
            raise RowError("control_token", "text around the template's control tokens turned into a control token")
        turns = int((ids == self.start_id).sum())
        if turns > rendering.max_turns:
            raise RowError("control_token", f"{turns} turns were rendered from {len(rendering.messages)} messages")

    # --- spans --------------------------------------------------------------------------------------------------------

    def assistant_spans(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Every stretch from after an assistant header up to and including the next end token."""
        starts = _find(ids, self.header) + len(self.header)
        ends = np.flatnonzero(ids == self.end_id)
        places = np.searchsorted(ends, starts)
        return [
            (int(start), int(ends[place]) + 1) for start, place in zip(starts, places, strict=True) if place < len(ends)
        ]

    def _checked_spans(self, ids: np.ndarray, messages: list[Message]) -> list[tuple[int, int]]:
        spans = self.assistant_spans(ids)
        expected = sum(message["role"] == "assistant" for message in messages)
        overlap = any(left[1] > right[0] for left, right in itertools.pairwise(spans))
        if len(spans) != expected or overlap:
            raise RowError(
                "span_mismatch", f"the rendering holds {len(spans)} assistant turns for {expected} assistant messages"
            )
        return spans

    def role_spans(self, input_ids: Sequence[int] | np.ndarray) -> list[tuple[str, int, int]]:
        """`(role, start, end)` of every turn, header and newline included; tool results count as `tool`."""
        array = np.asarray(input_ids, dtype=np.int64)
        starts = np.flatnonzero(array == self.start_id).tolist()
        spans = []
        for start, end in zip(starts, [*starts[1:], len(array)], strict=True):
            turn = array[start:end].tolist()
            role = next((name for name, ids in self._roles.items() if turn[: len(ids)] == ids), "other")
            if turn[: len(self._tool_result)] == self._tool_result:
                role = "tool"
            spans.append((role, start, end))
        return spans

    # --- rows ---------------------------------------------------------------------------------------------------------

    def encode(self, kind: Kind, rows: Sequence[Any], options: ChatOptions) -> list[Any]:
        """`Conversation`s ("sft") as `EncodedConversation`s or `Preference`s ("dpo") as `EncodedPreference`s.

        A row that cannot be used gives its `RowError` instead.
        """
        return self._conversations(list(rows), options) if kind == "sft" else self._preferences(list(rows), options)

    # --- conversations ------------------------------------------------------------------------------------------------

    def _conversations(self, rows: list[Conversation], options: ChatOptions) -> list[EncodedConversation | RowError]:
        """Token ids and supervised spans under the length policy."""
        results = self._conversations_at_any_length(rows, options)
        for index, (row, result) in enumerate(zip(rows, results, strict=True)):
            if isinstance(result, EncodedConversation) and len(result.input_ids) > options.max_length:
                shorter = [Conversation(messages, row.tools) for messages in _without_oldest_turns(row.messages)]
                results[index] = _fitted(result, shorter, self._conversations_at_any_length, options)
        return [_with_supervision(result) for result in results]

    def _conversations_at_any_length(
        self, rows: list[Conversation], options: ChatOptions
    ) -> list[EncodedConversation | RowError]:
        renderings = [self._render_or_error(row.messages, row.tools, options) for row in rows]
        results: list[EncodedConversation | RowError] = []
        for rendering, ids in zip(renderings, self._encode(renderings, options), strict=True):
            try:
                results.append(self._supervised(_result(ids), _result(rendering), options))
            except RowError as error:
                results.append(error)
        return results

    def _supervised(self, ids: np.ndarray, rendering: _Rendering, options: ChatOptions) -> EncodedConversation:
        turns = self._checked_spans(ids, rendering.messages)
        assistants = [message for message in rendering.messages if message["role"] == "assistant"]
        notes = rendering.notes
        fixed = 1.0 if options.supervise == "all" else 0.0  # of all tokens outside the assistant's turns
        ignored = sum(m.get("weight", fixed) != fixed for m in rendering.messages if m["role"] != "assistant")
        if ignored:
            notes["weight_ignored"] += ignored
        weighted = [
            (start, end, float(message.get("weight", 1.0)))
            for (start, end), message in zip(turns, assistants, strict=True)
        ]
        if options.supervise == "last":
            weighted = weighted[-1:]
        elif options.supervise == "all":
            weighted = _fill_between(weighted, len(ids))
        return EncodedConversation(ids.tolist(), [span for span in weighted if span[2] > 0], dict(notes))

    # --- preferences --------------------------------------------------------------------------------------------------

    def _preferences(self, rows: list[Preference], options: ChatOptions) -> list[EncodedPreference | RowError]:
        """Token ids of the shared prompt and the two answers under the length policy."""
        results = self._preferences_at_any_length(rows, options)
        for index, (row, result) in enumerate(zip(rows, results, strict=True)):
            if isinstance(result, EncodedPreference) and result.longest > options.max_length:
                shorter = [replace(row, prompt=messages) for messages in _without_oldest_turns(row.prompt)]
                results[index] = _fitted(result, shorter, self._preferences_at_any_length, options)
        return results

    def _preferences_at_any_length(
        self, rows: list[Preference], options: ChatOptions
    ) -> list[EncodedPreference | RowError]:
        renderings = [
            self._render_or_error([*row.prompt, *answer], row.tools, options)
            for row in rows
            for answer in (row.chosen, row.rejected)
        ]
        ids = self._encode(renderings, options)
        results: list[EncodedPreference | RowError] = []
        for index, row in enumerate(rows):
            both = slice(2 * index, 2 * index + 2)
            try:
                results.append(self._pair(row, renderings[both], ids[both]))
            except RowError as error:
                results.append(error)
        return results

    def _pair(
        self, row: Preference, renderings: list[_Rendering | RowError], ids: list[np.ndarray | RowError]
    ) -> EncodedPreference:
        """Cut both full renderings at the end of the generation header, and prove that they agree up to there."""
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        notes: Counter[str] = Counter()
        for name, rendering, full in zip(("chosen", "rejected"), renderings, ids, strict=True):
            try:
                known, tokens = _result(rendering), _result(full)
                start, end = self._checked_spans(tokens, known.messages)[-1]
            except RowError as error:
                raise RowError(error.reason, f"{name}: {error}", notes=error.notes) from error
            prompts.append(tokens[:start].tolist())
            answers.append(tokens[start:end].tolist())
            notes |= known.notes
        if prompts[0] != prompts[1]:
            raise RowError("prompt_mismatch", "the template renders the prompt differently before chosen and rejected")
        if answers[0] == answers[1]:
            raise RowError("identical_answers", "chosen and rejected are the same answer", drop=True, notes=dict(notes))
        texts = [" ".join(answer[0]["content"].split()) for answer in (row.chosen, row.rejected)]
        if texts[0] == texts[1] and row.chosen[0].get("tool_calls") == row.rejected[0].get("tool_calls"):
            notes["whitespace_only_difference"] += 1
        return EncodedPreference(prompts[0], answers[0], answers[1], dict(notes))

    def prompt_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, options: ChatOptions
    ) -> list[int]:
        """A prompt rendered with the generation header, under the same policies; RowError as for a row."""
        rendering = self._render(messages, tools, options, add_generation_prompt=True)
        return [int(token) for token in _result(self._encode([rendering], options)[0])]


_PROBE_TEXTS = ["user\nHello, world", "\n", " two  spaces\n\n", "naïve 日本語 🙂\n\tx = 1", '{"a": [1, 2]}\n', "end."]


def _result(result: Any) -> Any:
    """The value, or the RowError in its place raised."""
    if isinstance(result, RowError):
        raise result
    return result


def _without_oldest_turns(messages: list[Message]) -> list[list[Message]]:
    """The messages without the oldest 1, 2, ... turns; a turn is a user's messages and all that answers them."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    turns = [
        index
        for index, message in enumerate(body)
        if message["role"] == "user" and (index == 0 or body[index - 1]["role"] != "user")
    ]
    return [head + body[first:] for first in turns[1:]]


def _fitted(
    result: Encoded,
    shorter: list[Row],
    encode: Callable[[list[Row], ChatOptions], list[Encoded | RowError]],
    options: ChatOptions,
) -> Encoded | RowError:
    """A row beyond max_length under the length policy: as few turns left out as make it fit (bisected), or RowError."""
    tokens = f"{result.longest} tokens, max_length is {options.max_length}"
    if options.too_long == "error":
        remedy = "raise data.max_length or choose data.too_long"
        return RowError("too_long", f"{tokens}; {remedy}", notes=result.notes, length=result.longest)
    if options.too_long == "trim_turns":
        fitting: Encoded | None = None
        low, high = 0, len(shorter) - 1
        while low <= high:
            middle = (low + high) // 2
            candidate = encode([shorter[middle]], options)[0]
            if isinstance(candidate, RowError):
                return candidate
            if candidate.longest <= options.max_length:
                fitting, high = replace(candidate, trimmed_from=result.longest), middle - 1
                fitting.notes.update(turns_trimmed=middle + 1, rows_trimmed=1)
            else:
                low = middle + 1
        if fitting is not None:
            return fitting
        tokens += ", even with the last exchange alone"
    return RowError("too_long", tokens, drop=True, notes=result.notes, length=result.longest)


def _shown(message: Message, notes: Counter[str]) -> Message:
    """What the template is given of a message: no weight, and no newline where an answer begins."""
    shown = {key: value for key, value in message.items() if key != "weight"}
    if message["role"] == "assistant":
        content = message["content"]
        match = LEADING_NEWLINES.match(content)
        stripped = content[match.end() :] if match else content
        if message.get("tool_calls") and not stripped.strip():
            stripped = ""
        if stripped != content:
            notes["stripped_newlines"] += 1
            shown["content"] = stripped
    return shown


def _looks_rendered(content: str) -> bool:
    return START in content or content.rstrip().endswith(END)


def _ends_itself(message: Message) -> bool:
    """Of an assistant: what the model has to generate holds the token that ends its turn."""
    generated = (message.get(key) for key in ("content", "reasoning_content", "tool_calls"))
    return message["role"] == "assistant" and any(END in text for part in generated for text in _strings(part))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _find(ids: np.ndarray, pattern: list[int]) -> np.ndarray:
    """Positions where the pattern begins."""
    last = len(ids) - len(pattern) + 1
    if last <= 0:
        return np.empty(0, dtype=np.int64)
    hits = np.ones(last, dtype=bool)
    for offset, token in enumerate(pattern):
        hits &= ids[offset : offset + last] == token
    return np.flatnonzero(hits)


def _fill_between(spans: list[tuple[int, int, float]], length: int) -> list[tuple[int, int, float]]:
    """Every token but the first, at weight 1 outside the given spans and at theirs inside."""
    filled: list[tuple[int, int, float]] = []
    place = 1
    for start, end, weight in spans:
        if start > place:
            filled.append((place, start, 1.0))
        filled.append((start, end, weight))
        place = end
    return [*filled, (place, length, 1.0)] if place < length else filled


def _with_supervision(result: EncodedConversation | RowError) -> EncodedConversation | RowError:
    if isinstance(result, RowError) or result.spans:
        return result
    trimmed = result.notes.get("turns_trimmed", 0) > 0
    cause = "the turns that are left after trimming have no weight" if trimmed else "no assistant turn has a weight > 0"
    return RowError("no_supervised_tokens", f"no token is supervised: {cause}", drop=trimmed, notes=result.notes)
