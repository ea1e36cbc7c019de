"""The reference: its sources, that it never moves, the cache of its log-probs, the audits that catch a wrong one."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_train.config import reference_source
from qwen_train.data.scratch import beside, scratch_folder
from qwen_train.data.stream import MicroBatches, collate_preferences, packed_lengths
from qwen_train.loss.preference import preference_loss
from qwen_train.model.adapters import read_adapter_config, tensor_digest
from qwen_train.model.load import load_tokenizer
from qwen_train.model.packed import PackedLM, trainable_parameters
from qwen_train.train import files
from qwen_train.train.distributed import Run
from qwen_train.train.folder import RunFolder
from qwen_train.train.progress import Progress
from qwen_train.train.reference import (
    Reference,
    _cause,
    audit_start,
    check_reference,
    score_pairs,
)
from tests.preferences import (
    batch_of,
    disturb,
    dpo_config,
    edit_adapter,
    edit_json,
    few_pairs,
    load,
    make_start,
    pairs_of,
    run_dpo,
)
from tests.scripts import TINY, ScriptRunner, launch, read_metrics
from tests.support import SHARED, needs_shared

TOLERANCE = 1e-5  # nats, fp32


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, cache_dir: Path) -> Path:
    return make_start(scripts, tmp_path_factory.mktemp("sft"), cache_dir)


@pytest.fixture
def run(own_signals: None) -> Iterator[Run]:
    yield Run(seed=42, deterministic=False)


def folder_of(path: Path, checkpoint: Path | None = None) -> RunFolder:
    return RunFolder(path=path, config=dpo_config(), finished=False, run_id="x", checkpoint=checkpoint, notes=())


def on(start: Path, *arguments: str) -> tuple[str, ...]:
    base = str(start.parent / "base")
    return ("--model.path", base, "--model.adapter", str(start), *arguments)


def reference_of(config, model: PackedLM, run: Run, folder: Path) -> Reference:
    return Reference(config, model, load_tokenizer(config.model), run, folder_of(folder).base)


def test_a_path_counts_where_auto_means_a_second_model() -> None:
    assert dpo_config("--lora.enabled", "false", "--reference.path", "some/model").reference.path == "some/model"
    with pytest.raises(ValueError, match=r"reference.path: has no effect, since reference.source is adapter_off"):
        dpo_config("--reference.path", "some/model")


SOURCES = {
    "adapter_off": ("--model.adapter_start", "merge"),
    "start_adapter": ("--model.adapter_start", "continue"),
    "model": ("--model.adapter_start", "merge", "--lora.enabled", "false"),
}


def test_auto_is_what_equals_the_policy_at_step_0(start: Path) -> None:
    for source, arguments in SOURCES.items():
        assert reference_source(dpo_config("--model.adapter", str(start), *arguments)) == source
    assert reference_source(dpo_config()) == "adapter_off"
    assert reference_source(dpo_config("--loss.name", "simpo")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora.enabled", "false", "--reference.source", "adapter_off"), "adapter_off needs an adapter"),
        (("--reference.source", "start_adapter"), "start_adapter is for training that continues an adapter"),
    ],
)
def test_a_source_that_the_start_cannot_give_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_source(dpo_config(*arguments))


@pytest.mark.parametrize("source", SOURCES)
def test_the_reference_is_the_start_and_stays_it_bitwise(
    source: str, start: Path, run: Run, tmp_path: Path, cache_dir: Path
) -> None:
    """Checks 16, 18 and 23: ln 2 and rewards 0 at step 0; after updates with dropout not a bit of it has moved."""
    config = dpo_config(*on(start, *SOURCES[source], *(("--lora.dropout", "0.1") if source == "adapter_off" else ())))
    model = load(config)
    reference = reference_of(config, model, run, tmp_path)
    batch = batch_of(pairs_of(config, few_pairs(tmp_path), cache_dir), range(8))
    before = reference.logps(batch)
    assert before is not None

    model.eval()
    pairs = score_pairs(model(batch).logps, before, batch)
    assert float(pairs.chosen_logratios.detach().abs().max()) <= TOLERANCE
    losses = preference_loss(pairs, config.loss)
    torch.testing.assert_close(losses, torch.full_like(losses, 0.6931471805599453), atol=1e-6, rtol=0)
    model.train()

    frozen = {name: p for name, p in reference.model.named_parameters() if not p.requires_grad}
    digest = tensor_digest(frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        assert model.training
        expected = reference.logps(batch)
        assert model.training, "scoring the reference puts the mode back"
        torch.testing.assert_close(expected, before, atol=0, rtol=0)
        preference_loss(score_pairs(model(batch).logps, expected, batch), config.loss).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(reference.logps(batch), before)
    assert tensor_digest(frozen) == digest
    assert all(p.grad is None for p in frozen.values())
    moved = batch.sequence_sums(model(batch).logps)
    assert float((moved - before).abs().max()) > 1e-2, "the policy did move, so the test could have failed"


def test_adapter_off_is_the_base_bitwise(start: Path, run: Run, tmp_path: Path, cache_dir: Path) -> None:
    config = dpo_config("--model.path", str(start.parent / "base"))
    model = load(config)
    disturb(model)
    batch = batch_of(pairs_of(config, few_pairs(tmp_path), cache_dir), range(8))
    base = load(dpo_config("--model.path", str(start.parent / "base"), "--lora.enabled", "false"))
    with torch.no_grad():
        plain = batch.sequence_sums(base.eval()(batch).logps)
    assert torch.equal(reference_of(config, model, run, tmp_path).logps(batch), plain)


def test_the_frozen_copy_is_not_trained_and_not_saved(start: Path) -> None:
    continued = on(start, "--model.adapter_start", "continue")
    alone, both = load(dpo_config(*continued, "--reference.source", "adapter_off")), load(dpo_config(*continued))
    copies = [sum(".reference." in name for name, _ in model.named_parameters()) for model in (alone, both)]
    assert copies == [0, len(trainable_parameters(both))]
    assert trainable_parameters(both).keys() == trainable_parameters(alone).keys()
    with both.reference_adapter():
        assert trainable_parameters(both).keys() == trainable_parameters(alone).keys()


@pytest.mark.parametrize("initialisation", ["pissa_niter_4", "olora", "corda", "loftq"])
def test_an_adapter_that_rewrote_its_base_is_refused(initialisation: str, start: Path, tmp_path: Path) -> None:
    adapter = edit_adapter(start, tmp_path / "adapter", lambda name, tensor: tensor)
    read_adapter_config(adapter)
    edit_json(adapter / "adapter_config.json", init_lora_weights=initialisation)
    with pytest.raises(ValueError, match="which rewrote the base"):
        read_adapter_config(adapter)


@needs_shared
def test_a_reference_of_another_vocabulary_is_refused(start: Path) -> None:
    config = dpo_config("--model.path", str(start.parent / "base"), "--reference.source", "model",
                        "--reference.path", str(SHARED / "qwen2.5-tokenizer"))  # fmt: skip
    with pytest.raises(ValueError, match=r"reference.path: .* has another vocabulary"):
        check_reference(config, load_tokenizer(config.model))


# --- Precomputed


@pytest.fixture
def precomputing(start: Path, run: Run, tmp_path: Path, cache_dir: Path):
    """(config, model, reference, data, collate, lengths) with reference.precompute."""
    config = dpo_config(*on(start, "--reference.precompute", "true", "--data.cache_dir", str(tmp_path / "cache")))
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, tokens_per_microbatch=300))
    model = load(config)
    data = pairs_of(config, few_pairs(tmp_path), cache_dir)
    collate, lengths = collate_preferences(data.dataset, True), packed_lengths(data.dataset)
    return config, model, reference_of(config, model, run, tmp_path), data, collate, lengths


def test_online_precomputed_and_two_forwards_agree(run: Run, precomputing) -> None:
    """Checks 21 and 22: in every batch, in another order, and as plain sequences of prompt and answer."""
    _, _, reference, data, collate, lengths = precomputing
    look_up = reference.of_data(run, data, collate, lengths)
    rows = [17, 3, 40, 8, 9]
    shared, plain = collate(rows), collate_preferences(data.dataset, False)(rows)
    online = reference.logps(shared)
    torch.testing.assert_close(look_up(shared), online, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(reference.logps(plain), online, atol=TOLERANCE, rtol=0)
    wrong = look_up(collate(rows[::-1]))
    assert float((wrong - online).abs().max()) > 1e-2, "rows are told apart"


def only_cache(config) -> Path:
    (folder,) = (Path(config.data.cache_dir) / "reference").iterdir()
    return folder


def test_the_cache_is_reused_and_never_used_when_it_is_not_whole_or_not_true(
    run: Run, precomputing, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, reference, data, collate, lengths = precomputing
    first = reference.of_data(run, data, collate, lengths)(collate([5]))
    cache = only_cache(config)
    scored: list[int] = []
    score_all = Reference._score_all
    monkeypatch.setattr(Reference, "_score_all", lambda *a: (scored.append(1), score_all(*a))[1])

    def again() -> torch.Tensor:
        capsys.readouterr()
        return reference.of_data(run, data, collate, lengths)(collate([5]))

    assert torch.equal(again(), first)
    assert not scored and f"48 pairs from {cache}" in capsys.readouterr().out

    file = cache / "logps.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert torch.equal(again(), first)
    assert len(scored) == 1 and "it is damaged" in capsys.readouterr().out
    assert file.read_bytes() == whole, "written anew"

    (cache / "manifest.json").write_text("{")
    assert torch.equal(again(), first)
    assert len(scored) == 2 and "it is damaged" in capsys.readouterr().out

    # Whole by its checksum, yet of another model.
    stale = {"logps": load_file(file)["logps"] + 0.5}
    save_file(stale, file)
    edit_json(cache / "manifest.json", sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert torch.equal(again(), first)
    assert len(scored) == 3 and "nats a token" in capsys.readouterr().out


def test_what_a_killed_process_left_in_the_cache_goes(run: Run, precomputing) -> None:
    """But not the folder of one that is still writing."""
    config, _, reference, data, collate, lengths = precomputing
    folder = Path(config.data.cache_dir) / "reference"
    beside(folder / "killed").mkdir(parents=True)
    with scratch_folder(folder / "at work") as at_work:
        reference.of_data(run, data, collate, lengths)
        assert len([*folder.iterdir()]) == 2 and at_work.is_dir()
    assert len(load_file(only_cache(config) / "logps.safetensors")["logps"]) == len(data)


def test_of_two_runs_that_write_one_table_at_once_both_go_on(
    run: Run, precomputing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's appears between a look at the place and the renaming; what is no whole table there ends the run."""
    config, _, reference, data, collate, lengths = precomputing

    def late(source: Path, target: Path, spoil: bool) -> None:
        shutil.copytree(source, target)
        if spoil:
            (target / "manifest.json").write_text("{")
        source.replace(target)

    monkeypatch.setattr(files.disk, "replace", lambda source, target: late(source, target, spoil=False))
    first = reference.of_data(run, data, collate, lengths)(collate([5]))
    assert torch.equal(load_file(only_cache(config) / "logps.safetensors")["logps"][5], first)
    shutil.rmtree(only_cache(config))
    monkeypatch.setattr(files.disk, "replace", lambda source, target: late(source, target, spoil=True))
    with pytest.raises(ValueError, match=r"data.cache_dir: .* cannot be written .*Directory not empty"):
        reference.of_data(run, data, collate, lengths)


