"""launch/sft.py as a user runs it: what it leaves behind, stop and resume, refusals, and the real vocabulary."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts import TINY, Result, ScriptRunner, launch, num_lines, read_metrics, terminate_when
from tests.support import SHARED, needs_shared

pytestmark = pytest.mark.launch

STEPS, SAVE_EVERY, EVAL_EVERY = 14, 5, 4


@dataclass(frozen=True)
class Tiny:
    """A run of the embedded default cut down to seconds: 64 rows, dropout on, every step logged."""

    folder: Path
    cache_dir: Path
    scripts: ScriptRunner

    def arguments(self, name: str, *more: str) -> list[str]:
        given = {
            "run.dir": self.folder,
            "run.name": name,
            "data.train": self.folder / "train.jsonl",
            "data.eval": self.folder / "eval.jsonl",
            "data.cache_dir": self.cache_dir,
            "run.steps": STEPS,
            "run.log_every": 1,
            "run.save_every": SAVE_EVERY,
            "run.eval_every": EVAL_EVERY,
            "run.eval_samples": 3,
            "run.eval_sample_tokens": 4,
            "lora.r": 8,
            "lora.dropout": 0.1,
            "batch.sequences_per_step": 8,
            "batch.tokens_per_microbatch": 256,  # several micro-batches a step
        }
        overridden = {word.split("=")[0].removeprefix("--") for word in more}
        return [*(f"--{key}={value}" for key, value in given.items() if key not in overridden), *more]

    def run(self, name: str, *more: str, meanwhile: Callable[[int], None] | None = None, prelude: str = "") -> Result:
        output = self.folder / f"{name}.txt"
        arguments = self.arguments(name, *more)
        return self.scripts.run(output, "launch/sft.py", *arguments, meanwhile=meanwhile, prelude=prelude)

    def status(self, name: str) -> dict:
        return json.loads((self.folder / name / "status.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> Tiny:
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("train", 64), ("eval", 8)):
        lines = (TINY / f"sft_{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return Tiny(folder, cache_dir, scripts)


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> Path:
    """The folder of a run that nothing interrupted."""
    result = tiny.run("whole")
    assert result.code == 0, result.output
    return tiny.folder / "whole"


def test_the_logged_loss_is_that_of_its_step(tiny: Tiny, whole: Path):
    """Not a mean since the line before: with a line every third step the numbers of those steps are the same."""
    result = tiny.run("seldom", "--run.log_every=3")
    assert result.code == 0, result.output
    names = ("train/loss", "train/grad_norm", "train/mean_token_accuracy", "train/num_tokens")
    often = {line["step"]: [line.get(name) for name in names] for line in read_metrics(whole)}
    seldom = {line["step"]: [line.get(name) for name in names] for line in read_metrics(tiny.folder / "seldom")}
    logged = [step for step, values in seldom.items() if values[0] is not None]
    assert {3, 6, 9} <= set(logged) and 4 not in logged
    assert all(seldom[step] == often[step] for step in logged)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_end(one: Path, other: Path) -> None:
    """Two run folders ended in the same weights, optimizer state, adapter and log, bit for bit."""
    for name in (
        f"checkpoints/step-{STEPS:06d}/model.safetensors",
        f"checkpoints/step-{STEPS:06d}/optimizer.safetensors",
    ):
        assert digest(one / name) == digest(other / name), name
    assert digest(one / "adapter/adapter_model.safetensors") == digest(other / "adapter/adapter_model.safetensors")
    assert read_metrics(one) == read_metrics(other)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_through_accelerate_launch(tiny: Tiny):
    """The documented command; all names of DESIGN section 4 in the log, in TensorBoard and on the disk."""
    result = launch("launch/sft.py", *tiny.arguments("launched", "--run.steps=3"))
    assert result.code == 0, result.output
    folder = tiny.folder / "launched"
    assert tiny.status("launched")["outcome"] == "finished" and tiny.status("launched")["step"] == 3

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    train = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "mean_token_accuracy"}
    train |= {"skipped_steps", "oom_retries"}
    perf = {"tokens_per_second", "step_seconds", "model_tflops", "peak_memory_gib", "data_wait_fraction"}
    perf |= {"compiled_graphs"}
    evaluation = {"loss", "mean_token_accuracy", "turns_ended", "exact_match", "samples_ended"}
    names = {f"{kind}/{name}" for kind, all_of in (("train", train), ("perf", perf)) for name in all_of}
    eval_names = {f"eval/{name}" for name in evaluation}
    assert set(lines[0]) == eval_names | {"step"}
    assert set(lines[1]) == set(lines[2]) == names | {"step"}
    assert set(lines[3]) == names | eval_names | {"step"}
    assert lines[3]["train/loss"] < lines[1]["train/loss"]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == names | eval_names
    for name in ("train/loss", "eval/loss"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(v)) for s, v in logged]
    assert events.Tags()["tensors"] == ["how to read/text_summary", "eval/samples/text_summary"]

    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    ):
        assert (folder / "adapter" / name).stat().st_size > 0
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "base"
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["run"]["steps"] == 3 and config["model"]["checkpoint_layers"] == 0
    with safe_open(folder / "base/model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 10
    assert "held-out loss" in result.output and str(folder / "adapter") in result.output
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name or path.suffix in (".bin", ".pt", ".pkl")]


def test_a_finished_run_says_so(tiny: Tiny, whole: Path):
    before = {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    result = tiny.run("whole")
    assert result.code == 0 and "is finished" in result.lines[-1]
    assert before == {path: digest(path) for path in whole.rglob("*") if path.is_file()}


def test_checkpoints_rotate_and_resolved_numbers_are_written(tiny: Tiny, whole: Path):
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000010", "step-000014"]
    state = json.loads((whole / "checkpoints/step-000014/state.json").read_text())
    assert state["step"] == STEPS and state["world_size"] == 1 and state["evaluated"] == STEPS
    steps = [line["step"] for line in read_metrics(whole)]
    assert steps == list(range(STEPS + 1))
    assert [line["step"] for line in read_metrics(whole) if "eval/loss" in line] == [0, 4, 8, 12, 14]


def test_auto_values_are_resolved_once(tiny: Tiny):
    """`auto` becomes a number in config.yaml when the run begins, and a resumed run keeps that number."""
    arguments = ("--batch.tokens_per_microbatch=auto", "--model.checkpoint_layers=auto", "--run.steps=6")
    log = tiny.folder / "auto" / "metrics.jsonl"
    stopped = tiny.run("auto", *arguments, meanwhile=terminate_when(lambda: num_lines(log) >= 2))
    assert stopped.code == 128 + signal.SIGTERM
    path = tiny.folder / "auto" / "config.yaml"
    resolved = yaml.safe_load(path.read_text())
    assert resolved["batch"]["tokens_per_microbatch"] == 4096 and resolved["model"]["checkpoint_layers"] == 0
    resolved["batch"]["tokens_per_microbatch"] = 5000
    path.write_text(yaml.safe_dump(resolved))
    assert tiny.run("auto", *arguments).code == 0
    assert yaml.safe_load(path.read_text())["batch"]["tokens_per_microbatch"] == 5000


# --- stop and resume --------------------------------------------------------------------------------------------------


# The script in a process whose parent goes when the first steps are logged, as a shell does that was closed.
PARENT_GOES = """
import os, pathlib, time
log = pathlib.Path({log!r})
if os.fork():
    while not log.exists() or log.read_bytes().count(b"\\n") < 3:
        time.sleep(0.01)
    os._exit(0)
