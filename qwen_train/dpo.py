"""Direct preference optimisation: one run, read from top to bottom."""

import contextlib
import functools

import numpy as np
import torch
from torch import Tensor

from qwen_train.config import DPOConfig
from qwen_train.data.packing import Batch
from qwen_train.data.sources import find_sources
from qwen_train.data.stream import (
    MicroBatches,
    Stream,
    collate_preferences,
    packed_lengths,
    packed_squares,
    prefetch,
)
from qwen_train.loss.preference import NUM_SUMS, Pairs, metric_sums, preference_loss
from qwen_train.model.adapters import resolve_start
from qwen_train.model.load import load_model, load_model_config, load_tokenizer
from qwen_train.model.memory import microbatch_tokens, resolve_auto
from qwen_train.model.packed import num_adapter_parameters
from qwen_train.output.result import write_result
from qwen_train.train.distributed import Run
from qwen_train.train.evaluate import (
    HOW_TO_READ_DPO,
    change_since_start,
    evaluate_dpo,
    evaluate_sft,
    hold_out,
    hold_out_pairs,
    preference_metrics,
    sample_answers,
    sample_reference,
    side_by_side,
    under,
)
from qwen_train.train.folder import enter_run, record_config
from qwen_train.train.guard import Guard
from qwen_train.train.metrics import Metrics, Throughput, flops_per_token
from qwen_train.train.optim import build_optimizer, learning_rate, set_learning_rate
from qwen_train.train.preflight import preflight
from qwen_train.train.probe import settle
from qwen_train.train.progress import due, restore, save, save_asked
from qwen_train.train.reference import (
    Reference,
    audit_start,
    check_reference,
    probe_rows,
    score_pairs,
)
from qwen_train.train.saver import Saver, require_room
from qwen_train.train.signals import Interrupted
from qwen_train.train.splits import load_split


