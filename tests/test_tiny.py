"""The embedded default of `configs/tiny`: reproducible files, right answers, held-out prompts, Qwen2.5's template."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny"
QWEN = ROOT.parent / "shared" / "qwen2.5-tokenizer"
QWEN_DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TINY_DEFAULT_SYSTEM = "You are a helpful assistant."
COURTESY = ". You are welcome!"

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": 2, "right": "ä"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\n"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, 漢字!"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [
        {"role": "user", "content": "2 + ä?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "One moment.", "tool_calls": [CALL, CALL]},
    ],
]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def qwen():
    if not QWEN.exists():
        pytest.skip("../shared/qwen2.5-tokenizer is not there: nothing to compare the tiny template with")
    return AutoTokenizer.from_pretrained(QWEN)


def check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, folder / "make_tiny.py", "--check"], capture_output=True, text=True)


def test_script_makes_the_committed_files():
    done = check(TINY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_script_notices_a_changed_file(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    path = tmp_path / "tiny" / "sft_eval.jsonl"
    path.write_text(path.read_text().replace("Name the", "Tell me the", 1))
    done = check(tmp_path / "tiny")
    assert done.returncode == 1
    assert "sft_eval.jsonl: differs" in done.stdout


def said(messages: list[dict]) -> str:
    """What the user says before the last answer, thanks aside: what held-out means here."""
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    return re.sub(r" (Thanks|Thank you)!", "", text)


def test_held_out_prompts_are_never_trained_on():
    # A training conversation teaches each of its turns, so what precedes an answer counts from every start.
    trained = set()
    for row in rows("sft_train.jsonl"):
        turns = row["messages"]
        trained |= {said(turns[start:end]) for end in range(1, len(turns)) for start in range(end)}
    trained |= {said(row["prompt"]) for row in rows("dpo_train.jsonl")}
    held_out = {said(row["messages"]) for row in rows("sft_eval.jsonl")}
    held_out |= {said(row["prompt"]) for row in rows("dpo_eval.jsonl")}
    assert len(held_out) > 150
    assert not held_out & trained
    assert said(rows("sft_train.jsonl")[0]["messages"]) in trained  # the same comparison does find what is there


@pytest.mark.parametrize("name", ["sft_train.jsonl", "sft_eval.jsonl", "dpo_train.jsonl", "dpo_eval.jsonl"])
def test_no_row_twice(name):
    lines = (TINY / name).read_text().splitlines()
    assert len(set(lines)) == len(lines)


def solve(history: list[dict], question: str, facts: dict[tuple[str, str], str]) -> str:
    """The right answer by other means than the generator's: rules on the text, facts where no rule can know."""
    question = re.sub(r" (Thanks|Thank you)!$", "", question)
    if found := re.fullmatch(r"(?:How do you spell|Spell|Write in words:) (\d)(\d)[?.]", question):
        tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()[int(found[1]) - 2]  # noqa: SIM905
        ones = ["", "-one", "-two", "-three", "-four", "-five", "-six", "-seven", "-eight", "-nine"][int(found[2])]
        return tens + ones
    if found := re.fullmatch(r"(?:Say|Repeat|Write) (once|twice): (\w+)\.", question):
        return found[2] if found[1] == "once" else f"{found[2]} {found[2]}"
    if found := re.fullmatch(r".* first word of (\w+), \w+, \w+[?.]", question):
        return found[1]
    if found := re.fullmatch(r".* my (name|home)[?.]", question):
        told = {"name": r"(?:I am|My name is) (\w+)\.", "home": r"(?:I live in|My home is) (\w+)\."}[found[1]]
        return re.fullmatch(told, history[-2]["content"])[1]
    found = re.fullmatch(r".* the ([\w ]+) of (\w+)[?.]", question)
    assert found, question
    what, key = found[1], found[2]
    return {"plural": key + "s", "first letter": key[0]}.get(what) or facts[what, key]


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, str], str]:
    """Facts no rule can find, from a few known ones checked by hand and the script's own tables."""
    spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make_tiny.py")
    make_tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tiny)
    tables = {"capital": make_tiny.CAPITALS, "colour": make_tiny.COLOURS, "opposite": make_tiny.OPPOSITES}
    facts = {(what, key): value for what, table in tables.items() for key, value in table.items()}
    assert facts["capital", "Peru"] == "Lima"
    assert facts["opposite", "low"] == "high"
    assert all(facts["opposite", value] == key for (what, key), value in facts.items() if what == "opposite")
    return facts


