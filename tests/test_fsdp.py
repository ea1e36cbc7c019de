"""Every mode on several processes: the same losses, gradient norms and samples as one process; FSDP2 and HSDP by gloo.

accelerate turns FSDP on for accelerators only; `SHARDING` turns it on for the CPU, after the Accelerator is made.
"""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.scripts import TINY, Result, ScriptRunner, num_lines, read_metrics, terminate_when

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

SHARDING = """
import os
import qwen_train.train.distributed as distributed
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig

class Sharding(distributed.Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # which transformers asks for when it reads weights
        plugin = FullyShardedDataParallelPlugin(fsdp_version=int(os.environ.get("FSDP_VERSION", "2")))
        state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        if "REPLICAS" in os.environ:
            replicas = int(os.environ["REPLICAS"])
            layout = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=self.num_processes // replicas)
            state |= {"parallelism_config": layout, "device_mesh": layout.get_device_mesh("cpu")}
        AcceleratorState._shared_state.update(state)

distributed.Accelerator = Sharding
"""
COUNT_READS = """
from qwen_train.model import load
read = load.AutoModelForCausalLM.from_pretrained

def counted(*args, **kwargs):
    print("reading weights on rank", os.environ["RANK"], flush=True)
    return read(*args, **kwargs)

load.AutoModelForCausalLM.from_pretrained = counted
"""
COUNT_GATHERS = """
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from qwen_train.train.distributed import Run
gather, accumulate, clip, count = fsdp.foreach_all_gather, Run.accumulate, Run.clip_grad_norm, 0

def counted(*args, **kwargs):
    global count
    count += 1
    return gather(*args, **kwargs)

def begun(*args):
    global count
    count = 0
    return accumulate(*args)

def told(run, *args):
    run.note(f"weights gathered: {count}")
    return clip(run, *args)

fsdp.foreach_all_gather, Run.accumulate, Run.clip_grad_norm = counted, begun, told
"""
WATCH_MODELS = """
from torch.distributed.tensor import DTensor
models, prepare, clipped = [], Run.prepare, Run.clip_grad_norm

def prepared(run, model):
    models.append(weakref.ref(model))
    return prepare(run, model)

def watched(run, *args):
    alive = [model() for model in models if model() is not None]
    whole = [not all(isinstance(parameter, DTensor) for parameter in model.parameters()) for model in alive]
    run.note(f"models that are whole: {whole}")
    return clipped(run, *args)

Run.prepare, Run.clip_grad_norm = prepared, watched
"""
ROWS, PER_STEP, STEPS = 31, 3, 10
MODES = {
    "lora": ["--lora.r=8"],
    "full": ["--lora.enabled=false", "--optim.lr=1e-3"],
    "full-bf16": ["--lora.enabled=false", "--optim.lr=1e-3", "--model.dtype=bfloat16"],
    "nf4": ["--lora.r=8", "--model.quantization=nf4", "--model.dtype=bfloat16"],
}
TASKS = {"sft": ["train/loss", "train/grad_norm", "eval/loss"], "dpo": ["train/loss", "train/grad_norm", "eval/loss"]}


class World:
    """Runs of the real scripts on a few tiny rows, each started once."""

    def __init__(self, folder: Path, cache_dir: Path, scripts: ScriptRunner) -> None:
        self.folder, self.cache_dir, self.scripts = folder, cache_dir, scripts
        for task in ("sft", "dpo"):
            for split, rows in (("train", ROWS), ("eval", 5)):
                lines = (TINY / f"{task}_{split}.jsonl").read_text().splitlines(keepends=True)[:rows]
                (folder / f"{task}_{split}.jsonl").write_text("".join(lines))

    def arguments(self, task: str, name: str, *more: str) -> list[str]:
        start = ["--model.adapter=null", "--model.from_scratch=true", "--data.eval_sft=null"] if task == "dpo" else []
        given = {
            "run.dir": self.folder,
            "run.name": name,
            "data.train": self.folder / f"{task}_train.jsonl",
            "data.eval": self.folder / f"{task}_eval.jsonl",
            "data.cache_dir": self.cache_dir,
            "data.workers": 0,
            "run.steps": STEPS,
            "run.log_every": 1,
            "run.eval_every": 5,
            "run.eval_samples": 3,
            "run.eval_sample_tokens": 5,
            "batch.sequences_per_step": PER_STEP,
            "batch.tokens_per_microbatch": 256,
        }
        return [*start, *(f"--{key}={value}" for key, value in given.items()), *more]

    def start(self, task: str, name: str, *more: str, **how) -> Result:
        return self.scripts.run(
            self.folder / f"{name}.txt", f"launch/{task}.py", *self.arguments(task, name, *more), **how
        )

    def run(self, task: str, name: str, *more: str, **how) -> Path:
        if not (self.folder / name).exists():
            result = self.start(task, name, *more, **how)
            assert result.code == 0, result.output
        return self.folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> World:
    return World(tmp_path_factory.mktemp("fsdp"), cache_dir, scripts)


