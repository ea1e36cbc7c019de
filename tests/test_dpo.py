"""DPO end to end: pairs to log-probabilities, launch/dpo.py as a user runs it, stop and resume, real pairs."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen_train.data.packing import Batch
from qwen_train.loss.preference import metric_sums, metrics_from_sums, preference_loss
from qwen_train.model.packed import PackedLM
from qwen_train.train.evaluate import change_since_start, preference_metrics
from qwen_train.train.progress import Progress
from qwen_train.train.reference import score_pairs
from tests.preferences import (
    batch_of,
    disturb,
    dpo_config,
    few_pairs,
    ids,
    load,
    make_start,
    pairs_of,
    run_dpo,
    swapped,
)
from tests.scripts import ScriptRunner, launch, num_lines, read_metrics, terminate_when
from tests.support import SHARED, needs_shared

TOLERANCE = 1e-5  # nats, fp32


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, cache_dir: Path) -> Path:
    return make_start(scripts, tmp_path_factory.mktemp("sft"), cache_dir)


@pytest.fixture(scope="module")
def data(start: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path):
    config = dpo_config("--model.path", str(start.parent / "base"))
    return pairs_of(config, few_pairs(tmp_path_factory.mktemp("pairs")), cache_dir)


@pytest.fixture
def policy(start: Path) -> PackedLM:
    """A policy far from its start, without dropout."""
    model = load(dpo_config("--model.path", str(start.parent / "base"), "--model.adapter", str(start)))
    disturb(model)
    return model


CONFIG = dpo_config().loss


def loss_and_gradients(model: PackedLM, *batches: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Summed log-probs, gradients of every trained parameter and the loss, with an adapter_off reference."""
    model.zero_grad(set_to_none=True)
    logps, total = [], torch.zeros((), dtype=torch.float64)
    for batch in batches:
        with torch.no_grad(), model.adapter_off():
            expected = batch.sequence_sums(model(batch).logps)
        pairs = score_pairs(model(batch).logps, expected, batch)
        loss = preference_loss(pairs, CONFIG).sum() / 8
        loss.backward()
        total += loss.detach()
        logps += [torch.stack([pairs.chosen_logps, pairs.rejected_logps], dim=1).detach()]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return torch.cat(logps), gradients, total


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# --- Log-probabilities and gradients


def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(policy: PackedLM, data) -> None:
    rows = range(8)
    shared, plain = batch_of(data, rows, True), batch_of(data, rows, False)
    assert shared.num_tokens < plain.num_tokens and shared.kv_index is not None and plain.kv_index is None
    logps, gradients, loss = loss_and_gradients(policy, shared)
    plain_logps, plain_gradients, plain_loss = loss_and_gradients(policy, plain)
    assert float((logps - plain_logps).abs().max()) <= TOLERANCE
    assert furthest(gradients, plain_gradients) <= TOLERANCE
    assert float(loss) == pytest.approx(float(plain_loss), abs=TOLERANCE)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3, "there are gradients to compare"

    # The negative control: rejected read on after chosen, as a layout without restarting positions would have it.
    pair = np.diff(shared.cu_seqlens_q.numpy())
    starts = np.repeat(np.cumsum(pair[0::2] + pair[1::2]) - pair[0::2] - pair[1::2], pair[0::2] + pair[1::2])
    running = torch.from_numpy(np.arange(shared.num_tokens) - starts)
    broken = dataclasses.replace(shared, position_ids=running)
    broken_logps, broken_gradients, _ = loss_and_gradients(policy, broken)
    assert float((broken_logps - plain_logps).abs().max()) > 1e-2
    assert furthest(broken_gradients, plain_gradients) > 1e-4