"""


def test_the_end_of_a_shell_is_not_the_end_of_a_run(tiny: Tiny, whole: Path):
    """Under a launcher it is: test_processes_end_with_their_launcher."""
    assert tiny.run("left", prelude=PARENT_GOES.format(log=str(tiny.folder / "left/metrics.jsonl"))).code == 0
    deadline = time.monotonic() + 60
    while tiny.status("left")["outcome"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tiny.status("left")["outcome"] == "finished"
    same_end(whole, tiny.folder / "left")


# A script on a terminal of its own, which it is the first to open.
ON_TERMINAL = """
import os, signal
os.setsid()
signal.signal(signal.SIGHUP, signal.{handler})
terminal = os.open({path!r}, os.O_RDWR)
os.dup2(terminal, 1), os.dup2(terminal, 2)
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal(tiny: Tiny, whole: Path, nohup: bool):
    """SIGHUP saves and leaves; where it is ignored, as under nohup, the run goes on. Prints then fail, which is all."""
    name = f"hung-up-{nohup}"
    log = tiny.folder / name / "metrics.jsonl"
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    said = bytearray()

    def shown() -> bool:
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(ours, 65536))
        return num_lines(log) >= 3

    def close(*_: int) -> None:
        os.close(theirs)
        os.close(ours)

    prelude = ON_TERMINAL.format(path=os.ttyname(theirs), handler="SIG_IGN" if nohup else "SIG_DFL")
    result = tiny.run(name, meanwhile=terminate_when(shown, send=close), prelude=prelude)
    assert b"step 1/" in said and result.output == "", said.decode()
    if not nohup:
        assert result.code == 128 + signal.SIGHUP and "stopped after step" in tiny.status(name)["reason"]
        result = tiny.run(name)
    assert result.code == 0 and tiny.status(name)["outcome"] == "finished", result.output
    same_end(whole, tiny.folder / name)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group(tiny: Tiny, whole: Path, number: signal.Signals):
    """A terminal that closes, or Ctrl-C in it, reaches the workers too: the step is done and saved all the same."""
    name = f"group-{number.name}"
    log = tiny.folder / name / "metrics.jsonl"
    prelude = "import os, signal; os.setsid(); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    to_all = terminate_when(lambda: num_lines(log) >= 3, number, os.killpg)
    result = tiny.run(name, "--data.workers=2", meanwhile=to_all, prelude=prelude)
    assert result.code == 128 + number and "Traceback" not in result.output, result.output
    status = tiny.status(name)
    assert status["outcome"] == "interrupted" and f"stopped after step {status['step']} of" in status["reason"]
    assert (tiny.folder / name / "checkpoints" / f"step-{status['step']:06d}").is_dir() and status["step"] >= 2
    assert tiny.run(name, "--data.workers=2").code == 0
    same_end(whole, tiny.folder / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_and_resume_twice_is_uninterrupted(tiny: Tiny, whole: Path, workers: int):
    """SIGTERM, then Ctrl-C, in the midst of an epoch: weights, optimizer, adapter and log stay bit-equal."""
    name = f"stopped-{workers}"
    folder = tiny.folder / name
    for lines, number in ((4, signal.SIGTERM), (9, signal.SIGINT)):
        moment = terminate_when(lambda lines=lines: num_lines(folder / "metrics.jsonl") >= lines, number)
        result = tiny.run(name, f"--data.workers={workers}", meanwhile=moment)
        assert result.code == 128 + number, result.output
        status = tiny.status(name)
        assert status["outcome"] == "interrupted" and "stopped after step" in status["reason"]
        steps = sorted(int(path.name[-6:]) for path in (folder / "checkpoints").iterdir())
        assert lines - 1 <= steps[-1] < STEPS and "Traceback" not in result.output
    result = tiny.run(name, f"--data.workers={workers}")
    assert result.code == 0 and "going on from" in result.output, result.output
    assert tiny.status(name)["outcome"] == "finished"
    same_end(whole, folder)


def test_another_seed_ends_elsewhere(tiny: Tiny, whole: Path):
    """The negative control of the bit-equality above."""
    assert tiny.run("seed", "--run.seed=43").code == 0
    with pytest.raises(AssertionError):
        same_end(whole, tiny.folder / "seed")


# SIGTERM out of the script itself, at an exact place.
STOP_IN = """
import os, signal
from qwen_train.train import evaluate
from qwen_train.model.packed import PackedLM
calls = 0
def stopping(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)
    return wrapped
{target} = stopping({target})
"""


@pytest.mark.parametrize(
    ("target", "call", "step"),
    [
        ("evaluate._in_evaluation", 2, 4),  # the evaluation after step 4, before its first batch
        ("PackedLM.sample", 3, 8),  # while the answers of step 8 are generated
        ("evaluate._in_evaluation", 5, STEPS),  # the last evaluation: the run is not finished without it
    ],
)
def test_stop_in_an_evaluation(tiny: Tiny, whole: Path, target: str, call: int, step: int):
    """The run leaves with what it has trained, and the resumed one makes up for the evaluation."""
    name = f"evaluating-{target}-{call}"
    result = tiny.run(name, prelude=STOP_IN.format(target=target, call=call))
    assert result.code == 128 + signal.SIGTERM, result.output
    assert f"stopped after step {step} of" in result.output
    result = tiny.run(name)
    assert result.code == 0, result.output
    same_end(whole, tiny.folder / name)


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("evaluate._in_evaluation", 1),  # the evaluation before the first step
        ("qwen_train.data.tokenize._Judge.__call__", 1),  # tokenising
        ("qwen_train.model.load.load_model_config", 1),  # loading the model
    ],
)
def test_stop_before_the_first_step(tiny: Tiny, whole: Path, target: str, call: int):
    name = f"starting-{target}"
    prelude = "import qwen_train.data.tokenize, qwen_train.model.load\n" + STOP_IN.format(target=target, call=call)
    fresh = tiny.folder / f"cache-{target}"
    result = tiny.run(name, f"--data.cache_dir={fresh}", prelude=prelude)
    assert result.code == 128 + signal.SIGTERM, result.output
    assert tiny.status(name)["outcome"] == "interrupted" and "start again" in tiny.status(name)["reason"]
    assert "Traceback" not in result.output
    assert not (tiny.folder / name / "checkpoints").exists()
    assert tiny.run(name, f"--data.cache_dir={fresh}").code == 0
    same_end(whole, tiny.folder / name)