def largest_difference(one: Path, other: Path, name: str) -> float:
    """Of a metric over all steps, relative to its size."""
    pairs = list(zip(read_metrics(one), read_metrics(other), strict=True))
    values = [(a[name], b[name]) for a, b in pairs if name in a or name in b]
    assert len(values) >= 2
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in values)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("mode", "how"),
    [("lora", "ddp"), ("lora", "fsdp2"), ("full", "ddp"), ("full", "fsdp2"), ("nf4", "ddp")],
)
def test_two_processes_are_one(world: World, task: str, mode: str, how: str):
    one = world.run(task, f"{task}-{mode}-1", *MODES[mode])
    sharding = {"prelude": SHARDING} if how == "fsdp2" else {}
    two = world.run(task, f"{task}-{mode}-{how}", *MODES[mode], ranks=2, **sharding)
    tolerance = 3e-3 if mode == "nf4" else 1e-5
    for name in TASKS[task]:
        assert largest_difference(one, two, name) <= tolerance, name
    first, last = (json.loads(line)["train/loss"] for line in _logged(one)[:: STEPS - 1])
    assert abs(first - last) > 1e-3, "training changes something"


def _logged(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_sharded_layers_changes_nothing(world: World, dropout: float):
    """Not even with dropout: the recomputation draws the masks of the forward."""
    more = [*MODES["lora"], f"--lora.dropout={dropout}", "--run.steps=4"]
    kept, again = (
        world.run(
            "sft", f"kept-{dropout}-{count}", *more, f"--model.checkpoint_layers={count}", ranks=2, prelude=SHARDING
        )
        for count in (0, 3)
    )
    for name in TASKS["sft"]:
        assert largest_difference(kept, again, name) <= 1e-6, name
    more += ["--lora.dropout=0.0", "--model.checkpoint_layers=0"]  # as the other test's, whichever comes first
    plain = world.run("sft", "kept-0.0-0", *more, ranks=2, prelude=SHARDING)
    assert (largest_difference(plain, kept, "train/grad_norm") > 1e-3) is (dropout > 0), "dropout is on"


def test_sharded_models_answer_alike(world: World):
    """The greedy samples of each evaluation; the five rows do not divide by two."""
    one = world.run("sft", "sft-full-1", *MODES["full"])
    two = world.run("sft", "sft-full-fsdp2", *MODES["full"], ranks=2, prelude=SHARDING)
    one, two = ([bytes(tensor.string_val[0]) for tensor in samples(run)] for run in (one, two))
    assert one == two and len(one) == 3 and len(set(one)) > 1


def samples(run: Path) -> list[Any]:
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    return [event.tensor_proto for event in events.Tensors("eval/samples/text_summary")]


@pytest.mark.slow
def test_compiled_layers_shard(world: World):
    """bf16, compiled layers, every other one recomputed: FSDP2's hooks stand outside of the graphs."""
    more = [*MODES["lora"], "--model.dtype=bfloat16", "--model.compile=true", "--model.checkpoint_layers=2"]
    more += ["--run.steps=3"]
    one = world.run("sft", "compiled-1", *more)
    two = world.run("sft", "compiled-2", *more, ranks=2, prelude=SHARDING)
    assert largest_difference(one, two, "train/loss") <= 1e-2


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_weights_that_stay_whole_during_a_step(world: World, mode: str):
    """`fsdp_reshard_after_forward: false`: gathered once a step however many micro-batches it has; the same curve."""
    # Steps of several micro-batches a rank.
    more = [*MODES[mode], "--batch.sequences_per_step=24"]
    one = world.run("sft", f"whole-{mode}-1", *more, "--run.steps=4")
    gathered = {}
    for reshard in ("true", "false"):
        name = f"whole-{mode}-{reshard}"
        how = {"ranks": 2, "prelude": SHARDING + COUNT_GATHERS, "environment": {"FSDP_RESHARD_AFTER_FORWARD": reshard}}
        two = world.run("sft", name, *more, "--run.steps=4", **how)
        for metric in ("train/loss", "train/grad_norm"):
            assert largest_difference(one, two, metric) <= 1e-5, (reshard, metric)
        gathered[reshard] = [
            int(n) for n in re.findall(r"weights gathered: (\d+)", (world.folder / f"{name}.txt").read_text())
        ]
    layers = AutoConfig.from_pretrained(TINY / "model").num_hidden_layers
    assert gathered["false"][1:] == [layers + 1] * 3, "each layer and the root; the first step's are of the evaluation"
    assert min(gathered["true"]) >= 2 * 2 * layers, "in each forward and backward"


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_a_second_model_does_not_stay_whole(world: World, precompute: str):
    """The reference of full DPO; precomputed, it is let go, and the policy is gathered once a step all the same."""
    base = world.run("sft", "sft-full-1", *MODES["full"]) / "model"
    more = [
        f"--model.path={base}",
        "--model.from_scratch=false",
        f"--reference.path={base}",
        "--reference.source=model",
    ]
    more += ["--lora.enabled=false", f"--reference.precompute={precompute}", "--batch.sequences_per_step=30"]
    world.run(
        "dpo",
        f"second-{precompute}",
        *more,
        "--run.steps=3",
        ranks=2,
        prelude="import weakref" + SHARDING + COUNT_GATHERS + WATCH_MODELS,
        environment={"FSDP_RESHARD_AFTER_FORWARD": "false"},
    )
    log = (world.folder / f"second-{precompute}.txt").read_text()
    assert (
        re.findall(r"models that are whole: (.*)", log) == ["[False]" if precompute == "true" else "[False, False]"] * 3
    )
    if precompute == "true":
        layers = AutoConfig.from_pretrained(TINY / "model").num_hidden_layers
        assert re.findall(r"weights gathered: (\d+)", log)[1:] == [str(layers + 1)] * 2


def test_hybrid_sharding_is_one(world: World):
    """HSDP on four ranks: two replicas of two shards each."""
    one = world.run("sft", "sft-full-1", *MODES["full"])
    four = world.run("sft", "hsdp", *MODES["full"], ranks=4, prelude=SHARDING, environment={"REPLICAS": "2"})
    for name in TASKS["sft"]:
        assert largest_difference(one, four, name) <= 1e-5, name


@pytest.mark.parametrize("mode", ["lora", "full", "full-bf16"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_saved_on_some_and_resumed_on_others(world: World, mode: str, ranks: tuple[int, int]):
    """Stopped halfway on two ranks and ended by one, and the other way round."""
    one = world.run("sft", f"sft-{mode}-1", *MODES[mode])
    name = f"{mode}-{ranks[0]}-then-{ranks[1]}"

    def start(count: int, *more: str, **how) -> Result:
        sharding = {"ranks": count, "prelude": SHARDING} if count > 1 else {}
        return world.start("sft", name, *MODES[mode], "--run.save_every=4", *more, **sharding, **how)

    metrics = world.folder / name / "metrics.jsonl"
    stopped = start(ranks[0], meanwhile=terminate_when(lambda: num_lines(metrics) >= 5))
    assert stopped.code == 128 + signal.SIGTERM, stopped.output
    result = start(ranks[1])
    assert result.code == 0 and "going on from" in result.output, result.output
    for metric in TASKS["sft"]:
        assert largest_difference(one, world.folder / name, metric) <= (2e-2 if "bf16" in mode else 1e-5), metric


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("efficient", ["true", "false"])
def test_embeddings_stay_tied_and_rank_0_alone_reads(world: World, tied: bool, efficient: str):
    """Whatever accelerate's `cpu_ram_efficient_loading` says."""
    folder = world.folder / f"checkpoint-{tied}"
    if not folder.exists():
        config = AutoConfig.from_pretrained(TINY / "model", tie_word_embeddings=tied)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    more = [*MODES["full"], "--model.from_scratch=false", f"--model.path={folder}", "--run.steps=4"]
    one = world.run("sft", f"tied-{tied}-1", *more)
    name = f"tied-{tied}-{efficient}"
    environment = {"FSDP_CPU_RAM_EFFICIENT_LOADING": efficient}
    two = world.run("sft", name, *more, ranks=2, prelude=SHARDING + COUNT_READS, environment=environment)
    for metric in TASKS["sft"]:
        assert largest_difference(one, two, metric) <= 1e-5, metric
    reads = [line for line in (world.folder / f"{name}.txt").read_text().splitlines() if line.startswith("reading")]
    assert reads == ["reading weights on rank 0"]
    names = set(safe_open(two / "model/model.safetensors", framework="pt").keys())
    assert ("lm_head.weight" in names) is not tied and "model.embed_tokens.weight" in names


@pytest.mark.parametrize(
    "more",
    [
        ["--model.adapter_start=merge"],
        ["--model.adapter_start=continue"],
        ["--model.adapter_start=continue", "--reference.precompute=true"],
        ["--lora.enabled=false", "--reference.precompute=true", "--reference.source=model"],
    ],
    ids=["merged", "continued", "precomputed", "full"],
)
def test_references_of_sharded_policies(world: World, more: list[str]):
    """From an SFT adapter: the adapter merged, or continued beside its frozen copy; full training beside a model."""
    sft = world.run("sft", "sft-lora-1", *MODES["lora"])
    start = [f"--model.adapter={sft / 'adapter'}", "--model.from_scratch=false", *more]
    if "--lora.enabled=false" in more:
        start = [
            f"--model.path={sft / 'base'}",
            "--model.from_scratch=false",
            f"--reference.path={sft / 'base'}",
            *more,
        ]
    name = "-".join(word.split("=")[1] for word in more)
    one = world.run("dpo", f"{name}-1", *start, "--run.steps=4")
    two = world.run("dpo", f"{name}-2", *start, "--run.steps=4", ranks=2, prelude=SHARDING)
    for metric in TASKS["dpo"]:
        assert largest_difference(one, two, metric) <= 1e-5, metric
    gap = re.search(
        r"step 0: policy and reference .* differ by (\S+) nats", (world.folder / f"{name}-2.txt").read_text()
    )
    assert gap and float(gap[1]) <= (1e-6 if "--reference.precompute=true" in more else 0)


def test_gathered_adapters_have_every_slice(world: World, tmp_path: Path):
    """The adapter that two ranks write is the one that one process writes, tensor by tensor; without the base."""
    one = world.run("sft", "sft-lora-1", *MODES["lora"])
    two = world.run("sft", "sft-lora-fsdp2", *MODES["lora"], ranks=2, prelude=SHARDING)
    tensors = [load_file(run / "adapter/adapter_model.safetensors") for run in (one, two)]
    assert tensors[0].keys() == tensors[1].keys() and all("lora_" in name for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert tensor.any() and torch.allclose(tensor, tensors[1][name], rtol=1e-3, atol=1e-6), name


def layout(**sizes: int) -> dict[str, str]:
    """What `accelerate launch` hands on of a parallelism_config with these sizes."""
    given = {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **given}


@pytest.mark.parametrize(
    ("more", "environment", "message"),
    [
        (
            ["--model.quantization=nf4", "--model.dtype=bfloat16"],
            {},
            "error: model.quantization: nf4 weights cannot be",
        ),
        (
            ["--model.quantization=fp8", "--model.dtype=bfloat16"],
            {},
            "error: model.quantization: fp8 weights cannot be",
        ),
        (["--optim.name=adamw_8bit"], {}, "error: optim.name: adamw_8bit fails on the shards of FSDP2"),
        ([], {"FSDP_VERSION": "1"}, "error: accelerate: fsdp_version 1 is not supported; set fsdp_version: 2"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "error: accelerate: fsdp_offload_params is not supported"),
        ([], layout(tp=2), "error: accelerate: parallelism_config_tp_size 2 is not supported; leave it at 1"),
        ([], layout(cp=2), "error: accelerate: parallelism_config_cp_size 2 is not supported"),
        ([], layout(sp=2), "error: accelerate: parallelism_config_sp_size 2 is not supported"),
        (
            [],
            layout(dp_replicate=2, dp_shard=8),
            "error: accelerate: parallelism_config is for 16 processes (dp_replicate_size 2 x dp_shard_size 8), and "
            "there are 2",
        ),
        (
            [],
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            "error: accelerate: distributed_type MEGATRON_LM is not supported",
        ),
        ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "error: accelerate: distributed_type DEEPSPEED is not supported"),
    ],
)
def test_what_cannot_be_sharded_is_refused(world: World, more: list[str], environment: dict, message: str):
    result = world.start("sft", "refused", *more, ranks=2, prelude=SHARDING, environment=environment)
    assert result.code == 2 and "Traceback" not in result.output, result.output
    assert result.output.count(message) == 1 and not (world.folder / "refused").exists(), result.output


def test_settings_that_are_not_followed_are_named(world: World):
    environment = {
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "ACCELERATE_MIXED_PRECISION": "fp16",
    }
    one = world.run("sft", "sft-lora-1", *MODES["lora"])
    two = world.run("sft", "settings", *MODES["lora"], ranks=2, prelude=SHARDING, environment=environment)
    output = (world.folder / "settings.txt").read_text()
    for name in ("fsdp_activation_checkpointing", "mixed_precision fp16"):
        assert output.count(f"accelerate: {name} is ignored") == 1, output
    assert largest_difference(one, two, "train/grad_norm") <= 1e-5
