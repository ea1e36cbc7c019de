"""Metrics: every step once and under its name, in TensorBoard and metrics.jsonl, also after a resume; true numbers."""

import io
import json
import math
import os
import signal
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_train.model.compile import compiled_graphs
from qwen_train.train import metrics
from qwen_train.train.metrics import (
    Metrics,
    Throughput,
    flops_per_token,
    matmul_parameters,
    peak_memory_gib,
)
from qwen_train.train.status import this_process, write_status
from tests.faulty_disk import in_child


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, soft_wrap=True)


def board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(name)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, first: int, last: int, resume_step: int | None, value: float) -> None:
    with Metrics(folder, 20, resume_step, True, console=console()) as log:
        for step in range(first, last + 1):
            log.log(step, {"train/loss": value + step})
            if step % 5 == 0:
                log.log(step, {"eval/loss": value - step})


# One line a step, the same names -------------------------------------------------------------------------------------


def test_a_step_is_one_line_with_the_names_of_tensorboard(tmp_path):
    train(tmp_path, 1, 10, None, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 11))
    assert lines(tmp_path)[4] == {"step": 5, "train/loss": 5.0, "eval/loss": -5.0}
    assert lines(tmp_path)[5] == {"step": 6, "train/loss": 6.0}
    assert {*board(tmp_path).Tags()["scalars"]} == {"train/loss", "eval/loss"}
    assert scalars(tmp_path, "train/loss") == [(step, float(step)) for step in range(1, 11)]