SWALLOWED = """
import os, signal
from qwen_train.data import tokenize
judge = tokenize._Judge.__call__
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs here, and Python drops what it raises
            pass
def judging(*args):
    Dying()
    return judge(*args)
tokenize._Judge.__call__ = judging
"""


def test_a_signal_in_a_destructor_is_not_lost(tiny: Tiny):
    fresh = tiny.folder / "cache-swallowed"
    result = tiny.run("swallowed", f"--data.cache_dir={fresh}", prelude=SWALLOWED)
    assert result.code == 128 + signal.SIGTERM and "Traceback" not in result.output, result.output
    assert "stopped before the first step" in result.output and "data.train:" not in result.output


def test_stop_while_workers_tokenise(tiny: Tiny):
    """Two workers in the midst of 20,000 rows: all are gone at once, and nothing of the cache stays."""
    rows, cache = tiny.folder / "many.jsonl", tiny.folder / "cache-many"
    rows.write_text((TINY / "sft_train.jsonl").read_text() * 5)
    children: list[int] = []

    def watch(pid: int) -> None:
        def working() -> bool:
            listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            children[:] = [int(child) for child in listed]
            return len(children) >= 2

        terminate_when(working)(pid)

    start = time.monotonic()
    result = tiny.run("many", f"--data.train={rows}", f"--data.cache_dir={cache}", "--data.workers=2", meanwhile=watch)
    assert result.code == 128 + signal.SIGTERM and "Traceback" not in result.output, result.output
    assert tiny.status("many")["outcome"] == "interrupted"
    assert time.monotonic() - start < 30
    assert list((cache / "tokens").iterdir()) == []
    commands = [Path(f"/proc/{child}/cmdline") for child in children]
    assert not [path for path in commands if path.exists() and path.read_text()]  # a zombie has no command line


