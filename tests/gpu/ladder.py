"""The ladder: where we stand, each technique, loss curves, rounding errors and a peer, in one call on the same files.

    python tests/gpu/ladder.py --model DIR --sft sft.jsonl --dpo dpo.jsonl --out DIR [--peer FILE] [--only TEXT]
        [SECTION ...]

`--model`, `--sft`, `--dpo`: as of bench.py. `--peer`: a script that takes the options of TRL's peer (`sft|dpo --model
--data --bs --steps --warm ...`) and prints one JSON line; random weights are written for it to `--scratch`. Sections,
in the order given: limits, where, more, small, curves, errors, peer, ladder. A row is left out when less time is left
of `--seconds` than it is expected to take, and said so. Writes ladder.jsonl and ladder.md, the tables of
docs/measured.md, anew after every row; what ladder.jsonl holds already is part of the tables, so that a call may be
made of several (the peer without the packages that are ours alone).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import bench
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_train.data.stream import prefetch
from qwen_train.model.kernels import round_rows
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.shapes import known_shape
from qwen_train.train.distributed import Run


class Row(NamedTuple):
    """One case of bench.py."""

    label: str
    case: str
    against: str | None = None
    """Label of the row that the ratio is taken to."""
    seconds: int = 45
    """Expected, with loading and compiling."""


ASSISTANT = "sequences=64,steps=6,supervise=assistant"
WHERE = [
    Row("bf16", f"sft:{ASSISTANT}", "TRL SFT, answers only", 45),
    Row("bf16, all tokens supervised", "sft:sequences=64,steps=6", "TRL SFT", 30),
    Row("fp8", f"sft:{ASSISTANT},quantization=fp8", "TRL SFT, answers only", 40),
    Row("fp8, all tokens supervised", "sft:sequences=64,steps=6,quantization=fp8", "TRL SFT", 30),
    Row("NF4", f"sft:{ASSISTANT},quantization=nf4", None, 40),
    Row("NF4, all tokens supervised", "sft:sequences=64,steps=6,quantization=nf4", "TRL QLoRA", 35),
    Row("DPO, reference online", "dpo:steps=12", "TRL DPO", 75),
    Row(
        "NF4, recomputed",
        "sft:sequences=32,steps=5,tokens=7168,chunk=1024,checkpoint=28,quantization=nf4",
        "TRL QLoRA",
        30,
    ),
]
# Small micro-batches: new lengths meet kernels of the products that were not loaded yet, for some ten steps.
MORE = [
    Row("DPO, fp8", "dpo:steps=8,quantization=fp8"),
    Row("DPO, reference looked up", "dpo:steps=8,reference=precomputed"),
    Row("bf16 within 40 GiB", "sft:sequences=32,steps=14,warm=10,tokens=4096,chunk=2048,supervise=assistant", None, 30),
    Row("bf16 within 20 GiB, recomputed", "sft:sequences=32,steps=6,tokens=6144,chunk=1024,checkpoint=28", None, 30),
    Row("full training, adamw_8bit", "sft:sequences=64,steps=4,warm=2,full=True,optim=adamw_8bit,tokens=8192"),
]
# What `auto` gives small models on an H200, and what it gave them before: the host is slower than the GPU there.
SMALL = [
    Row(f"{size}, {tokens} tokens", f"sft:sequences=64,steps=8,warm=5,tokens={tokens},supervise=assistant", against, 25)
    for size, tokens, against in (
        ("0.5B", 16384, None),
        ("0.5B", 65536, "previous"),
        ("1.5B", 16384, None),
        ("1.5B", 32768, "previous"),
    )
]
# Each rung adds one technique to the one before it. The plain ones keep fp32 adapters' copies: 8,192 tokens fit.
BEST = "sft:sequences=32,steps=4,warm=2,tokens=8192,supervise=assistant"
SHORT = f"{BEST},attention=varlen"
PLAIN = f"{SHORT},compile=False,off=lora+rows+head"
LADDER = [
    Row("padded to the longest of 8, all recomputed, eager, PEFT's forward, head at all positions",
        "sft:sequences=16,steps=3,warm=1,pad=8,supervise=assistant,checkpoint=28,compile=False,attention=varlen,"
        "off=lora+rows+head+supervised", None, 15),
    Row("+ no padding", f"{PLAIN}+supervised,checkpoint=28", "previous", 20),
    Row("+ no recomputation", f"{PLAIN}+supervised", "previous", 15),
    Row("+ head at supervised positions", PLAIN, "previous", 15),
    Row("+ compiled layers", f"{SHORT},off=lora+rows+head", "previous", 35),
    Row("+ LoRA groups as one operation", f"{SHORT},off=feed_forward+rotary+norms+open+wide+rows+head", "previous", 25),
    Row("+ norms, rotary and the head's softmax as kernels", f"{SHORT},off=feed_forward+wide+rows", "previous", 18),
    Row("+ feed-forward in two operations", f"{SHORT},off=wide+rows", "previous", 18),
    Row("+ gate|up with its adapter in one GEMM", f"{SHORT},off=rows", "previous", 15),
    Row("+ last layer at supervised positions", SHORT, "previous", 12),
    Row("+ flash-attn-4", BEST, "previous", 25),
    Row("+ fp8 base", f"{BEST},quantization=fp8", "previous", 12),
    Row("DPO, prompt repeated", "dpo:steps=4,warm=2,sequences=24,share=False", None, 25),
    Row("DPO, prompt shared", "dpo:steps=4,warm=2,sequences=24", "previous", 15),
]  # fmt: skip
CURVE = "sft:steps=50,warm=10,sequences=8,tokens=8192,supervise=assistant,lr=1e-3"
CURVES = [
    Row("plain", f"{CURVE},compile=False,off=lora+rows+head,attention=sdpa"),
    Row("fast", CURVE, "plain"),
    Row("fp8", f"{CURVE},compile=False,quantization=fp8", "plain", 25),
    Row("NF4", f"{CURVE},compile=False,quantization=nf4", "plain", 25),
    Row("control: learning rate 5 % off", f"{CURVE.replace('1e-3', '1.05e-3')},compile=False", "plain", 25),
]
CURVE_LAYERS = 4
PEER = {
    "TRL SFT": "sft --bs 8 --packing --liger --attn varlen --no_ckpt",
    "TRL SFT, answers only": "sft --bs 8 --packing --liger --attn varlen --no_ckpt --assistant_only",
    "TRL DPO": "dpo --bs 4 --no_ckpt --steps 20",  # 20 pairs, as in 9 steps, are few: their lengths differ
    "TRL QLoRA": "sft --bs 8 --packing --liger --attn varlen --qlora",
}
PEER_SECONDS = 60  # DPO takes 80


class Ladder:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.start = time.monotonic()
        self.run = Run(seed=0, deterministic=False)
        before = self.out / "ladder.jsonl"
        lines = before.read_text().splitlines() if before.exists() else []
        self.results: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.shape = AutoConfig.from_pretrained(args.model)

    def has_time(self, label: str, seconds: int) -> bool:
        left = self.args.seconds - (time.monotonic() - self.start)
        if left < seconds:
            print(f"left out: {label} ({left:.0f} s left, {seconds} s needed)", flush=True)
        return left >= seconds

    def add(self, section: str, label: str, against: str | None = None, **result: Any) -> None:
        self.results = [one for one in self.results if (one["section"], one["label"]) != (section, label)]
        self.results.append({"section": section, "label": label, "against": against, **result})
        (self.out / "ladder.jsonl").write_text("".join(json.dumps(one) + "\n" for one in self.results))
        (self.out / "ladder.md").write_text(report(self.results))
        shown = {key: value for key, value in result.items() if key not in ("losses", "norms", "step_ms")}
        print(section, "|", label, "|", json.dumps(shown)[:700], flush=True)
        bench.clear()

    def cases(self, section: str, rows: list[Row], model: str | None = None) -> None:
        for row in rows:
            if self.args.only not in row.label or not self.has_time(row.label, row.seconds):
                continue
            arguments = argparse.Namespace(**vars(self.args) | {"label": row.case, "model": model or self.args.model})
            begin = time.monotonic()
            try:
                result = bench.measure(bench.parse_case(row.case), arguments, self.run)
            except (RuntimeError, ValueError) as error:  # one case that fails must not cost the others' time
                result = {"case": row.case, "error": f"{type(error).__name__}: {str(error)[:600]}"}
            self.add(section, row.label, row.against, whole_seconds=round(time.monotonic() - begin), **result)

    # -- sections -------------------------------------------------------------------------------------------------

    def limits(self) -> None:
        """Time of the bare products of a step, a token, under the load of seconds: what no loop can be faster than."""
        if self.has_time("limits", 15):
            for quantization in ("none", "fp8"):
                self.add("limits", quantization, **bare_products(self.shape, quantization))

    def where(self) -> None:
        self.cases("where", WHERE)

    def more(self) -> None:
        self.cases("more", MORE)

    def small(self) -> None:
        for row in SMALL:
            size, _, _ = row.label.partition(",")
            shape = known_shape(f"Qwen/Qwen2.5-{size}-Instruct").to_dict()
            self.cases("small", [row], with_config(self.args, size, **shape))

    def ladder(self) -> None:
        self.cases("ladder", LADDER)

    def curves(self) -> None:
        """50 steps of the same data and start, on few layers of the model's width."""
        self.cases("curves", CURVES, with_config(self.args, "few-layers", num_hidden_layers=CURVE_LAYERS))

    def errors(self) -> None:
        """Mean |difference of log-probability| a supervised token to bf16, the weights being the same."""
        exact = None
        for base, off in (("none", ""), ("none", "lora+rows+head"), ("fp8", ""), ("nf4", "")):
            label = base if not off else "control: none, by transformers' and PEFT's own forward"
            if not self.has_time(f"error of {label}", 15):
                return
            logps = scores(self.args, self.run, base, off)
            exact = logps if exact is None else exact
            gap = (logps - exact).abs()
            self.add("errors", label, mean=float(gap.mean()), p99=float(gap.quantile(0.99)), tokens=len(gap))

    def peer(self) -> None:
        weights = Path(self.args.scratch) / "peer_model"
        for label, options in PEER.items():
            if self.args.peer is None or self.args.only not in label or not self.has_time(label, PEER_SECONDS):
                continue
            if not (weights / "config.json").exists():
                write_weights(self.args.model, weights)
            data = self.args.dpo if options.startswith("dpo") else self.args.sft
            command = [sys.executable, self.args.peer, "--steps", "9", "--warm", "4", *options.split()]
            command += ["--model", str(weights), "--data", data]
            begin = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"peer"' in line]
            if done.returncode or not lines:
                self.add("peer", label, error=(done.stderr or done.stdout)[-600:])
                continue
            told = json.loads(lines[-1])
            self.add(
                "peer",
                label,
                case=options,
                tokens_per_second=round(told["tok_s"]),
                pairs_per_second=round(told["seq_s"], 2) if label == "TRL DPO" else None,
                peak_gib=round(told["peak_GiB"], 1),
                whole_seconds=round(time.monotonic() - begin),
            )


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def bare_products(shape: Any, quantization: str, tokens: int = 16384, seconds: float = 2.5) -> dict[str, Any]:
    """Microseconds a token of the frozen linear layers' products, forward and backward, one after another as in a step.

    And of the head's two products, a supervised token. On random data; the clock is the one that sustained work gets.
    """
    hidden, wide = shape.hidden_size, shape.intermediate_size
    qkv = hidden + 2 * hidden * shape.num_key_value_heads // shape.num_attention_heads
    forward = [(hidden, qkv), (hidden, hidden), (hidden, 2 * wide), (wide, hidden)]
    calls = []
    for inner, outer in [*forward, *((outer, inner) for inner, outer in reversed(forward))]:
        left = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        right = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) * 0.02
        if quantization == "fp8":
            left, left_scale = round_rows(left)
            right, right_scale = round_rows(right)
            scales = {"scale_a": left_scale, "scale_b": right_scale.T.contiguous(), "use_fast_accum": True}
            calls.append(
                lambda a=left, b=right, scales=scales: torch._scaled_mm(a, b.T, **scales, out_dtype=torch.bfloat16)
            )
        else:
            calls.append(lambda a=left, b=right: a @ b.T)
    chunk = 4096
    hidden_rows = torch.randn(chunk, hidden, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(shape.vocab_size, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
    residual = torch.randn(chunk, shape.vocab_size, device="cuda", dtype=torch.bfloat16)
    head_calls = [
        lambda: torch.mm(hidden_rows, head.T, out_dtype=torch.float32),
        lambda: residual @ head,
    ]
    layer = sustained(calls, seconds) / tokens * shape.num_hidden_layers
    flop = 4 * tokens * sum(inner * outer for inner, outer in forward) / tokens * shape.num_hidden_layers
    result = {"layers_us": layer, "layers_tflops": flop / layer / 1e6, "head_us": sustained(head_calls, 1.0) / chunk}
    return {name: round(value, 3) for name, value in result.items()}


def sustained(calls: list[Any], seconds: float) -> float:
    """Mean microseconds of one round of calls, the later half of `seconds` of them."""
    times = []
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(3):
            for call in calls:
                call()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1000 / 3)
    return statistics.mean(times[len(times) // 2 :])


def scores(args: argparse.Namespace, run: Run, quantization: str, off: str) -> torch.Tensor:
    """Log-probabilities of the tokens of one micro-batch."""
    case = bench.parse_case(f"sft:compile=False,sequences=16,supervise=assistant,quantization={quantization}")
    config = bench.make_config(case, args)
    bench.take_out(off)
    model = load_model(config, load_tokenizer(config.model), run.device, Path("/nonexistent"), is_main=False)
    _, microbatches = next(iter(prefetch(bench.make_stream(config, case), range(1), 0)))
    with torch.no_grad():
        return model(microbatches.batches[0].to(run.device)).logps


def with_config(args: argparse.Namespace, name: str, **fields: Any) -> str:
    """The model's folder with other fields in its config.json."""
    folder = Path(args.scratch) / name
    shutil.copytree(args.model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return str(folder)


def write_weights(model: str, folder: Path) -> None:
    """Random bf16 weights for a peer, which wants a checkpoint, with the tokenizer beside."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    for path in Path(model).iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    del lm
    bench.clear()  # the peer is another process, and wants the whole card


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(results: list[dict[str, Any]]) -> str:
    """Markdown tables of what is there."""
    by_label = {result["label"]: result for result in results}
    limits = {result["label"]: result for result in results if result["section"] == "limits"}
    lines: list[str] = []
    for section in dict.fromkeys(result["section"] for result in results):
        rows = [result for result in results if result["section"] == section]
        lines += [f"## {section}", "", *TABLES.get(section, cases_table)(rows, by_label, limits), ""]
    return "\n".join(lines)


def cases_table(rows: list[dict], by_label: dict[str, dict], limits: dict[str, dict]) -> list[str]:
    lines = ["| | case | tokens/s | pairs/s | peak GiB | ratio | of the bare products' time | MHz | W |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for index, row in enumerate(rows):
        if "error" in row:
            lines.append(
                f"| {row['label']} | `{row.get('case', '')}` | {' '.join(row['error'].split())[:200]} | | | | | | |"
            )
            continue
        other = rows[index - 1] if row["against"] == "previous" and index else by_label.get(row["against"] or "", {})
        key = "pairs_per_second" if row["pairs_per_second"] and other.get("pairs_per_second") else "tokens_per_second"
        ratio = f"{row[key] / other[key]:.2f} x {other['label']}" if other.get(key) else ""
        limit = limits.get("fp8" if "quantization=fp8" in row["case"] else "none")
        share = ""
        if limit and row["case"].startswith("sft:") and "checkpoint" not in row["case"] and "full" not in row["case"]:
            bare = limit["layers_us"] + limit["head_us"] * row["supervised"]
            share = f"{bare * row['tokens_per_second'] / 1e6:.0%}"
        lines.append(
            f"| {row['label']} | `{row['case']}` | {row['tokens_per_second']:,} | {row['pairs_per_second'] or ''} "
            f"| {row['peak_gib']} | {ratio} | {share} | {row.get('clock_mhz', '')} | {row.get('watts', '')} |"
        )
    return lines


def limits_table(rows: list[dict], *_: Any) -> list[str]:
    lines = ["| base | layers, us a token | TFLOP/s | head, us a supervised token |", "|---|---|---|---|"]
    return lines + [f"| {r['label']} | {r['layers_us']} | {r['layers_tflops']} | {r['head_us']} |" for r in rows]


def curves_table(rows: list[dict], by_label: dict[str, dict], _: Any) -> list[str]:
    lines = ["| | loss at step 1, 25, 50 | mean gap to plain | largest |", "|---|---|---|---|"]
    plain = next((row for row in rows if row["label"] == "plain"), None)
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['label']} | {row['error'][:200]} | | |")
            continue
        losses = row["losses"]
        gaps = [abs(a - b) for a, b in zip(losses, plain["losses"], strict=True)] if plain else [float("nan")]
        shown = ", ".join(f"{losses[step]:.4f}" for step in (0, 24, 49))
        lines.append(f"| {row['label']} | {shown} | {statistics.mean(gaps):.4f} | {max(gaps):.4f} |")
    return lines


def errors_table(rows: list[dict], *_: Any) -> list[str]:
    lines = [
        "| base | mean distance of a log-probability to bf16's, nats | 99th percentile | tokens |",
        "|---|---|---|---|",
    ]
    return lines + [f"| {r['label']} | {r['mean']:.4f} | {r['p99']:.4f} | {r['tokens']} |" for r in rows]


TABLES = {"limits": limits_table, "curves": curves_table, "errors": errors_table}
SECTIONS = ("limits", "where", "more", "small", "curves", "errors", "peer", "ladder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "sft", "dpo", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--peer")
    parser.add_argument("--only", default="", help="the cases whose label holds this")
    parser.add_argument("--scratch", default="/tmp/ladder")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    args = parser.parse_args()
    ladder = Ladder(args)
    for section in args.sections:
        if section not in SECTIONS:
            raise SystemExit(f"sections: {section} is none of {', '.join(SECTIONS)}")
        getattr(ladder, section)()
    print((ladder.out / "ladder.md").read_text())


if __name__ == "__main__":
    main()