def test_lines_are_there_as_soon_as_they_are_logged(tmp_path):
    def die() -> None:
        log = Metrics(tmp_path, 20, None, True, console=console())
        log.log(1, {"train/loss": 1.0})
        log.log(2, {"train/loss": 2.0})
        log.log(2, {"eval/loss": 3.0})
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0, "eval/loss": 3.0}]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_whole_lines(tmp_path):
    with Metrics(tmp_path, 20, None, True, console=console()) as log:
        write = log.file.write
        log.file = Mock(wraps=log.file, closed=False, write=lambda data: write(data[:7]))
        log.log(1, {"train/loss": 1.0})
        log.log(2, {"train/loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}]


def test_what_is_not_finite_is_null_and_never_stops_a_run(tmp_path):
    values = {"train/loss": math.nan, "train/grad_norm": math.inf, "perf/x": -math.inf, "train/epoch": 1}
    with Metrics(tmp_path, 20, None, True, console=console()) as log:
        log.log(1, values)
        log.log(2, {"train/loss": torch.tensor(0.5).item()})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path)[0] == {
        "step": 1, "train/loss": None, "train/grad_norm": None, "perf/x": None, "train/epoch": 1.0,
    }  # fmt: skip
    assert math.isnan(scalars(tmp_path, "train/loss")[0][1])


# Resume --------------------------------------------------------------------------------------------------------------


def test_after_a_resume_every_step_is_there_once(tmp_path):
    train(tmp_path, 1, 10, None, 0.0)  # died after step 10, its last checkpoint was of step 6
    train(tmp_path, 7, 14, 6, 100.0)
    train(tmp_path, 14, 20, 13, 200.0)
    expected = [(step, step + (0.0 if step <= 6 else 100.0 if step <= 13 else 200.0)) for step in range(1, 21)]
    assert scalars(tmp_path, "train/loss") == expected
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert [step for step, _ in scalars(tmp_path, "eval/loss")] == [5, 10, 15, 20]
    assert [line["step"] for line in lines(tmp_path) if "eval/loss" in line] == [5, 10, 15, 20]


def test_without_the_purge_tensorboard_would_show_steps_twice(tmp_path):
    """The negative control of the test above."""
    for first, last in ((1, 10), (7, 14)):
        with SummaryWriter(tmp_path) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("train/loss", step, step)
    steps = [step for step, _ in scalars(tmp_path, "train/loss")]
    assert len(steps) == 18 and len({*steps}) == 14


def test_a_fresh_start_forgets_what_was_logged_before(tmp_path):
    train(tmp_path, 0, 10, None, 0.0)
    train(tmp_path, 0, 3, None, 100.0)
    assert [line["train/loss"] for line in lines(tmp_path)] == [100.0, 101.0, 102.0, 103.0]
    assert scalars(tmp_path, "train/loss") == [(step, 100.0 + step) for step in range(4)]


def test_resume_from_the_start_keeps_the_evaluation_before_training(tmp_path):
    train(tmp_path, 0, 2, None, 0.0)
    train(tmp_path, 1, 2, 0, 100.0)
    assert [line["train/loss"] for line in lines(tmp_path)] == [0.0, 101.0, 102.0]


def test_a_torn_last_line_goes(tmp_path):
    train(tmp_path, 1, 4, None, 0.0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "train/lo')
    train(tmp_path, 5, 6, 4, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    train(tmp_path, 3, 3, 2, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


# Console, texts, ranks -----------------------------------------------------------------------------------------------


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    out = console()
    log = Metrics(tmp_path, 200, None, True, console=out)
    log.advance(5)
    log.log(10, {"train/loss": 1.23456, "train/learning_rate": 2e-5, "perf/tokens_per_second": 12345.6, "train/x": 1.0})
    log.log(10, {"eval/exact_match": 0.25, "eval/logps/chosen": -3.0, "eval/loss": 0.5})  # logps: in the files alone
    log.log(20, {"train/loss": math.nan})
    log.note("[note] as it is")
    log.close()
    assert out.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 10/200  loss 1.2346  lr 2.00e-05  tok/s 12,346  eta 0:15:50",
        "step 10/200  eval/loss 0.5000  eval/exact_match 0.2500",
        "step 20/200  loss nan  eta 0:22:30",
        "[note] as it is",
    ]


def test_a_bar_on_a_terminal(tmp_path):
    out = console(terminal=True)
    with Metrics(tmp_path, 50, 10, True, console=out) as log:
        log.advance(11)
        log.log(20, {"train/loss": 1.5, "train/learning_rate": 1e-5})
        log.log(20, {"eval/loss": 0.5})
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "step 10/50" in shown and "eta 0:00:0" in shown
    assert "step 20/50  loss 1.5000  lr 1.00e-05\n" in shown and "step 20/50  eval/loss 0.5000\n" in shown, "they stay"
    assert shown.endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("width", [45, 80, 200])
def test_a_narrow_terminal_loses_the_bar_and_not_the_step(tmp_path, width):
    out = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, soft_wrap=True)
    with Metrics(tmp_path, 18000, None, True, console=out) as log:
        log.log(12345, {"train/loss": 1.5, "train/grad_norm": 2.0, "perf/tokens_per_second": 1e6})
        paper = Console(file=io.StringIO(), width=width)
        assert log.progress is not None
        paper.print(log.progress.get_renderable())
    (bar,) = paper.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert bar.startswith("step 12345/18000 ") and bar.rstrip().endswith("0:00:00 eta 0:00:00") and len(bar) <= width
    assert (bar.count("\u2501") > 20) is (width > 45)


def test_samples_and_texts_reach_tensorboard_and_cannot_become_markup(tmp_path):
    hostile = ["```\n<script>alert(1)</script>", "a|b\n    # no *heading*", "", "[x](http://a.b) &amp; <br>"]
    rows = [{"prompt": f"2+{number}?", "answer": hostile[number % 4]} for number in range(256)]
    with Metrics(tmp_path, 10, None, True, console=console()) as log:
        log.text(0, "how to read", "margins are in nats")
        log.samples(3, "samples", rows)
        log.samples(3, "none", [])
    events = board(tmp_path)
    assert {*events.Tags()["tensors"]} == {"how to read/text_summary", "samples/text_summary"}
    event = events.Tensors("samples/text_summary")[0]
    assert event.step == 3
    shown = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert shown.startswith("<p>The first 10 of 256 held-out answers.</p>")
    table = ElementTree.fromstring(f"<a>{shown.replace('<br>', '<br/>')}</a>").find("table")
    assert table is not None and [cell.text for cell in table.iterfind("thead/tr/th")] == [None, "prompt", "answer"]
    cells = [["\n".join(cell.itertext()).replace("\xa0", " ") for cell in line] for line in table.iterfind("tbody/tr")]
    assert cells == [[str(number + 1), *rows[number].values()] for number in range(10)]
    assert {part.tag for part in table.iterfind("tbody//td/*")} == {"br"}


def test_other_ranks_write_and_print_nothing(tmp_path):
    out = console()
    with Metrics(tmp_path / "run", 10, None, False, console=out) as log:
        log.log(1, {"train/loss": 1.0})
        log.advance(1)
        log.text(1, "a", "b")
        log.samples(1, "a", [{"b": "c"}])
        log.note("x")
        log.sync()
    assert not (tmp_path / "run").exists()
    assert out.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_step_cannot_go_back(tmp_path):
    with Metrics(tmp_path, 10, None, True, console=console()) as log:
        log.log(2, {"train/loss": 1.0})
        with pytest.raises(AssertionError, match="step 1 after 2"):
            log.log(1, {"train/loss": 1.0})


def test_status_is_json_that_any_scheduler_reads(tmp_path):
    write_status(tmp_path, "running", step=0)
    write_status(tmp_path, "failed", "loss is nan", step=7, loss=math.nan, checkpoint=None, shares=[0.5, math.inf])
    status = json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail)
    assert (status["outcome"], status["reason"], status["step"]) == ("failed", "loss is nan", 7)
    assert (status["loss"], status["checkpoint"], status["shares"]) == (None, None, [0.5, None])
    assert status["pid"] == os.getpid() and status["time"].endswith("+00:00")
    assert status["process"] == this_process() != str(os.getpid())
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    with pytest.raises(AssertionError):
        write_status(tmp_path, "done")


# Speed and memory ----------------------------------------------------------------------------------------------------

QWEN_7B = Qwen2Config(
    hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28,
    vocab_size=152064,
)  # fmt: skip


@pytest.mark.parametrize(("length", "lora", "full"), [(2048, 30.48, 43.65), (4096, 31.72, 44.89), (8192, 34.18, 47.35)])
def test_flops_of_qwen2_5_7b_are_the_worked_out_ones(length, lora, full):
    assert flops_per_token(QWEN_7B, length, lora_parameters=161_480_704) / 1e9 == pytest.approx(lora, abs=0.01)
    assert flops_per_token(QWEN_7B, length, lora_parameters=None) / 1e9 == pytest.approx(full, abs=0.01)


def test_flops_of_parts():
    full = flops_per_token(QWEN_7B, 0, lora_parameters=None)
    half = flops_per_token(QWEN_7B, 0, lora_parameters=None, head_fraction=0.5)
    assert full - half == 6 * 3584 * 152064 / 2
    policy = flops_per_token(QWEN_7B, 2048, lora_parameters=0)
    reference = flops_per_token(QWEN_7B, 2048, lora_parameters=0, reference_forward=True) - policy
    assert reference / 1e9 == pytest.approx(14.55, abs=0.01)  # the design notes' forward pass at s = 2048


@pytest.mark.parametrize(
    ("config", "model"), [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)], ids=["qwen2", "qwen3"]
)
def test_flops_are_those_that_torch_counts(config, model):
    """Against torch's own counter on a real forward and backward; it counts the whole square of attention."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    extra = {"head_dim": 32} if config is Qwen3Config else {}
    tiny = config(**shape, **extra, num_hidden_layers=3, vocab_size=128, attn_implementation="eager")
    length = 24
    counter = FlopCounterMode(display=False)
    with counter:
        model(tiny)(torch.arange(length)[None]).logits.sum().backward()
    ours = flops_per_token(tiny, 2 * length, lora_parameters=None) * length
    # The embedding's output needs no gradient product; the rotary table is a small product of its own.
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)
    layers, head = matmul_parameters(tiny)
    weights = {name: parameter.numel() for name, parameter in model(tiny).named_parameters() if parameter.dim() == 2}
    assert layers == sum(size for name, size in weights.items() if "layers" in name)
    assert head == weights["model.embed_tokens.weight"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until a test moves it: clock[0] += seconds."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_throughput_counts_training_time_only(clock):
    meter = Throughput(torch.device("cpu"), lambda length: length * 1e9, world_size=2, unit="pairs")

    def loader():
        for item in range(2):
            clock[0] += 1.0
            yield item

    for _ in meter.watch(loader()):
        clock[0] += 4.0
        meter.add(num_tokens=1000, num_sequences=10, mean_length=125.0)
    with meter.paused():
        clock[0] += 500.0
    values = meter.read()
    memory = values.pop("perf/peak_memory_gib")
    assert values == pytest.approx(
        {
            "perf/tokens_per_second": 200.0,
            "perf/pairs_per_second": 2.0,
            "perf/step_seconds": 5.0,
            "perf/model_tflops": 2000 * 125e9 / 10 / 2 / 1e12,
            "perf/data_wait_fraction": 0.2,
            "perf/compiled_graphs": compiled_graphs(),
        }
    )
    assert 0.05 < memory < 1000
    clock[0] += 1.0
    meter.add(num_tokens=7, num_sequences=1, mean_length=50.0)
    values = meter.read()  # a new window
    assert values["perf/tokens_per_second"] == pytest.approx(7.0)
    assert values["perf/model_tflops"] == pytest.approx(7 * 50e9 / 2 / 1e12)


def test_an_empty_window_is_zero_and_no_crash(clock):
    values = Throughput(torch.device("cpu"), lambda length: 1.0, 1).read()
    assert values["perf/tokens_per_second"] == 0.0 and values["perf/data_wait_fraction"] == 0.0
    assert "perf/pairs_per_second" not in values


def test_peak_memory_sees_an_allocation():
    def grown() -> None:  # in a process of its own, whose peak is what it is now
        before = peak_memory_gib(torch.device("cpu"))
        block = torch.ones(int(before * 2**28) + 2**26)  # more than all there was, and 256 MiB
        assert before < block.nbytes / 2**30 - 0.2
        assert peak_memory_gib(torch.device("cpu")) >= block.nbytes / 2**30

    assert in_child(grown) == 0
