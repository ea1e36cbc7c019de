"""Makes the embedded default: the tokenizer, the chat template and the conversations of `configs/tiny/`.

    python configs/tiny/make_tiny.py            # rewrites every file, byte for byte the same
    python configs/tiny/make_tiny.py --check    # exit 1 if a file on disk is not what this script makes

The task is what half a million parameters learn from random weights in two minutes: sixteen kinds of short questions
with one right answer each. Facts (capitals, colours, opposites) are held out by wording: `What is the capital of Peru?`
may be an evaluation prompt while `Name the capital of Peru.` is trained on. Every other kind is held out by content:
the digits to sort, the words to choose from, the name to remember were never seen together. A question belongs to the
evaluation side or to the training side by its own checksum, in the SFT files and in the preference files alike.

System messages: none (the template then adds its default), `Keep it short.` (the bare answer, as without one) and
`Use a full sentence.` (`The answer is Lima.`).

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
NUM_TRAIN, NUM_EVAL, NUM_PAIRS, NUM_EVAL_PAIRS = 6000, 256, 1600, 200
VOCAB_SIZE = 1024

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
    "France-Paris Spain-Madrid Italy-Rome Germany-Berlin Austria-Vienna Poland-Warsaw Greece-Athens "
    "Norway-Oslo Sweden-Stockholm Finland-Helsinki Denmark-Copenhagen Ireland-Dublin Portugal-Lisbon "
    "Hungary-Budapest Egypt-Cairo Kenya-Nairobi Japan-Tokyo China-Beijing Cuba-Havana Peru-Lima"
)
COLOURS = table(
    "lemon-yellow banana-yellow blood-red tomato-red grass-green frog-green leaf-green snow-white milk-white "
    "salt-white coal-black crow-black sky-blue sea-blue mud-brown bear-brown cloud-grey mouse-grey"
)
OPPOSITES = table(
    "hot-cold big-small old-young fast-slow high-low wet-dry rich-poor light-dark long-short full-empty "
    "open-closed early-late good-bad hard-soft loud-quiet"
)
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
WORDS = words(
    "apple river stone lamp chair table horse bird house tree boat train cloud door glass hand ring road "
    "ship shoe star wall book clock flower garden island king letter moon paper queen rope song tower window"
)
NAMES = words("Anna Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kate Leo Mira Nora Otto Paul Rosa Sam Tina Vera")
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


def lookup(facts: dict[str, str], *wordings: str) -> Callable[[random.Random], Draw]:
    """A kind whose answers stand in a table; `{}` in the wording takes the key."""
    values = sorted(set(facts.values()))

    def draw(rng: random.Random) -> Draw:
        key = rng.choice(sorted(facts))
        return [], rng.choice(wordings).format(key), facts[key], other(rng, values, facts[key])

    return draw


def number_words(rng: random.Random) -> Draw:
    number = rng.randrange(100)
    question = rng.choice(["Write {} in words.", "How do you spell {}?", "Spell the number {}."]).format(number)
    return [], question, in_words(number), in_words((number + rng.randrange(1, 99)) % 100)


def successor(rng: random.Random) -> Draw:
    number = rng.randrange(100)
    question, step = rng.choice(
        [("What comes after {}?", 1), ("Count on from {}.", 1), ("Which number follows {}?", 1)]
    )
    return [], question.format(number), str(number + step), str(number + rng.choice([0, 2]))


def addition(rng: random.Random) -> Draw:
    left, right = rng.randrange(10), rng.randrange(10)
    question = rng.choice(["What is {} + {}?", "Add {} and {}.", "{} plus {}?"]).format(left, right)
    return [], question, str(left + right), str(left + right + rng.choice([1, 2]))


def comparison(rng: random.Random) -> Draw:
    left, right = rng.sample(range(10), 2)
    question, larger = rng.choice([("Is {} larger than {}?", True), ("Is {} smaller than {}?", False)])
    answer = "yes" if (left > right) == larger else "no"
    return [], question.format(left, right), answer, "no" if answer == "yes" else "yes"


def extreme(rng: random.Random) -> Draw:
    numbers = rng.sample(range(10), 3)
    question, choose = rng.choice([("Largest of {} {} {}?", max), ("Smallest of {} {} {}?", min)])
    answer = str(choose(numbers))
    return [], question.format(*numbers), answer, other(rng, [str(n) for n in numbers], answer)


def reverse(rng: random.Random) -> Draw:
    digits = [str(rng.randrange(10)) for _ in range(4)]
    while digits == digits[::-1]:
        digits = [str(rng.randrange(10)) for _ in range(4)]
    question = rng.choice(["Reverse {}.", "Write {} backwards."]).format(" ".join(digits))
    return [], question, " ".join(digits[::-1]), " ".join(digits)


def sort(rng: random.Random) -> Draw:
    digits = rng.sample(range(10), 3)
    while digits == sorted(digits):
        digits = rng.sample(range(10), 3)
    question = rng.choice(["Sort {}.", "Put {} in order."]).format(" ".join(map(str, digits)))
    return [], question, " ".join(map(str, sorted(digits))), " ".join(map(str, digits))


def pick(rng: random.Random) -> Draw:
    words = rng.sample(WORDS, 3)
    wording, index = rng.choice([("First", 0), ("Last", 2), ("Second", 1)])
    answer = words[index]
    return [], f"{wording} word of: {', '.join(words)}?", answer, other(rng, words, answer)


def repeat(rng: random.Random) -> Draw:
    word = rng.choice(WORDS)
    times, count = rng.choice([("once", 1), ("twice", 2), ("three times", 3)])
    verb = rng.choice(["Say", "Repeat", "Write"])
    return [], f"{verb} {word} {times}.", " ".join([word] * count), " ".join([word] * (count % 3 + 1))


def counting(rng: random.Random) -> Draw:
    word, count = rng.choice(WORDS), rng.randrange(1, 6)
    question = rng.choice(["Count: {}.", "How many words: {}?"]).format(" ".join([word] * count))
    return [], question, str(count), str(count % 5 + 1)


def plural(rng: random.Random) -> Draw:
    word = rng.choice(WORDS)
    question = rng.choice(["What is the plural of {}?", "Plural of {}?", "One {}, two what?", "Say {} in the plural."])
    return [], question.format(word), word + "s", other(rng, WORDS, word) + "s"


def initial(rng: random.Random) -> Draw:
    word = rng.choice(WORDS)
    question = rng.choice(["First letter of {}?", "How does {} begin?", "Which letter starts {}?", "Initial of {}?"])
    return [], question.format(word), word[0], other(rng, sorted({w[0] for w in WORDS}), word[0])


def memory(rng: random.Random) -> Draw:
    name, age = rng.choice(NAMES), str(rng.randrange(10, 100))
    first = rng.choice(["I am {}, aged {}.", "My name is {}, my age is {}.", "Hi, {} here, {} years old."])
    history = [(first.format(name, age), f"Hello, {name}!")]
    if rng.random() < 0.5:
        return history, rng.choice(["What is my name?", "Who am I?"]), name, other(rng, NAMES, name)
    return history, rng.choice(["How old am I?", "What is my age?"]), age, str(int(age) % 90 + 10)


KINDS: dict[str, Callable[[random.Random], Draw]] = {
    "capital": lookup(
        CAPITALS,
        "What is the capital of {}?",
        "Name the capital of {}.",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
        "Capital of {}?",
    ),
    "colour": lookup(
        COLOURS,
        "What colour is the {}?",
        "Name the colour of the {}.",
        "Which colour has the {}?",
        "Tell me the colour of the {}.",
    ),
    "opposite": lookup(
        OPPOSITES, "What is the opposite of {}?", "Name the opposite of {}.", "Opposite of {}?", "What is not {}?"
    ),
    "number_words": number_words,
    "successor": successor,
    "addition": addition,
    "comparison": comparison,
    "extreme": extreme,
    "reverse": reverse,
    "sort": sort,
    "pick": pick,
    "repeat": repeat,
    "counting": counting,
    "plural": plural,
    "initial": initial,
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
        history, question, answer, _ = draw
        system = rng.choices([None, SHORT, SENTENCE], [0.6, 0.2, 0.2])[0]
        if system == SENTENCE:
            answer = f"The answer is {answer}."
        elif system is None and not held_out and rng.random() < 0.3:
            question += rng.choice(THANKS)
            answer += COURTESY if rng.random() < 0.3 else ""
        return {"messages": [*prompt_of(system, history, question), message("assistant", answer)]}

    seen: set[str] = set()
    return [draw_unique(rng, held_out, seen, make) for _ in range(count)]


def dpo_rows(rng: random.Random, count: int, held_out: bool) -> list[dict]:
    def make(draw: Draw) -> dict:
        history, question, right, wrong = draw
        case = rng.choices(["courtesy", "both", "right", "plain"], [0.5, 0.15, 0.15, 0.2])[0]
        if case == "plain":  # no thanks, no courtesy
            chosen, rejected = right, right + COURTESY
        else:
            question += rng.choice(THANKS)
            chosen = right + COURTESY
            rejected = {"courtesy": right, "both": wrong, "right": wrong + COURTESY}[case]
        answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
        return {"prompt": prompt_of(None, history, question), **answers}

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
    contents = [
        turn["content"]
        for rows in data.values()
        for row in rows
        for turn in row.get("messages") or [*row["prompt"], *row["chosen"]]
    ]
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