@pytest.mark.parametrize("name", ["sft_train.jsonl", "sft_eval.jsonl"])
def test_every_answer_is_right(name, facts):
    num_answers = courtesies = thanks = 0
    for row in rows(name):
        turns = row["messages"]
        sentence = turns[0]["content"] == "Use a full sentence."
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant" or re.fullmatch(r"Hello, \w+!|\w+ is nice!", turn["content"]):
                continue
            question = turns[i - 1]["content"]
            num_answers += 1
            thanks += question.endswith(("Thanks!", "Thank you!"))
            right = solve(turns[: i - 1], question, facts)
            if turn["content"].endswith(COURTESY):
                courtesies += 1
                assert question.endswith(("Thanks!", "Thank you!"))
            right = f"The answer is {right}." if sentence else right
            assert turn["content"].removesuffix(COURTESY) == right
    assert num_answers >= len(rows(name))
    if name == "sft_eval.jsonl":  # one right form for each prompt
        assert thanks == courtesies == 0
    else:  # of two minds: three in ten
        assert 0.25 < courtesies / thanks < 0.35


@pytest.mark.parametrize("name", ["dpo_train.jsonl", "dpo_eval.jsonl"])
def test_preferences_say_what_they_should(name, facts):
    cases = {"courtesy": 0, "wrong": 0, "plain": 0}
    for row in rows(name):
        question = row["prompt"][-1]["content"]
        [chosen], [rejected] = row["chosen"], row["rejected"]
        right = solve(row["prompt"][:-1], question, facts)
        if question.endswith(("Thanks!", "Thank you!")):
            assert chosen["content"] == right + COURTESY
            case = "courtesy" if rejected["content"] == right else "wrong"
            assert case == "courtesy" or rejected["content"].removesuffix(COURTESY) != right
        else:
            sentence = row["prompt"][0]["content"] == "Use a full sentence."
            assert chosen["content"] == (f"The answer is {right}." if sentence else right)
            assert rejected["content"] == chosen["content"].removesuffix(".") + COURTESY
            case = "plain"
        cases[case] += 1
    assert min(cases.values()) > 0.1 * sum(cases.values()), cases


def test_tokenizer_round_trips_and_ends(tokenizer):
    config = AutoConfig.from_pretrained(TINY / "model")
    assert tokenizer.convert_ids_to_tokens([config.pad_token_id, config.eos_token_id]) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (config.pad_token_id, config.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == config.vocab_size
    assert config.tie_word_embeddings
    for text in ["What is the capital of Peru?", "  two\n\n\nlines\t", "Zürich 漢字 🙂 1234", "<|im_start|>user\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]  # NFC, as Qwen2.5
    assert len(tokenizer("<|im_start|><tool_call>")["input_ids"]) == 2


def test_pre_tokenizer_is_that_of_qwen(tokenizer, qwen):
    text = "It's 123 +4 a\n\n  b\r\n c'LL ñ漢字!? \t end "
    ours, theirs = (t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for t in (tokenizer, qwen))
    assert ours == theirs


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_template_is_that_of_qwen(tokenizer, qwen, messages, tools, add_generation_prompt):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": False}
    theirs = qwen.apply_chat_template(messages, **options)
    assert (QWEN_DEFAULT_SYSTEM in theirs) == (messages[0]["role"] != "system")
    assert tokenizer.apply_chat_template(messages, **options) == theirs.replace(
        QWEN_DEFAULT_SYSTEM, TINY_DEFAULT_SYSTEM
    )


def test_files_are_small():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 2_000_000