def test_log_probs_are_sums_over_the_answer_by_a_full_softmax(start: Path, data) -> None:
    """Checks 19 and 21: against transformers' own forward of each whole sequence by itself."""
    base = str(start.parent / "base")
    model = load(dpo_config("--model.path", base))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = []
    for prompt, *answers in ids(data, range(5)):
        for answer in answers:
            sequence = torch.tensor(np.concatenate([prompt, answer]))[None]
            with torch.no_grad():
                logps = plain(sequence).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, sequence[0, 1:, None])[len(prompt) - 1 :]
            assert len(picked) == len(answer)
            expected.append(picked.sum().double())
    batch = batch_of(data, range(5))
    torch.testing.assert_close(batch.sequence_sums(model(batch).logps), torch.stack(expected), atol=1e-4, rtol=0)


def test_batch_mates_order_and_micro_batches_change_nothing(policy: PackedLM, data) -> None:
    """Checks 5, 6 and 20: one micro-batch of 8 pairs, 8 of one, 3 uneven ones in another order."""
    whole = loss_and_gradients(policy, batch_of(data, range(8)))
    single = loss_and_gradients(policy, *(batch_of(data, range(row, row + 1)) for row in range(8)))
    uneven = loss_and_gradients(policy, *(batch_of(data, rows) for rows in (range(5), range(5, 6), range(6, 8))))
    for logps, gradients, loss in (single, uneven):
        assert float((logps - whole[0]).abs().max()) <= TOLERANCE
        assert furthest(gradients, whole[1]) <= TOLERANCE
        assert float(loss) == pytest.approx(float(whole[2]), abs=TOLERANCE)


def test_swapping_chosen_and_rejected_flips_the_margins(policy: PackedLM, data) -> None:
    """Check 25."""
    batch, flipped = batch_of(data, range(8)), swapped(ids(data, range(8)))
    margins = []
    for either in (batch, flipped):
        with torch.no_grad():
            with policy.adapter_off():
                expected = either.sequence_sums(policy(either).logps)
            margins.append(score_pairs(policy(either).logps, expected, either).margin)
    torch.testing.assert_close(margins[0], -margins[1], atol=2e-5, rtol=0)
    assert float(margins[0].abs().min()) > 1e-3


def test_metrics_are_means_over_pairs_whatever_the_micro_batches(policy: PackedLM, data) -> None:
    def sums(rows: range) -> Tensor:
        batch = batch_of(data, rows)
        with torch.no_grad():
            with policy.adapter_off():
                expected = batch.sequence_sums(policy(batch).logps)
            pairs = score_pairs(policy(batch).logps, expected, batch)
        return metric_sums(pairs, preference_loss(pairs, CONFIG), CONFIG)

    whole = preference_metrics("train", sums(range(8)).tolist())
    parts = preference_metrics("train", (sums(range(1)) + sums(range(1, 8))).tolist())
    assert parts == pytest.approx(whole, abs=1e-4)
    means = [metrics_from_sums(sums(rows).tolist())["rewards/margins"] for rows in (range(1), range(1, 8))]
    mean_of_means = sum(means) / 2
    assert abs(mean_of_means - whole["train/rewards/margins"]) > 1e-3
    assert whole["train/logps/chosen_change"] == pytest.approx(whole["train/rewards/chosen"] / 0.1, rel=1e-6)


