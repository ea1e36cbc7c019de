"""10,000 spoilt rows: each is refused in one line or kept with the right mask; nothing raises anything else or hangs.

The mask is compared with one that is computed on bytes: where the turns of the assistant lie in the text that the chat
template writes, control tokens in content being made harmless first, and which bytes each token stands for.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen_train.data import formats, tokenize
from qwen_train.data.chat import ChatOptions, EncodedConversation, EncodedPreference, Template
from qwen_train.data.formats import Conversation, Preference, RowError, parse_row
from tests.faults.mutations import DPO_ROWS, SFT_ROWS, mutate, mutated_text
from tests.support import encode_one, mini_tokenizer

SECONDS = 20
ANSWER = re.compile(rb"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@cache
def template(family: Any) -> Template:
    return Template(mini_tokenizer(family))


# --- an independent reference of the mask -----------------------------------------------------------------------------


@cache
def byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins of bytes, which the vocabulary is written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


def bytes_of(token: int, tokenizer: Any) -> bytes:
    text = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return text.encode()
    return bytes(byte_of()[character] for character in text)


def changed(value: Any, table: dict[str, str]) -> Any:
    """The same content with texts replaced in all its strings, the longest first."""
    if isinstance(value, str):
        for old, new in table.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {changed(key, table): changed(item, table) for key, item in value.items()}
    return [changed(item, table) for item in value] if isinstance(value, list) else value


def as_shown(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """No weights; no blank lines at the start of an answer."""
    shown = [{key: item for key, item in message.items() if key != "weight"} for message in messages]
    for message in shown:
        if message["role"] == "assistant":
            text = message["content"]
            blank = text[: len(text) - len(text.lstrip())]
            message["content"] = text[max(blank.rfind("\n"), blank.rfind("\r")) + 1 :]
            if message.get("tool_calls") and not message["content"].strip():
                message["content"] = ""
    return shown


def expected(messages: list[Any], tools: Any, tokenizer: Any, system: str) -> list[tuple[bytes, list[tuple[int, int]]]]:
    """The text's bytes and where in them the assistant's turns lie; two candidates where there is no system prompt.

    The template sees a harmless text of the same length and ends, such as <AAAA>, in the place of a control token.
    """
    controls = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    harmless = {token: f"<{chr(ord('A') + index) * (len(token) - 2)}>" for index, token in enumerate(controls)}
    body = messages[1:] if messages[0]["role"] == "system" else messages
    candidates = {
        "keep": [messages],
        "none": [body, [{"role": "system", "content": ""}, *body]],
    }.get(system, [[{"role": "system", "content": system}, *body]])
    found = []
    for candidate in candidates:
        shown = changed(as_shown(candidate), harmless)
        text = tokenizer.apply_chat_template(shown, tools=changed(tools, harmless), tokenize=False)
        turns = [match.span(1) for match in ANSWER.finditer(unicodedata.normalize("NFC", text).encode())]
        real = changed(text, {stand_in: token for token, stand_in in harmless.items()})
        found.append((unicodedata.normalize("NFC", real).encode(), turns))
    return found


def spans_in_bytes(ids: list[int], spans: list[tuple[int, int, float]], tokenizer: Any) -> tuple[bytes, list[Any]]:
    ends, text = [0], b""
    for token in ids:
        text += bytes_of(token, tokenizer)
        ends.append(len(text))
    return text, [(ends[start], ends[end], weight) for start, end, weight in spans]


def right_conversation(row: Conversation, encoded: EncodedConversation, options: ChatOptions, tokenizer: Any) -> bool:
    text, spans = spans_in_bytes(encoded.input_ids, encoded.spans, tokenizer)
    weights = [m.get("weight", 1.0) for m in row.messages if m["role"] == "assistant"]
    for known, turns in expected(row.messages, row.tools, tokenizer, options.system):
        if text != known or len(turns) != len(weights):
            continue
        weighted = [(*turn, weight) for turn, weight in zip(turns, weights, strict=True)]
        if options.supervise == "last":
            weighted = weighted[-1:]
        if options.supervise != "all":
            return spans == [span for span in weighted if span[2] > 0]
        first = len(bytes_of(encoded.input_ids[0], tokenizer))
        covered = [(start, end) for start, end, _ in spans]
        left_out = [(start, end) for start, end, weight in weighted if weight == 0]
        pieces = sorted([*covered, *left_out])
        joined = pieces[0][0] == first and pieces[-1][1] == len(text)
        joined = joined and all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        return joined and {*weighted} - {(*piece, 0.0) for piece in left_out} <= {*spans}
    return False


def right_preference(row: Preference, encoded: EncodedPreference, options: ChatOptions, tokenizer: Any) -> bool:
    for answer, ids in ((row.chosen, encoded.chosen_ids), (row.rejected, encoded.rejected_ids)):
        whole = [*encoded.prompt_ids, *ids]
        spans: list[Any] = [(len(encoded.prompt_ids), len(whole), 1.0)]
        text, ((start, end, _),) = spans_in_bytes(whole, spans, tokenizer)
        candidates = expected([*row.prompt, *answer], row.tools, tokenizer, options.system)
        if not any(known == text + b"\n" and turns and turns[-1] == (start, end) for known, turns in candidates):
            return False
    return True


# --- the rows ---------------------------------------------------------------------------------------------------------


class HangError(Exception):
    pass


def judge(kind: Any, dice: Random, counts: Counter[str]) -> None:
    """One spoilt row through parsing and encoding under random options; what became of it is counted."""
    row = dice.choice(SFT_ROWS if kind == "sft" else DPO_ROWS)
    for _ in range(dice.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        row = mutate(row, dice)
    text = mutated_text(row, dice)
    family = dice.choice(["qwen2.5", "qwen3"])
    options = ChatOptions(
        max_length=100_000,
        supervise=dice.choice(["assistant", "assistant", "last", "all"]) if kind == "sft" else "assistant",
        system=dice.choice(["keep", "keep", "none", "Be brief."]),
        control_tokens=dice.choice(["escape", "escape", "reject", "allow"]),
    )
    trimmed = dice.random() < 0.1
    if trimmed:
        options = replace(options, max_length=60, too_long=dice.choice(["trim_turns", "drop", "error"]))
    known = template(family)

    def stop(*_: Any) -> None:
        raise HangError(text)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        parsed: Any = parse_row(text, kind)
        encoded = encode_one(known, parsed, options)
    except RowError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1 and re.fullmatch(r"[a-z_]+", error.reason), repr(str(error))
        assert len(lines[0]) < 1000
        lines[0].encode()  # it can be printed
        counts[f"refused: {error.reason}"] += 1
        return
    finally:
        signal.alarm(0)
    tokenizer = known.tokenizer
    controls = "|".join(map(re.escape, tokenizer.get_added_vocab()))
    messages = parsed.messages if kind == "sft" else [*parsed.prompt, *parsed.chosen, *parsed.rejected]
    if options.system != "keep" and messages[0]["role"] == "system":
        messages = messages[1:]
    content = json.dumps([messages, parsed.tools], ensure_ascii=False)
    if options.control_tokens == "allow" and re.search(controls, content):
        counts["kept: control tokens allowed"] += 1  # what they mean is the user's own
        return
    if options.control_tokens == "reject":
        assert not re.search(controls, content)
    if trimmed and encoded.notes.get("turns_trimmed"):
        counts["kept: trimmed"] += 1
        assert len(encoded.input_ids if kind == "sft" else encoded.prompt_ids) <= options.max_length
        return
    right = right_conversation if kind == "sft" else right_preference
    assert right(parsed, encoded, options, tokenizer), f"a wrong mask: {text!r} {options}"
    counts["kept: mask compared"] += 1


def fuzz(kind: Any, examples: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in range(examples):
        judge(kind, Random(seed), counts)
    return counts


def test_the_sample_is_the_same_in_every_run():
    """Hypothesis, derandomised or not, draws integers that stand in the modules loaded by then: others with `sft`."""
    code = "import qwen_train.sft; from tests.faults.test_fuzz_rows import fuzz; print(sorted(fuzz('sft', 60).items()))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == str(sorted(fuzz("sft", 60).items()))


AMOUNTS = [
    pytest.param("sft", 1000, id="1000 conversations"),
    pytest.param("dpo", 400, id="400 pairs"),
    pytest.param("sft", 7000, id="7000 conversations", marks=pytest.mark.slow),
    pytest.param("dpo", 3000, id="3000 pairs", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "examples"), AMOUNTS)
def test_spoilt_rows_are_refused_or_rightly_masked(kind: str, examples: int, record_property):
    counts = fuzz(kind, examples)
    total, kept = sum(counts.values()), sum(n for name, n in counts.items() if name.startswith("kept"))
    record_property("rows", f"{total:,}, kept {kept:,}, masks compared {counts['kept: mask compared']:,}")
    record_property("refused", ", ".join(f"{name[9:]} {n}" for name, n in sorted(counts.items()) if "refused" in name))
    assert total == examples
    assert counts["kept: mask compared"] >= 0.2 * total and total - kept >= 0.3 * total, "both sides are reached"


@pytest.mark.parametrize("shift", [(-1, 0), (0, -1), (1, 0), (0, 1)])
def test_a_wrong_mask_would_be_seen(shift: tuple[int, int]):
    """The negative control: a span that is one token off, a lost one, another weight."""
    known = template("qwen2.5")
    for row in SFT_ROWS:
        parsed: Any = parse_row(json.dumps(row), "sft")
        options = ChatOptions(max_length=10_000)
        encoded = encode_one(known, parsed, options)
        assert right_conversation(parsed, encoded, options, known.tokenizer)
        start, end, weight = encoded.spans[-1]
        shifted = (start + shift[0], end + shift[1], weight)
        for last in ([shifted], [], [(start, end, weight / 2)]):
            wrong = EncodedConversation(encoded.input_ids, [*encoded.spans[:-1], *last], {})
            assert not right_conversation(parsed, wrong, options, known.tokenizer)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_file_of_spoilt_rows_is_judged_to_its_end(kind: Any, suffix: str, tmp_path: Path):
    """A verdict on every row, none of them an exception; and as training data the file is refused, in text."""
    dice = Random(f"{kind}{suffix}")
    texts = [mutated_text(mutate(dice.choice(SFT_ROWS if kind == "sft" else DPO_ROWS), dice), dice) for _ in range(200)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":  # the file itself has to be one JSON list
        texts = [text for text in texts if formats.is_json(text) and text.isprintable()]
        path.write_text(f"[{','.join(texts)}]")
    else:
        texts = [text for text in texts if text.strip()]
        path.write_bytes("\n".join(texts).encode(errors="surrogatepass"))
    options = ChatOptions(max_length=10_000)
    judged = list(tokenize.judge(kind, str(path), mini_tokenizer(), options))
    assert len(judged) == len(texts) and [row.row for row in judged] == list(range(len(texts)))
    counts = Counter(row.status for row in judged)
    assert counts["kept"] >= 20 and counts["error"] >= 20
    with pytest.raises(ValueError, match=f"{counts['error']} of {len(texts)} rows cannot be used") as caught:
        tokenize.tokenize(kind, str(path), mini_tokenizer(), options, cache_dir=tmp_path / "cache", workers=0)
    str(caught.value).encode()