def test_killed_run_goes_on(tiny: Tiny, whole: Path):
    """kill -9 leaves no word behind; the newest checkpoint is gone on from, and log lines beyond it are cut."""
    log = tiny.folder / "killed" / "metrics.jsonl"
    result = tiny.run("killed", meanwhile=terminate_when(lambda: num_lines(log) >= 9, signal.SIGKILL))
    assert result.code == -signal.SIGKILL
    assert tiny.status("killed")["outcome"] == "running"
    result = tiny.run("killed")
    assert result.code == 0 and "going on from" in result.output
    same_end(whole, tiny.folder / "killed")


def test_a_checkpoint_by_name(tiny: Tiny, whole: Path):
    """`run.resume` with a folder: another run goes on from there, to the same end."""
    result = tiny.run("branched", f"--run.resume={whole / 'checkpoints/step-000010'}")
    assert result.code == 0, result.output
    name = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    assert digest(tiny.folder / "branched" / name) == digest(whole / name)
    # Evaluated where it begins: its log has no numbers of the other run's.
    assert [line["step"] for line in read_metrics(tiny.folder / "branched")] == [10, 11, 12, 13, 14]


def test_full_training_resumes_too(tiny: Tiny):
    arguments = ("--lora.enabled=false", "--run.steps=6", "--run.eval_samples=0")
    tiny_full = Tiny(tiny.folder, tiny.cache_dir, tiny.scripts)

    def run(name: str, meanwhile: Callable[[int], None] | None = None) -> Result:
        given = [
            a
            for a in tiny_full.arguments(name, *arguments)
            if not a.startswith(("--lora.r", "--lora.d", "--run.eval_sample_"))
        ]
        return tiny.scripts.run(tiny.folder / f"{name}.txt", "launch/sft.py", *given, meanwhile=meanwhile)

    assert run("full").code == 0
    log = tiny.folder / "full-stopped" / "metrics.jsonl"
    assert run("full-stopped", terminate_when(lambda: num_lines(log) >= 3)).code == 128 + signal.SIGTERM
    assert run("full-stopped").code == 0
    for name in ("checkpoints/step-000006/model.safetensors", "model/model.safetensors"):
        assert digest(tiny.folder / "full" / name) == digest(tiny.folder / "full-stopped" / name)
    assert read_metrics(tiny.folder / "full") == read_metrics(tiny.folder / "full-stopped")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(result: Result, *words: str, lines: int = 1) -> None:
    """Exit 2, the given words, and nothing else on stderr than so many lines that begin with `error:`."""
    errors = [line for line in result.lines if line.startswith("error: ")]
    assert result.code == 2, result.output
    assert len(errors) == lines and "Traceback" not in result.output, result.output
    for word in words:
        assert word in result.output, result.output