# --- The script


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, cache_dir: Path) -> Path:
    """A run that nothing interrupted, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_dpo(scripts, start, folder, cache_dir, *LONGER)
    assert done.code == 0, done.output
    return folder / "tiny-dpo"


LONGER = ("--run.steps", "7", "--run.save_every", "2", "--run.eval_every", "3", "--lora.dropout", "0.1",
          "--batch.tokens_per_microbatch", "300")  # fmt: skip


@pytest.mark.launch
def test_a_run_begins_at_ln_2_and_tells_everything(start: Path, tmp_path, scripts, cache_dir) -> None:
    done = run_dpo(scripts, start, tmp_path, cache_dir, "--loss.sft_weight", "0", "--optim.lr", "1e-3")
    assert done.code == 0, done.output
    folder = tmp_path / "tiny-dpo"
    lines = read_metrics(folder)
    assert lines[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert lines[1]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    for side in ("chosen", "rejected", "margins"):
        assert lines[0][f"eval/rewards/{side}"] == pytest.approx(0, abs=1e-7)
        assert lines[1][f"train/rewards/{side}"] == pytest.approx(0, abs=1e-7)
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/saturated",
             "logps/chosen", "logps/rejected", "logps/chosen_per_token", "logps/chosen_change", "loss"}  # fmt: skip
    for prefix, line in (("eval", lines[0]), ("train", lines[2])):
        assert names <= {name.removeprefix(f"{prefix}/") for name in line}
    last = lines[-1]
    assert last["eval/loss"] < lines[0]["eval/loss"] and last["eval/rewards/accuracies"] > 0.5
    assert last["eval/rewards/length_correlation"] <= 1
    assert last["eval/logps/chosen"] == pytest.approx(
        lines[0]["eval/logps/chosen"] + last["eval/logps/chosen_change"], abs=1e-4
    )
    assert "perf/pairs_per_second" in (folder / "metrics.jsonl").read_text()
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "likelihood displacement" in texts["how to read/text_summary"]
    assert "|  | prompt | chosen | policy | reference |" in texts["eval/samples/text_summary"]
    assert "held-out preference accuracy" in done.output


@pytest.mark.launch
@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_a_loss_without_reference_runs_none(loss: str, start: Path, tmp_path, scripts, cache_dir) -> None:
    done = run_dpo(scripts, start, tmp_path, cache_dir, "--loss.name", loss, "--run.steps", "2",
                   prelude="from qwen_train.train.reference import Reference\n"
                           "def fail(self): raise AssertionError('a reference forward')\n"
                           "Reference.active = fail")  # fmt: skip
    assert done.code == 0, done.output
    lines = read_metrics(tmp_path / "tiny-dpo")
    state = json.loads((tmp_path / "tiny-dpo/checkpoints/step-000002/state.json").read_text())
    assert state["reference"] == {}
    assert lines[0]["eval/logps/chosen_change"] == 0 and lines[-1]["eval/logps/chosen_change"] != 0
    assert lines[-1]["eval/logps/chosen"] - lines[0]["eval/logps/chosen"] == pytest.approx(
        lines[-1]["eval/logps/chosen_change"]
    )


def test_the_change_without_a_reference_counts_from_the_first_evaluation_with_numbers() -> None:
    def values(chosen: float, rejected: float) -> dict[str, float]:
        return {"eval/logps/chosen": chosen, "eval/logps/rejected": rejected}

    progress = Progress()
    assert change_since_start(progress, values(-math.inf, -9.0) | {"eval/logps/chosen_change": 0.5}) == {}
    assert progress.start_logps == {}, "the reference tells it"
    assert change_since_start(progress, {}) == {}, "nan, which is no metric"
    assert change_since_start(progress, values(-10.0, -9.0)) == {
        "eval/logps/chosen_change": 0.0, "eval/logps/rejected_change": 0.0,
    }  # fmt: skip
    resumed = Progress(**json.loads(json.dumps(dataclasses.asdict(progress), allow_nan=False)))
    assert change_since_start(resumed, values(-7.0, -math.inf)) == {"eval/logps/chosen_change": 3.0}
    assert change_since_start(resumed, values(-8.0, -10.5)) == {
        "eval/logps/chosen_change": 2.0, "eval/logps/rejected_change": -1.5,
    }  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("number", [3, 6])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(
    number: int, whole: Path, start: Path, tmp_path: Path, scripts: ScriptRunner, cache_dir: Path
) -> None:
    stop = terminate_when(lambda: num_lines(tmp_path / "tiny-dpo" / "metrics.jsonl") >= number)
    stopped = run_dpo(scripts, start, tmp_path, cache_dir, *LONGER, meanwhile=stop)
    assert stopped.code == 128 + 15, stopped.output
    resumed = run_dpo(scripts, start, tmp_path, cache_dir, *LONGER)
    assert resumed.code == 0, resumed.output
    assert "going on from" in resumed.output
    assert "step 0: policy and reference" not in resumed.output, "the audit is for a fresh run"
    assert read_metrics(tmp_path / "tiny-dpo") == read_metrics(whole)
    for name in ("adapter", "adapter_delta"):
        files = [folder / name / "adapter_model.safetensors" for folder in (tmp_path / "tiny-dpo", whole)]
        assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1


@pytest.mark.launch
@pytest.mark.parametrize(
    "arguments", [("--batch.tokens_per_microbatch", "300"), ("--reference.share_prompt", "false")], ids=["micro", "own"]
)
def test_the_course_is_the_same_under_other_micro_batches_and_layouts(
    arguments: tuple[str, ...], start: Path, tmp_path: Path, scripts: ScriptRunner, cache_dir: Path
) -> None:
    for name, given in (("one", ()), ("other", arguments)):
        done = run_dpo(scripts, start, tmp_path / name, cache_dir, *given)
        assert done.code == 0, done.output
    one, other = (read_metrics(tmp_path / name / "tiny-dpo") for name in ("one", "other"))
    for expected, found in zip(one[2:], other[2:], strict=True):  # at first margins are rounding, and so is their sign
        for key in ("train/loss", "train/grad_norm", "train/rewards/margins", "eval/loss", "eval/rewards/margins"):
            if key in expected:
                assert found[key] == pytest.approx(expected[key], abs=TOLERANCE, rel=TOLERANCE), key


@pytest.mark.launch
@pytest.mark.ranks
def test_two_ranks_train_as_one(start: Path, tmp_path: Path, scripts: ScriptRunner, cache_dir: Path) -> None:
    """Seven pairs a step, so that the ranks' shares are uneven; start_adapter, so that a second adapter is there."""
    given = (
        "--batch.sequences_per_step",
        "7",
        "--batch.tokens_per_microbatch",
        "256",
        "--model.adapter_start",
        "continue",
    )
    one = run_dpo(scripts, start, tmp_path / "one", cache_dir, *given)
    assert one.code == 0, one.output

    class Launched:
        def run(self, output: Path, script: str, *arguments: str, **_):
            return launch(script, *arguments, accelerate=("--config_file", "configs/accelerate/ddp_cpu.yaml"))

    two = run_dpo(Launched(), start, tmp_path / "two", cache_dir, *given)
    assert two.code == 0, two.output
    first, second = (read_metrics(tmp_path / name / "tiny-dpo") for name in ("one", "two"))
    for expected, found in zip(first[2:], second[2:], strict=True):
        assert found == pytest.approx(expected, abs=2e-5, rel=2e-5)


