"""Supervised fine-tuning: one run, read from top to bottom."""

import contextlib
import functools

import torch
from torch import Tensor

from qwen_train.config import SFTConfig
from qwen_train.data.packing import Batch
from qwen_train.data.sources import find_sources
from qwen_train.data.stream import MicroBatches, Stream, collate_conversations, prefetch
from qwen_train.model.adapters import resolve_start
from qwen_train.model.load import load_model, load_model_config, load_tokenizer
from qwen_train.model.memory import microbatch_tokens, resolve_auto
from qwen_train.model.packed import num_adapter_parameters
from qwen_train.output.result import write_result
from qwen_train.train.distributed import Run
from qwen_train.train.evaluate import HOW_TO_READ_SFT, evaluate_sft, hold_out, sample_answers
from qwen_train.train.folder import enter_run, record_config
from qwen_train.train.guard import Guard
from qwen_train.train.metrics import Metrics, Throughput, flops_per_token
from qwen_train.train.optim import build_optimizer, learning_rate, set_learning_rate
from qwen_train.train.preflight import preflight
from qwen_train.train.probe import settle
from qwen_train.train.progress import due, restore, save, save_asked
from qwen_train.train.saver import Saver, require_room
from qwen_train.train.signals import Interrupted
from qwen_train.train.splits import load_split


def train(config: SFTConfig, run: Run) -> None:
    """Train as `config` says. Raises ValueError for mistakes of the user's, and Interrupted after a signal."""
    run.check(config)
    find_sources(config)  # before anything asks the hub
    config, notes = resolve_start(config)
    preflight(config)
    folder = enter_run(run, config, notes)
    if folder.finished:
        return

    # -- data ---------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    shape = load_model_config(config.model)
    data = load_split(run, config, "data.train", tokenizer)
    longest = int(data.column("length").max())
    config = resolve_auto(folder.config, longest, shape, run.free_memory(), run.sharding)
    held_out = None
    if config.data.eval:
        eval_data = load_split(run, config, "data.eval", tokenizer)
        held_out = hold_out(eval_data, tokenizer, config, run.world_size)
    stream = Stream(
        config,
        lengths=data.column("length"),
        total_weights=data.column("total_weight"),
        collate=collate_conversations(data.dataset),
        tokens_per_microbatch=microbatch_tokens(config),
        sources=data.column("source"),
        source_weights=[source.weight for source in data.sources],
        rank=run.rank,
        world_size=run.world_size,
    )
    total_steps = stream.total_steps
    if stream.repeats:
        run.note(f"warning: {stream.repeats}")

    # -- model and optimizer, fresh or from a checkpoint --------------------------------------------------------------
    model = run.prepare(load_model(config, tokenizer, run.device, folder.base, run.is_main, sharded=run.sharded))
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    progress = restore(run, folder, model, optimizer, data, stream)
    if held_out is not None:
        progress.hold_out(config, {"data.eval": eval_data.report.content})
    config = settle(run, folder.config, config, model, optimizer, longest, shape)  # `auto`, measured
    stream.tokens_per_microbatch = microbatch_tokens(config)
    run.from_main(lambda: require_room(folder.checkpoints, model, config, total_steps - progress.step))
    flops = functools.partial(
        flops_per_token,
        model.lm.config,
        lora_parameters=num_adapter_parameters(model),
        head_fraction=data.report.supervised_tokens / data.report.tokens,
    )

    run.begin()
    with (
        Metrics(folder.path, total_steps, progress.step if folder.checkpoint else None, run.is_main) as metrics,
        Saver(folder.checkpoints, config.run.keep, metrics.sync) as saver,
    ):
        throughput = Throughput(run.device, flops, run.world_size)

        def evaluate() -> None:
            if held_out is None or progress.evaluated == progress.step:
                return
            with throughput.paused():
                values = evaluate_sft(run, model, held_out)
                sampled, texts = sample_answers(run, model, held_out, tokenizer)
                metrics.log(progress.step, values | sampled)
                metrics.samples(progress.step, "eval/samples", texts)
                progress.evaluated = progress.step

        if progress.step == 0:
            metrics.text(0, "how to read", HOW_TO_READ_SFT)
        if progress.evaluated < 0 or progress.step >= total_steps or due(progress.step, config.run.eval_every):
            evaluate()

        record_config(run, folder, config)

        # -- the loop -------------------------------------------------------------------------------------------------
        guard = Guard(run, folder.path, config.optim, data, stream, progress, optimizer, metrics)

        def gradients(microbatches: MicroBatches, step: int) -> Tensor:
            """Adds up this rank's gradients of a step; its share of the loss, right and supervised tokens."""
            sums = torch.zeros(3, dtype=torch.float64, device=run.device)
            for batch in run.accumulate(microbatches, step):
                scores = model(batch)
                # A multiple of this very sum: full training makes the head's gradient by its weights (load_model).
                nll = -(scores.logps * batch.weights).sum() / microbatches.total_weight  # of the global step
                run.backward(nll * run.world_size)
                sums += torch.stack([nll.detach(), scores.is_argmax.sum(), torch.ones_like(batch.targets).sum()])
            return sums

        def row_losses(batch: Batch) -> Tensor:
            """Loss of each conversation, nats a token, to tell which ones make a step bad."""
            nll = batch.sequence_sums(-model(batch).logps * batch.weights)
            return nll / batch.sequence_sums(batch.weights)

        steps = range(progress.step, total_steps)
        for step, microbatches in throughput.watch(prefetch(stream, steps, config.data.workers)):
            lr = learning_rate(config.optim, step, total_steps)
            set_learning_rate(optimizer, lr)
            sums, microbatches = guard.accumulate(gradients, microbatches, step)  # smaller ones if memory runs out
            run.average_gradients(model)
            grad_norm = run.clip_grad_norm(model, config.optim.max_grad_norm)
            loss, correct, tokens = run.sum(sums)
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
                    "train/loss": loss,
                    "train/learning_rate": lr,
                    "train/grad_norm": grad_norm,
                    "train/epoch": microbatches.epoch,
                    "train/num_tokens": progress.num_tokens,
                    "train/mean_token_accuracy": correct / max(tokens, 1),
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
    write_result(run, folder, model, tokenizer, config, progress, probe=stream.collate([0]))