def row(*messages: tuple[str, str], **fields: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": content, **fields} for role, content in messages]})


GOOD = row(("user", "Hi"), ("assistant", "Hello"))
BAD_ROWS = {
    "malformed JSON": (GOOD + '\n{"messages": [\n', ":2"),
    "wrong role": (row(("user", "Hi"), ("robot", "Hello")), "robot"),
    "empty answer": (row(("user", "Hi"), ("assistant", "")), ":1"),
    "nothing supervised": (row(("user", "Hi"), ("assistant", "Hello"), train=False), ":1"),
    "no messages": ('{"foo": 1}', ":1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(tiny: Tiny, tmp_path: Path, case: str):
    text, word = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(text)
    result = tiny.run("refused", f"--data.train={tmp_path / 'rows.jsonl'}")
    # the first line counts the bad rows, then one line for each of the first ten
    refused(result, "rows.jsonl", word, lines=2)
    assert not (tiny.folder / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lrr=1"], ["optim.lrr", "did you mean optim.lr?"]),
        (["--optim.lr=abc"], ["optim.lr: expected a number, got 'abc'"]),
        (["--run.epochs=1"], ["run.steps: got both"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["--optim.schedule=constant", "--optim.min_lr_ratio=0.2"], ["optim.min_lr_ratio: has no effect"]),
        (["--data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
        (["--data.train={nowhere}"], ["data.train"]),
        (["--data.eval=nowhere.jsonl"], ["data.eval", "nowhere.jsonl"]),
        (["--data.eval=[{eval.jsonl: 0.1}]"], ["data.eval: the weight of 'eval.jsonl' must be 0 or 1, got 0.1"]),
        (["--data.format=poem"], ["data.format", "poem"]),
        (["--data.max_length=12", "--batch.tokens_per_microbatch=12"], ["rows is left", "max_length"]),
        (["--data.max_length=60", "--data.too_long=error"], ["max_length"]),
        (["--batch.tokens_per_microbatch=200"], ["batch.tokens_per_microbatch", "200"]),
        (["--model.path=nowhere/at_all"], ["model.path", "nowhere/at_all"]),
        (["--model.from_scratch=false"], ["model.path", "weights"]),
        (["--model.adapter=nowhere"], ["model.adapter", "nowhere"]),
        (["--model.attention=flash"], ["model.attention", "flash"]),
        (["--lora.target_modules=[no_such_layer]"], ["lora.target_modules", "no_such_layer"]),
        (["--lora.target_modules=[lm_head]"], ["lora.target_modules", "lm_head"]),
        (["--lora.target_modules=q_proj"], ["lora.target_modules", "write [q_proj]"]),
        (["--model.path=./nowhere"], ["model.path: the folder ./nowhere does not exist"]),
        (["--run.resume=nowhere"], ["run.resume", "nowhere"]),
        (["--run.dir=/dev/null/runs"], ["run.dir", "/dev/null/runs"]),
        (["--data.cache_dir=/dev/null/cache"], ["data.cache_dir"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_config_is_refused(tiny: Tiny, arguments: Sequence[str], words: Sequence[str]):
    result = tiny.run("refused", *arguments)
    long_list = arguments[-1] == "--data.too_long=error"
    refused(
        result, *words, lines=len([line for line in result.lines if line.startswith("error: ")]) if long_list else 1
    )
    assert not (tiny.folder / "refused").exists()
    assert not [path for path in tiny.folder.iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no template", ["model.path", "chat template"]),
        ("other family", ["model.path", "llama"]),
        ("no end token", ["<|im_end|>", "use a Qwen tokenizer"]),
    ],
)
def test_a_model_that_cannot_serve_is_refused(tiny: Tiny, tmp_path: Path, change: str, words: Sequence[str]):
    model = shutil.copytree(TINY / "model", tmp_path / "model")
    if change == "no template":
        (model / "chat_template.jinja").unlink()
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    elif change == "other family":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(
            json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        )
    else:
        for path in [p for p in model.iterdir() if p.suffix in (".json", ".jinja")]:
            path.write_text(path.read_text().replace("<|im_end|>", "<|end|>"))
    refused(tiny.run("refused", f"--model.path={model}"), *words)
    assert not (tiny.folder / "refused").exists()


def test_foreign_folders_are_left_alone(tiny: Tiny, whole: Path):
    """A changed config, another run's folder, a folder that is no run, a file: refused and not a byte changed."""
    before = {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    refused(tiny.run("whole", "--optim.lr=0.5"), "optim.lr was 0.001 and is now 0.5")
    refused(tiny.run("whole", "--run.resume=never"), "run.resume: never")
    assert before == {path: digest(path) for path in whole.rglob("*") if path.is_file()}

    stranger = tiny.folder / "stranger"
    stranger.mkdir()
    (stranger / "config.yaml").write_text("mine: 1\n")
    refused(tiny.run("stranger"), "is not the folder of a run")
    assert [path.name for path in stranger.iterdir()] == ["config.yaml"]
    (tiny.folder / "file").write_text("mine")
    refused(tiny.run("file"), "is a file")
    assert (tiny.folder / "file").read_text() == "mine"


def test_a_harmless_change_goes_on(tiny: Tiny):
    """How often is logged and how a step is cut up may change between stop and resume, and is announced."""
    log = tiny.folder / "changed" / "metrics.jsonl"
    assert tiny.run("changed", meanwhile=terminate_when(lambda: num_lines(log) >= 3)).code == 128 + signal.SIGTERM
    result = tiny.run("changed", "--run.log_every=2", "--batch.tokens_per_microbatch=512")
    assert result.code == 0, result.output
    assert "run.log_every: 1 -> 2" in result.output and "batch.tokens_per_microbatch: 256 -> 512" in result.output


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL_DISK = """
from tests.faulty_disk import FaultyDisk, no_space
from qwen_train.train import files
class Full(FaultyDisk):
    def write(self, file, data):
        if {condition}:
            no_space()
        return super().write(file, data)
files.disk = Full()
"""


def test_no_space_for_a_checkpoint(tiny: Tiny, whole: Path):
    """One line, exit 2, the earlier checkpoint whole, and the run ends right once there is space."""
    full = FULL_DISK.format(condition="'step-000010' in file.name")
    result = tiny.run("full-disk", prelude=full)
    refused(result, "step-000010: checkpoint not saved", "No space left on device", "free some space")
    assert [path.name for path in (tiny.folder / "full-disk/checkpoints").iterdir()] == ["step-000005"]
    assert tiny.status("full-disk")["outcome"] == "failed"
    assert tiny.run("full-disk").code == 0
    same_end(whole, tiny.folder / "full-disk")


def test_no_space_for_the_adapter_nor_for_a_word_about_it(tiny: Tiny, whole: Path):
    full = FULL_DISK.format(condition="'/adapter.tmp' in file.name or ('status' in file.name and len(self.names) > 20)")
    result = tiny.run("no-adapter", prelude=full)
    refused(result, "No space left on device", "status.json: not written", lines=2)
    assert not (tiny.folder / "no-adapter/adapter").exists()
    assert tiny.run("no-adapter").code == 0
    same_end(whole, tiny.folder / "no-adapter")


def test_no_space_at_the_start(tiny: Tiny):
    result = tiny.run("never", prelude=FULL_DISK.format(condition="True"))
    refused(result, "run.dir: cannot write to", "No space left on device")
    assert not (tiny.folder / "never").exists()
    assert not [path for path in tiny.folder.iterdir() if path.name.startswith("never.tmp")]


# --- the real vocabulary ----------------------------------------------------------------------------------------------


@needs_shared
def test_real_vocabulary_and_rows(tiny: Tiny, tmp_path: Path):
    """Qwen2.5's tokenizer, Alpaca rows and tool calls through a two-layer model of random weights."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHARED / "qwen2.5-tokenizer" / name, model / name)
    config = json.loads((SHARED / "qwen2.5-tokenizer" / "config-7b.json").read_text())
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config | small))
    sources = []
    for name in ("alpaca_en_demo", "glaive_toolcall_en_demo"):
        rows = json.loads((SHARED / "data" / f"{name}.json").read_text())[:16]
        sources.append(tmp_path / f"{name}.json")
        sources[-1].write_text(json.dumps(rows))
    arguments = [
        f"--model.path={model}",
        f"--data.train=[{sources[0]}, {{{sources[1]}: 0.5}}]",
        f"--data.eval={sources[1]}",
        "--data.max_length=512",
        "--batch.sequences_per_step=4",
        "--batch.tokens_per_microbatch=1024",
        "--run.steps=3",
        "--run.eval_every=0",
        "--optim.lr=1e-3",
    ]
    result = tiny.run("real", *arguments)
    assert result.code == 0, result.output
    lines = read_metrics(tiny.folder / "real")
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert 11.5 < losses[0] < 12.5  # ln(152,064) = 11.93: random weights know nothing
    assert losses[-1] < losses[0]
    assert "of 32 conversations" in result.output


@pytest.mark.parametrize("told", [True, False])
def test_a_compiler_that_a_signal_ends(tiny: Tiny, whole: Path, told: bool):
    """Ctrl-C goes to the compilers as well, and what has led there is no failure; without a signal it is one."""
    name = f"compiling-{told}"
    act = "os.kill(os.getpid(), signal.SIGTERM)" if told else "pass"
    prelude = (
        "import os, signal\nfrom torch._inductor.exc import InductorError\n"
        f"def backward(run, loss):\n    {act}\n    raise InductorError(RuntimeError('g++'), None)\n"
        "from qwen_train.train.distributed import Run\nRun.backward = backward\n"
    )
    result = tiny.run(name, prelude=prelude)
    status = tiny.status(name)
    if told:
        reason = "stopped while a step was compiled, which is not saved; start again to go on"
        assert (result.code, status["outcome"]) == (128 + signal.SIGTERM, "interrupted"), result.output
        assert status["reason"] == reason == result.lines[-1] and "Traceback" not in result.output
        assert tiny.run(name).code == 0
        same_end(whole, tiny.folder / name)
    else:
        assert (result.code, status["outcome"]) == (1, "failed") and "InductorError" in result.output