@pytest.mark.launch
def test_without_arguments_it_starts_from_the_tiny_sft_run_or_says_that_there_is_none(
    start: Path, tmp_path: Path, scripts: ScriptRunner, cache_dir: Path
) -> None:
    few = ("--run.steps", "1", "--run.eval_samples", "2", "--run.save_every", "0", "--data.cache_dir", str(cache_dir))
    none = scripts.run(tmp_path / "none.txt", "launch/dpo.py", "--run.dir", str(tmp_path), *few)
    assert none.code == 0, none.output
    assert "there is no" in none.output and "start: random weights of" in none.output
    runs = start.parents[1]
    found = scripts.run(tmp_path / "found.txt", "launch/dpo.py", "--run.dir", str(runs), *few)
    assert found.code == 0, found.output
    assert f"start: {start}, merged, on {start.parent / 'base'}" in found.output


# --- Bad input

PROMPT = [{"role": "user", "content": "Hi"}]
YES, NO = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]


def rows_file(folder: Path, *rows: dict) -> Path:
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BAD_ROWS = {
    "without answers": {"prompt": PROMPT},
    "an empty answer": {"prompt": PROMPT, "chosen": [], "rejected": NO},
    "prompts that differ": {"chosen": PROMPT + YES, "rejected": [{"role": "user", "content": "Ho"}, *NO]},
    "roles out of order": {"prompt": YES, "chosen": PROMPT, "rejected": NO},
}