def test_other_weights_other_data_and_another_dtype_have_caches_of_their_own(
    run: Run, precomputing, start: Path, tmp_path: Path, cache_dir: Path
) -> None:
    config, model, reference, data, collate, lengths = precomputing
    reference.of_data(run, data, collate, lengths)
    only_cache(config)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj" in name and not p.requires_grad)[3, 5] += 1e-6
    other = reference_of(config, model, run, tmp_path)
    assert other.weights_digest != reference.weights_digest, "one changed bit of one weight"
    other.of_data(run, data, collate, lengths)
    fewer = pairs_of(config, few_pairs(tmp_path, 20), cache_dir)
    reference.of_data(run, fewer, collate_preferences(fewer.dataset, True), packed_lengths(fewer.dataset))
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 3


@pytest.fixture
def wide_base(tmp_path: Path) -> Path:
    """A base whose feed-forward layers are wider than the residual stream, so that groups keep columns for B."""
    folder = tmp_path / "base"
    shutil.copytree(TINY / "model", folder)
    config = AutoConfig.from_pretrained(folder, intermediate_size=512, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("quantization", "kinds"),
    [("none", {"dense", "wide"}), ("nf4", {"nf4"}), ("fp8", {"fp8"})],
    ids=["none", "nf4", "fp8"],
)
def test_the_weights_digest_is_of_the_base_alone(
    quantization: str, kinds: set[str], wide_base: Path, run: Run, tmp_path: Path, cache_dir: Path
) -> None:
    """A sweep over the adapter scores the pairs once; one bit of the base, in its scales too, is another digest."""
    precision = () if quantization == "none" else ("--model.quantization", quantization, "--model.dtype", "bfloat16")

    def made(*arguments: str) -> tuple[PackedLM, Reference]:
        base = ("--model.path", str(wide_base), "--reference.precompute", "true")
        config = dpo_config(*base, *precision, *arguments)
        model = load(config)
        return model, reference_of(config, model, run, tmp_path)

    model, reference = made("--lora.r", "8")
    digest = reference.weights_digest
    assert {getattr(module, "kind", None) for module in model.modules()} - {None} == kinds, "of groups"
    adapters = [("--lora.r", "16"), ("--lora.dropout", "0.05"), ("--lora.target_modules", "[q_proj]")]
    for arguments in adapters[:1] if quantization == "fp8" else adapters:
        _, other = made(*arguments)
        assert other.weights_digest == digest, arguments

    disturb(model)
    batch = batch_of(pairs_of(reference.config, few_pairs(tmp_path), cache_dir), range(4))
    batch.sequence_sums(model(batch).logps).sum().backward()
    assert reference._digest(run) == digest, "a forward writes B beside the weights"

    (norm,) = (value for name, value in model.named_parameters() if name.endswith("layers.0.input_layernorm.weight"))
    (down,) = (module for name, module in model.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    stored = [down.base_layer.weight] if quantization == "none" else dict(down.named_buffers()).values()
    for value in [norm, *stored]:
        first = value.data[(0,) * value.dim()].reshape(1).view(torch.uint8)
        first[0] ^= 1
        assert reference._digest(run) != digest
        first[0] ^= 1
        assert reference._digest(run) == digest


# --- The audit


def step(batch) -> MicroBatches:
    return MicroBatches(batches=[batch], total_weight=1.0, num_tokens=1, num_sequences=1, mean_length=1.0, epoch=0.0)


def test_the_audit_passes_a_right_start(start: Path, run: Run, tmp_path: Path, cache_dir: Path, capsys) -> None:
    config = dpo_config(*on(start, "--lora.dropout", "0.3"))
    model = load(config)
    reference = reference_of(config, model, run, tmp_path)
    batch = batch_of(pairs_of(config, few_pairs(tmp_path), cache_dir), range(8))
    audit_start(run, model, reference, reference.logps, step(batch))
    assert "policy and reference (adapter_off) differ by" in capsys.readouterr().out
    assert model.training


@pytest.mark.launch
def test_continuing_with_the_adapter_off_is_caught_before_the_first_update(
    start: Path, tmp_path: Path, cache_dir: Path, scripts: ScriptRunner
) -> None:
    """The planted mistake: a trained adapter goes on, and the reference is the model before it."""
    wrong = ("--model.adapter_start", "continue", "--reference.source", "adapter_off")
    done = run_dpo(scripts, start, tmp_path / "wrong", cache_dir, *wrong)
    assert done.code == 2, done.output
    (line,) = [line for line in done.lines if line.startswith("error:")]
    assert "the adapter is a trained one, and switching it off gives the model before it" in line
    right = run_dpo(scripts, start, tmp_path / "right", cache_dir, "--model.adapter_start", "continue")
    assert right.code == 0, right.output
    assert "policy and reference (start_adapter) differ by" in right.output


def test_the_audit_names_dropout(start: Path, run: Run, tmp_path: Path, cache_dir: Path) -> None:
    config = dpo_config(*on(start))
    model = load(config)
    reference = reference_of(config, model, run, tmp_path)
    batch = batch_of(pairs_of(config, few_pairs(tmp_path), cache_dir), range(8))
    norm = model.causal_lm.model.norm
    forward = norm.forward
    norm.forward = lambda hidden: torch.nn.functional.dropout(forward(hidden), 0.1, training=True)
    with pytest.raises(ValueError, match="dropout is active in evaluation mode"):
        audit_start(run, model, reference, reference.logps, step(batch))


def test_the_audit_names_a_stale_table(run: Run, precomputing) -> None:
    _, model, reference, data, collate, lengths = precomputing
    look_up = reference.of_data(run, data, collate, lengths)
    batch = collate([1, 2, 3])
    audit_start(run, model, reference, look_up, step(batch))
    with pytest.raises(ValueError, match="a stale cache"):
        audit_start(run, model, reference, lambda batch: look_up(batch) + 0.3, step(batch))


def test_ranks_look_for_the_cause_together(run: Run, precomputing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stale rows lie in another rank's batch: this one must neither go on into a forward nor name another cause."""
    _, model, reference, data, collate, lengths = precomputing
    look_up = reference.of_data(run, data, collate, lengths)
    asked: list[float] = []

    def maximum(ours: float) -> float:
        asked.append(ours)
        return max(ours, float(len(asked) == 2))  # two passes agree everywhere, the table only here

    monkeypatch.setattr(run, "maximum", maximum)
    assert "a stale cache" in _cause(run, model, reference, look_up, collate([1, 2, 3]))
    assert asked == [0.0, 0.0]


def test_the_audit_names_another_model(start: Path, run: Run, tmp_path: Path, cache_dir: Path) -> None:
    base = str(start.parent / "base")
    config = dpo_config(*on(start, "--reference.source", "model", "--reference.path", base))
    model = load(config)
    reference = reference_of(config, model, run, tmp_path)
    batch = batch_of(pairs_of(config, few_pairs(tmp_path), cache_dir), range(8))
    with pytest.raises(ValueError, match="holds other weights than what training starts from"):
        audit_start(run, model, reference, reference.logps, step(batch))


def test_a_resumed_run_proves_its_reference(start: Path, run: Run, tmp_path: Path, cache_dir: Path) -> None:
    """By token ids of its own: rows that come in another order or are no more there say nothing of the reference."""
    config = dpo_config(*on(start))
    model = load(config)
    reference = reference_of(config, model, run, tmp_path)
    data, others = (pairs_of(config, few_pairs(tmp_path, count), cache_dir) for count in (48, 20))
    progress = Progress()
    reference.prove(run, data, folder_of(tmp_path), progress)
    progress = Progress(**json.loads(json.dumps(dataclasses.asdict(progress))))
    noted = progress.reference
    assert len(noted["pairs"]) == 4 and [len(pair) for pair in noted["logps"]] == [2] * 4

    resumed = folder_of(tmp_path, tmp_path / "checkpoints" / "step-000001")
    disturb(model)
    reference.prove(run, others, resumed, progress)  # the policy moved and so did the data, the reference did not
    twice = dataclasses.replace(config, reference=dataclasses.replace(config.reference, share_prompt=False))
    reference_of(twice, model, run, tmp_path).prove(run, data, resumed, progress)
    assert progress.reference == noted and resumed.history == []

    another = load(dpo_config("--model.path", str(start.parent / "base")))
    other = reference_of(config, another, run, tmp_path)
    with pytest.raises(ValueError, match="it is not the one this run began with"):
        other.prove(run, data, resumed, progress)
    with pytest.raises(ValueError, match="could prove it to be the same"):
        reference.prove(run, data, resumed, Progress())
    accepting = dataclasses.replace(config, run=dataclasses.replace(config.run, accept_changes=True))
    other.prove(run, data, dataclasses.replace(resumed, config=accepting), progress)
    assert resumed.history == ["changed after step-000001: the reference is another"]
    other.prove(run, data, resumed, progress)  # from now on


# --- Two processes


@pytest.mark.launch
@pytest.mark.ranks
def test_two_ranks_score_each_its_share_and_train_as_one(
    start: Path, tmp_path: Path, cache_dir: Path, scripts: ScriptRunner
) -> None:
    """Check 22 on two ranks: the tables agree row by row, and so do online and precomputed training."""
    pre = ("--reference.precompute", "true", "--batch.tokens_per_microbatch", "300", "--data.cache_dir")
    one = run_dpo(scripts, start, tmp_path / "one", cache_dir, *pre, str(tmp_path / "cache1"))
    assert one.code == 0, one.output

    class Launched:
        def run(self, output: Path, script: str, *arguments: str, **_):
            return launch(script, *arguments, accelerate=("--config_file", "configs/accelerate/ddp_cpu.yaml"))

    two = run_dpo(Launched(), start, tmp_path / "two", cache_dir, *pre, str(tmp_path / "cache2"))
    assert two.code == 0, two.output
    online = run_dpo(Launched(), start, tmp_path / "online", cache_dir, "--batch.tokens_per_microbatch", "300")
    assert online.code == 0, online.output
    tables = [
        {len(t): t for t in (load_file(f)["logps"] for f in (tmp_path / name / "reference").glob("*/*.safetensors"))}
        for name in ("cache1", "cache2")
    ]
    assert tables[0].keys() == tables[1].keys() == {48, 16}
    for rows, table in tables[0].items():
        torch.testing.assert_close(tables[1][rows], table, atol=TOLERANCE, rtol=0)
    first, *others = (read_metrics(tmp_path / name / "tiny-dpo") for name in ("one", "two", "online"))
    for lines in others:
        for expected, found in zip(first[2:], lines[2:], strict=True):
            assert found == pytest.approx(expected, abs=2e-5, rel=2e-5)
        same = ("train/loss", "train/grad_norm", "train/logps/chosen", "train/rewards/margins")  # others: of rounding
        assert [lines[1][name] for name in same] == pytest.approx([first[1][name] for name in same], abs=2e-5)