def train(config: DPOConfig, run: Run) -> None:
    """Train as `config` says. Raises ValueError for mistakes of the user's, and Interrupted after a signal."""
    run.check(config)
    find_sources(config)  # before anything asks the hub
    config, notes = resolve_start(config)
    preflight(config)
    tokenizer = load_tokenizer(config.model)
    shape = load_model_config(config.model)
    check_reference(config, tokenizer)
    folder = enter_run(run, config, notes)
    if folder.finished:
        return

    # -- data ---------------------------------------------------------------------------------------------------------
    data = load_split(run, config, "data.train", tokenizer)
    lengths = packed_lengths(data.dataset, config.reference.share_prompt)
    collate = collate_preferences(data.dataset, config.reference.share_prompt)
    assert isinstance(folder.config, DPOConfig)
    config = resolve_auto(folder.config, int(lengths.max()), shape, run.free_memory(), run.sharding)
    held_out = skills = None
    if config.data.eval:
        eval_data = load_split(run, config, "data.eval", tokenizer)
        held_out = hold_out_pairs(eval_data, config, run.world_size)
    if held_out and config.data.eval_sft:
        sft_data = load_split(run, config, "data.eval_sft", tokenizer)
        skills = hold_out(sft_data, tokenizer, config, run.world_size)
    stream = Stream(
        config,
        lengths=lengths,
        squares=packed_squares(data.dataset, config.reference.share_prompt),
        total_weights=np.ones(len(data)),  # a pair counts as one
        collate=collate,
        tokens_per_microbatch=microbatch_tokens(config),
        sources=data.column("source"),
        source_weights=[source.weight for source in data.sources],
        rank=run.rank,
        world_size=run.world_size,
    )
    total_steps = stream.total_steps
    if stream.repeats:
        run.note(f"warning: {stream.repeats}")

    # -- model, reference and optimizer, fresh or from a checkpoint ---------------------------------------------------
    model = run.prepare(load_model(config, tokenizer, run.device, folder.base, run.is_main, sharded=run.sharded))
    reference = Reference(config, model, tokenizer, run, folder.base)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    progress = restore(run, folder, model, optimizer, data, stream)
    if held_out:
        of_skills = {"data.eval_sft": sft_data.report.content} if skills else {}
        progress.hold_out(config, {"data.eval": eval_data.report.content, **of_skills})
    run.from_main(lambda: require_room(folder.checkpoints, model, config, total_steps - progress.step))
    ref_logps = reference.of_data(run, data, collate, lengths)
    if held_out:
        eval_ref_logps = reference.of_data(run, eval_data, held_out.collate, held_out.lengths)
        ref_answers = sample_reference(run, reference, held_out, tokenizer)
    if reference.source:
        if folder.checkpoint is None:
            audit_start(run, model, reference, ref_logps, stream[0])
        reference.prove(run, data, folder, progress)
    if config.reference.precompute:
        reference.release()
    config = settle(run, folder.config, config, model, optimizer, int(lengths.max()), shape)  # `auto`, measured
    stream.tokens_per_microbatch = microbatch_tokens(config)
    flops = functools.partial(
        flops_per_token,
        model.lm.config,
        lora_parameters=num_adapter_parameters(model),
        head_fraction=data.report.supervised_tokens / int(lengths.sum()),
        reference_forward=reference.source is not None and not config.reference.precompute,
    )

    run.begin()
    with (
        Metrics(folder.path, total_steps, progress.step if folder.checkpoint else None, run.is_main) as metrics,
        Saver(folder.checkpoints, config.run.keep, metrics.sync) as saver,
    ):
        throughput = Throughput(run.device, flops, run.world_size, unit="pairs")

        def evaluate() -> None:
            if held_out is None or progress.evaluated == progress.step:
                return
            with throughput.paused():
                values = evaluate_dpo(run, model, held_out, eval_ref_logps, config.loss)
                values |= change_since_start(progress, values)
                sampled, texts = sample_answers(run, model, held_out, tokenizer)
                values |= sampled
                if skills:
                    values |= under("eval/sft", evaluate_sft(run, model, skills))
                    values |= under("eval/sft", sample_answers(run, model, skills, tokenizer)[0])
                metrics.log(progress.step, values)
                metrics.samples(progress.step, "eval/samples", side_by_side(texts, ref_answers))
                progress.evaluated = progress.step

        if progress.step == 0:
            metrics.text(0, "how to read", HOW_TO_READ_DPO)
        if progress.evaluated < 0 or progress.step >= total_steps or due(progress.step, config.run.eval_every):
            evaluate()

        record_config(run, folder, config)

        # -- the loop -------------------------------------------------------------------------------------------------
        guard = Guard(run, folder.path, config.optim, data, stream, progress, optimizer, metrics)

        def score(batch: Batch) -> tuple[Pairs, Tensor]:
            """The pairs' log-probabilities and losses."""
            expected = ref_logps(batch)  # first: no activations are held yet
            pairs = score_pairs(model(batch).logps, expected, batch)
            return pairs, preference_loss(pairs, config.loss)

        def gradients(microbatches: MicroBatches, step: int) -> Tensor:
            """Adds up this rank's gradients of a step; its share of the `metric_sums`."""
            sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=run.device)
            for batch in run.accumulate(microbatches, step):
                pairs, losses = score(batch)
                run.backward(losses.sum() / microbatches.total_weight * run.world_size)  # pairs of the global step
                sums += metric_sums(pairs, losses, config.loss)
            return sums

        def row_losses(batch: Batch) -> Tensor:
            """Loss of each pair, to tell which ones make a step bad."""
            return score(batch)[1]

        steps = range(progress.step, total_steps)
        for step, microbatches in throughput.watch(prefetch(stream, steps, config.data.workers)):
            lr = learning_rate(config.optim, step, total_steps)
            set_learning_rate(optimizer, lr)
            sums, microbatches = guard.accumulate(gradients, microbatches, step)  # smaller ones if memory runs out
            run.average_gradients(model)
            grad_norm = run.clip_grad_norm(model, config.optim.max_grad_norm)
            means = preference_metrics("train", run.sum(sums))
            loss = means["train/loss"]
            # The same numbers on every rank: all of them agree.
            if guard.accepts(step, microbatches, loss, grad_norm, row_losses):
                optimizer.step()
            optimizer.zero_grad()
            progress.step, progress.num_tokens = step + 1, progress.num_tokens + microbatches.num_tokens
            throughput.add(microbatches.num_tokens, microbatches.num_sequences, microbatches.mean_length)

            # -- log, evaluate, save, leave ---------------------------------------------------------------------------
            last = progress.step == total_steps
            metrics.advance(progress.step)
            if last or due(progress.step, config.run.log_every):
                values = {
                    **means,
                    "train/learning_rate": lr,
                    "train/grad_norm": grad_norm,
                    "train/epoch": microbatches.epoch,
                    "train/num_tokens": progress.num_tokens,
                    "train/skipped_steps": progress.skipped,
                    "train/oom_retries": progress.oom_retries,
                }
                metrics.log(progress.step, values | throughput.read())
            if last or due(progress.step, config.run.eval_every):
                with contextlib.suppress(Interrupted):  # saved first; the resumed run begins with this evaluation
                    evaluate()
            stopping = run.should_stop()
            if last or stopping or due(progress.step, config.run.save_every) or save_asked(run, folder):
                with throughput.paused():
                    save(run, folder, progress, model, optimizer, config, saver, stream)
            saver.check()
            if stopping:
                saver.wait()
                run.barrier()  # every rank leaves when the checkpoint is on the disk
                raise Interrupted(f"stopped after step {progress.step} of {total_steps}")

    # -- what the run hands over --------------------------------------------------------------------------------------
    write_result(run, folder, model, tokenizer, config, progress, probe=collate(probe_rows(len(data))))