@pytest.mark.launch
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_pair_is_named_with_file_and_line(kind: str, tmp_path: Path, scripts: ScriptRunner, cache_dir) -> None:
    good = {"prompt": PROMPT, "chosen": YES, "rejected": NO}
    path = rows_file(tmp_path, good, BAD_ROWS[kind], good)
    done = run_dpo(
        scripts, None, tmp_path / "run", cache_dir, "--model.from_scratch", "true", "--data.train", str(path)
    )
    errors = [line for line in done.lines if line.startswith("error:")]
    assert done.code == 2 and "Traceback" not in done.output, done.output
    assert len(errors) == 2 and f"{path}:2" in errors[1], done.output


@pytest.mark.launch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss.beta", "0"), "loss.beta: must be > 0"),
        (("--loss.name", "hinge", "--loss.label_smoothing", "0.1"), "loss.label_smoothing: has no effect"),
        (("--model.adapter", "/nonexistent/adapter"), "is not an adapter folder"),
        (("--model.from_scratch", "true"), "random weights are not the base of an adapter"),
        (("--reference.source", "start_adapter"), "start_adapter is for training that continues an adapter"),
        (("--reference.source", "model"), "source model needs a path"),
        (("--data.eval", "[{a.jsonl: 3}]"), "data.eval: the weight of 'a.jsonl' must be 0 or 1, got 3"),
        (("--data.eval_sft", "[{a.jsonl: 0.5}]"), "data.eval_sft: the weight of 'a.jsonl' must be 0 or 1, got 0.5"),
        (("--reference.source", "model", "--reference.path", "/nonexistent"), "reference.path: the folder"),
        (("--loss.name", "simpo", "--reference.precompute", "true"), "reference.precompute: has no effect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], message: str, start: Path, tmp_path, scripts, cache_dir
) -> None:
    done = run_dpo(scripts, start, tmp_path, cache_dir, *arguments)
    errors = [line for line in done.lines if line.startswith("error:")]
    assert done.code == 2 and len(errors) == 1 and message in errors[0], done.output
    assert "Traceback" not in done.output and not (tmp_path / "tiny-dpo").exists()


# --- Real pairs


@needs_shared
@pytest.mark.launch
def test_real_pairs_and_the_real_vocabulary_train_a_small_model(tmp_path: Path, scripts, cache_dir) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (SHARED / "qwen2.5-tokenizer").iterdir():
        if file.name != "config-7b.json":
            (model / file.name).symlink_to(file)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "tie_word_embeddings": True}  # fmt: skip
    config = json.loads((SHARED / "qwen2.5-tokenizer" / "config-7b.json").read_text()) | small
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    rows = SHARED / "data" / "dpo_en_demo.json"
    sections = {
        "model": {"path": str(model), "from_scratch": True, "dtype": "float32", "compile": False},
        "lora": {"r": 8},
        "data": {"train": str(rows), "max_length": 1024, "too_long": "trim_turns", "workers": 0},
        "batch": {"sequences_per_step": 4, "tokens_per_microbatch": 2048},
        "loss": {"sft_weight": 0.1},
        "run": {"name": "real", "steps": 3, "log_every": 1},
    }
    (tmp_path / "real.yaml").write_text(json.dumps(sections))
    given = ("--config", str(tmp_path / "real.yaml"), "--run.dir", str(tmp_path), "--data.cache_dir", str(cache_dir))
    done = scripts.run(tmp_path / "real.txt", "launch/dpo.py", *given)
    assert done.code == 0, done.output
    (report,) = [line for line in done.lines if line.startswith("data.train:")]
    total = len(json.loads(rows.read_text()))
    kept, seen = int(report.split()[1]), int(report.split()[3])
    dropped = sum(int(part.split()[-1]) for part in report.split("; ") if part.startswith("dropped"))
    assert seen == total == kept + dropped and kept > 0.9 * total, report
    lines = read_metrics(tmp_path / "real")
    assert lines[0]["train/loss"] == pytest.approx(0.693147 - 0.1 * lines[0]["train/logps/chosen_per_token"], abs=1e-4)
    assert (tmp_path / "real" / "adapter" / "adapter_model.safetensors").exists()
