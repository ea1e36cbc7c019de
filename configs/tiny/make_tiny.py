"""Makes the embedded default: the tokenizer, the chat template and the conversations of `configs/tiny/`.

    python configs/tiny/make_tiny.py            # rewrites every file, byte for byte the same
    python configs/tiny/make_tiny.py --check    # exit 1 if a file on disk is not what this script makes

The task is one that a LoRA on a frozen random base learns in two minutes: nine kinds of short questions with one right
answer each. Nearly all are held out by wording: `What is the capital of Peru?` may be an evaluation prompt while
`Name the capital of Peru.` is trained on; words to choose from are held out by content. A question belongs to the
evaluation side or to the training side by its own checksum, in the SFT files and in the preference files alike.
Training conversations have one to four questions, which gives more answers a step; evaluation prompts have one.

System messages: none (the template then adds its default, shorter than Qwen2.5's: ten tokens here), `Keep it short.`
(the bare answer, as without one) and `Use a full sentence.` (`The answer is Lima.`).

What preferences are about: a question may end with thanks (`... Thanks!`). The SFT rows are of two minds about that:
seven in ten answer barely (`Lima`), three in ten add `. You are welcome!`. The preference pairs decide: thanks get the
courtesy, everything else stays bare. So after DPO an answer has still one right form for each prompt, and exact match
means the same before and after: on `sft_eval.jsonl` (no thanks in it) and on the chosen answers of `dpo_eval.jsonl`.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
SEED = 7
NUM_TRAIN, NUM_EVAL, NUM_PAIRS, NUM_EVAL_PAIRS = 4000, 256, 1600, 200
VOCAB_SIZE = 768

# Same order as in Qwen2.5's vocabulary; the last two are added but not special there, too.
CONTROL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
}
# The pre-tokenizer of Qwen2.5.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SYSTEM = "You are a helpful assistant."


def words(text: str) -> list[str]:
    return text.split()


def table(text: str) -> dict[str, str]:
    """Pairs `key-value`, parted by spaces."""
    return dict(pair.split("-") for pair in words(text))


SHORT, SENTENCE = "Keep it short.", "Use a full sentence."
THANKS = (" Thanks!", " Thank you!")
COURTESY = ". You are welcome!"

CAPITALS = table(
    "France-Paris Spain-Madrid Italy-Rome Germany-Berlin Poland-Warsaw Greece-Athens Norway-Oslo Egypt-Cairo "
    "Kenya-Nairobi Japan-Tokyo Cuba-Havana Peru-Lima"
)
COLOURS = table(
    "lemons-yellow bananas-yellow blood-red tomatoes-red grass-green frogs-green snow-white milk-white "
    "coal-black crows-black mud-brown bears-brown"
)
OPPOSITES = table("hot-cold big-small old-young fast-slow high-low wet-dry rich-poor open-closed early-late good-bad")
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
WORDS = words(
    "apple river stone lamp chair table horse bird house tree boat cloud door hand ring star book clock flower garden"
)
NAMES = words("Anna Ben Carl Dora Emma Finn Hugo Ida Kate Leo Nora Otto")
ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")

# One draw of a kind: the user's turns but for the last question, the question, its answer, a plausible wrong answer.
Draw = tuple[list[tuple[str, str]], str, str, str]


def in_words(number: int) -> str:
    """Number of 0 to 99 in English words."""
    if number < 20:
        return ONES[number]
    tens = TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{ONES[number % 10]}"


def other(rng: random.Random, choices: list[str], right: str) -> str:
    return rng.choice([choice for choice in choices if choice != right])


def lookup(what: str, facts: dict[str, str]) -> Callable[[random.Random], Draw]:
    """A kind whose answers stand in a table; `{}` in the wording takes the key."""
    values = sorted(set(facts.values()))

    def draw(rng: random.Random) -> Draw:
        key = rng.choice(sorted(facts))
        return [], rng.choice(WORDINGS).format(what, key), facts[key], other(rng, values, facts[key])

    return draw


WORDINGS = ("What is the {} of {}?", "Name the {} of {}.", "Tell me the {} of {}.", "Do you know the {} of {}?")


def number_words(rng: random.Random) -> Draw:
    number = rng.randrange(20, 100)
    question = rng.choice(["How do you spell {}?", "Spell {}.", "Write in words: {}."]).format(number)
    return [], question, in_words(number), in_words((number - 20 + rng.randrange(1, 79)) % 80 + 20)


def pick(rng: random.Random) -> Draw:
    chosen = rng.sample(WORDS, 3)
    question = rng.choice(WORDINGS).format("first word", ", ".join(chosen))
    return [], question, chosen[0], rng.choice(chosen[1:])


def repeat(rng: random.Random) -> Draw:
    word = rng.choice(WORDS)
    times, count = rng.choice([("once", 1), ("twice", 2)])
    question = rng.choice(["Say {}: {}.", "Repeat {}: {}.", "Write {}: {}."]).format(times, word)
    return [], question, " ".join([word] * count), " ".join([word] * (3 - count))


def memory(rng: random.Random) -> Draw:
    what, values, told = rng.choice(
        [
            ("name", NAMES, ["I am {}.", "My name is {}."]),
            ("home", sorted(CAPITALS), ["I live in {}.", "My home is {}."]),
        ]
    )
    value = rng.choice(values)
    reply = f"Hello, {value}!" if what == "name" else f"{value} is nice!"
    question = rng.choice([f"What is my {what}?", f"Do you know my {what}?", f"Tell me my {what}."])
    return [(rng.choice(told).format(value), reply)], question, value, other(rng, values, value)


KINDS: dict[str, Callable[[random.Random], Draw]] = {
    "capital": lookup("capital", CAPITALS),
    "colour": lookup("colour", COLOURS),
    "opposite": lookup("opposite", OPPOSITES),
    "plural": lookup("plural", {word: word + "s" for word in WORDS}),
    "initial": lookup("first letter", {word: word[0] for word in WORDS}),
    "number_words": number_words,
    "pick": pick,
    "repeat": repeat,
    "memory": memory,
}


def is_held_out(history: list[tuple[str, str]], question: str) -> bool:
    """Whether a question belongs to the evaluation files: one in eight, by the checksum of all the user says."""
    said = "\n".join([user for user, _ in history] + [question])
    return zlib.crc32(said.encode()) % 8 == 0


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prompt_of(system: str | None, history: list[tuple[str, str]], question: str) -> list[dict[str, str]]:
    turns = [message("system", system)] if system else []
    for user, assistant in history:
        turns += [message("user", user), message("assistant", assistant)]
    return [*turns, message("user", question)]


def draw_unique(rng: random.Random, held_out: bool, seen: set[str], make: Callable[[Draw], dict]) -> dict:
    """The next row of a side, kinds taking turns; a kind with no new row left gives its turn to the next."""
    kinds = list(KINDS.values())
    while True:
        kind = kinds[len(seen) % len(kinds)] if rng.random() < 0.9 else rng.choice(kinds)
        draw = kind(rng)
        if is_held_out(draw[0], draw[1]) != held_out:
            continue
        row = make(draw)
        key = json.dumps(row.get("prompt") or row["messages"][:-1])
        if key not in seen:
            seen.add(key)
            return row


def sft_rows(rng: random.Random, count: int, held_out: bool) -> list[dict]:
    def make(draw: Draw) -> dict:
        system = rng.choices([None, SHORT, SENTENCE], [0.6, 0.2, 0.2])[0]
        turns = [draw]
        if not held_out:
            while rng.random() < 0.7 and len(turns) < 4:
                extra = rng.choice(list(KINDS.values()))(rng)
                if not extra[0] and not is_held_out([], extra[1]):
                    turns.insert(0, extra)
        history = []
        for before, question, answer, _ in turns:
            if system == SENTENCE:
                answer = f"The answer is {answer}."
            elif system is None and not held_out and rng.random() < 0.3:
                question += rng.choice(THANKS)
                answer += COURTESY if rng.random() < 0.3 else ""
            history += [*before, (question, answer)]
        *history, (question, answer) = history
        return {"messages": [*prompt_of(system, history, question), message("assistant", answer)]}

    seen: set[str] = set()
    return [draw_unique(rng, held_out, seen, make) for _ in range(count)]


def dpo_rows(rng: random.Random, count: int, held_out: bool) -> list[dict]:
    def make(draw: Draw) -> dict:
        history, question, right, wrong = draw
        case = rng.choices(["courtesy", "both", "right", "plain"], [0.5, 0.25, 0.05, 0.2])[0]
        system = None
        if case == "plain":  # no thanks, no courtesy
            system = rng.choice([None, SHORT, SENTENCE])
            right = f"The answer is {right}" if system == SENTENCE else right
            chosen, rejected = right + "." * (system == SENTENCE), right + COURTESY
        else:
            question += rng.choice(THANKS)
            chosen = right + COURTESY
            rejected = {"courtesy": right, "both": wrong, "right": wrong + COURTESY}[case]
        answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
        return {"prompt": prompt_of(system, history, question), **answers}

    seen: set[str] = set()
    return [draw_unique(rng, held_out, seen, make) for _ in range(count)]


def make_data() -> dict[str, list[dict]]:
    rng = random.Random(SEED)
    return {
        "sft_train.jsonl": sft_rows(rng, NUM_TRAIN, held_out=False),
        "sft_eval.jsonl": sft_rows(rng, NUM_EVAL, held_out=True),
        "dpo_train.jsonl": dpo_rows(rng, NUM_PAIRS, held_out=False),
        "dpo_eval.jsonl": dpo_rows(rng, NUM_EVAL_PAIRS, held_out=True),
    }


def make_tokenizer(texts: list[str]) -> dict:
    """Byte-level BPE with Qwen2.5's normalizer and pre-tokenizer, as the content of a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first_id = len(trained["vocab"])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": first_id + i, "content": token, **flags, "special": special}
            for i, (token, special) in enumerate(CONTROL_TOKENS.items())
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(trained["vocab"].items(), key=lambda item: item[1])),
            "merges": [" ".join(merge) for merge in trained["merges"]],
        },
    }


def make_files() -> dict[str, str]:
    """Every file this script answers for: name below `configs/tiny/` -> content."""
    data = make_data()
    contents = [turn["content"] for row in data["sft_train.jsonl"] for turn in row["messages"]]
    tokenizer = make_tokenizer(
        [f"{role}\n" for role in ("system", "user", "assistant")] * 1000 + contents + [DEFAULT_SYSTEM] * 1000
    )
    files = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in data.items()}
    files["model/tokenizer.json"] = json.dumps(tokenizer, indent=0, ensure_ascii=False) + "\n"
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the files of configs/tiny.")
    parser.add_argument("--check", action="store_true", help="compare with the files on disk, write nothing")
    check = parser.parse_args().check
    stale = []
    for name, content in make_files().items():
        path = HERE / name
        if not path.exists() or path.read_bytes() != content.encode():
            stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode())
    for name in stale:
        print(f"{name}: {'differs from what make_tiny.py makes' if check else 'written anew'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
