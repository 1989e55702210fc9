"""How fast this project trains, beside what people would use instead, on the same machine.

    make benchmark                                               # two CPU cores, under 10 minutes
    python benchmarks/train_speed.py --model qwen2.5-7b --records 512 --batch_size 8   # on a GPU

Contenders, each in a process of its own, taking turns:
  recipe     the usual one: transformers' Trainer and PEFT as they come, records in random order,
             logits everywhere, gradient checkpointing
  trl        TRL's SFTTrainer at its fastest settings, loss on the completion only
  trl_tag    the same given our labels, which it has no way to make by itself
  lora       this project, --adapter lora
  activated  this project, --adapter activated
Real tokens a second: padding is not counted. Loading and the first update are not timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
CONTENDERS = ("recipe", "trl", "trl_tag", "lora", "activated")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="small", help="a key of workload.MODELS")
    add("--contenders", nargs="+", default=CONTENDERS)
    add("--records", type=int, default=2000, help="records that batches are drawn from")
    add("--steps", type=int, default=16, help="updates of each contender in a round")
    add("--batch_size", type=int, default=4, help="records at a time")
    add("--accumulation", type=int, default=2, help="batches in an update")
    add("--rounds", type=int, default=3, help="turns of each contender; medians are shown")
    add("--same_order", action="store_true", help="all take the records in file order")
    add("--no_checkpointing", action="store_true", help="the usual recipe without it")
    add(
        "--flags", default="", help="more for lora and activated, as --flags='--torch_compile True'"
    )
    add("--json", help="append the result to this file")
    add("--worker", help=argparse.SUPPRESS)
    return parser


# ------------------------------------------------------------------------------------------------
# In the worker: one contender, one round


def make_trainer(kind: str, folder: Path, options: argparse.Namespace):
    """The contender's trainer on the records in `folder`, with its model loaded."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    import train_confidence_lora as confidence

    set_seed(0)
    on_gpu = torch.cuda.is_available()
    start = time.perf_counter()
    adapter = "activated" if kind == "activated" else "lora"
    model, tokenizer = confidence.initialize_model_with_tokens(
        str(folder / "model"),
        adapter,
        lora_dropout=0.0,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    loading = time.perf_counter() - start
    settings = confidence.Settings(train_data=str(folder / "records.jsonl"), adapter=adapter)
    records = confidence.read_records(settings.train_data)
    rows = confidence.encode_dataset(tokenizer, records, settings)
    arguments = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": options.steps,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "seed": 1,
    }
    ids = confidence.confidence_ids(tokenizer)
    if kind in ("lora", "activated"):
        confidence.keep_freed_memory()  # as run() does
        trainer = confidence.LabelTrainer(
            confidence.confidence_recipe(settings, tokenizer, model.dtype),
            model=model,
            args=TrainingArguments(**arguments, **more_flags(options.flags.split())),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    elif kind == "recipe":
        use_peft_layers(model, confidence)
        if not options.no_checkpointing:
            arguments["gradient_checkpointing"] = True
            arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

        def weighted(outputs, labels, num_items_in_batch):  # the same objective as ours
            labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
            losses = torch.nn.functional.cross_entropy(
                outputs.logits.float().flatten(0, 1), labels, reduction="none"
            )
            special = torch.isin(labels, torch.tensor(ids.all, device=labels.device))
            weights = torch.where(special, 1.0, confidence.HELD_WEIGHT)
            return (losses * weights).sum() / num_items_in_batch

        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=rows.remove_columns(["length", "source"]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            processing_class=tokenizer,
            compute_loss_func=weighted,
        )
    else:
        from trl_contender import make_trl_trainer

        use_peft_layers(model, confidence)
        trainer = make_trl_trainer(model, tokenizer, rows, arguments, kind == "trl_tag")
    # A length-grouped order begins with its longest batches: take updates from all over it
    order = list(range(len(rows)) if options.same_order else trainer._get_train_sampler())
    size = options.batch_size * options.accumulation
    stride = len(order) // size // options.steps
    starts = [size * stride * i for i in range(options.steps)]
    chosen = [index for start in starts for index in order[start : start + size]]
    trainer._get_train_sampler = lambda *_: chosen
    return trainer, loading


def use_peft_layers(model, confidence) -> None:
    """Takes back what use_lean_layers() did: the others train with PEFT as it comes."""
    for module in model.modules():
        if type(module).__module__ == confidence.__name__:
            module.__class__ = type(module).__base__


def more_flags(flags: list[str]) -> dict:
    """["--torch_compile", "--optim", "adamw_torch_fused"] as keyword arguments."""
    import train_confidence_lora as confidence

    defaults = confidence.parse_command_line([])[1]
    given = confidence.parse_command_line(flags)[1]
    return {key: value for key, value in given.items() if defaults.get(key) != value}


def work(kind: str, folder: Path, options: argparse.Namespace) -> dict:
    """Trains once over the records; the first update is not timed, and no padding is counted."""
    import torch
    from transformers import TrainerCallback

    import train_confidence_lora as confidence

    trainer, loading = make_trainer(kind, folder, options)
    real, padded, marks = [], [], []
    collate = trainer.data_collator

    def counting(rows):
        batch = collate(rows)
        mask = batch.get(
            "attention_mask", batch["input_ids"] != trainer.processing_class.pad_token_id
        )
        real.append(int(mask.sum()))
        padded.append(mask.numel())
        return batch

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    before = confidence.peak_memory(reset=True)
    trainer.train()
    start = time.perf_counter()
    confidence.save_adapter(trainer.model, trainer.processing_class, folder / "saved")
    saving = time.perf_counter() - start
    used = slice(options.accumulation, options.accumulation * options.steps)
    return {
        "tokens_per_second": sum(real[used]) / (marks[-1] - marks[0]),
        "padding": 1 - sum(real[used]) / sum(padded[used]),
        "peak_gb": confidence.peak_memory() / 1e9,
        "model_gb": before / 1e9,
        "loading_seconds": loading,
        "saving_seconds": saving,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


# ------------------------------------------------------------------------------------------------
# In the parent: the turns, the table


def measure(kind: str, folder: Path, argv: list[str]) -> dict:
    """A round of one contender, in a process of its own; exits with its output if it fails."""
    command = [sys.executable, __file__, *argv, "--worker", kind]
    done = subprocess.run(
        command, env={**os.environ, "WORKLOAD": str(folder)}, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        f"{'':12}{'tokens/s':>10}{'range':>16}{'x recipe':>10}{'padding':>9}{'peak GB':>9}"
        f"{'training GB':>13}{'last loss':>11}"
    ]
    medians = {
        kind: statistics.median(turn["tokens_per_second"] for turn in turns)
        for kind, turns in results.items()
    }
    first = next(iter(medians.values()))
    for kind, turns in results.items():
        speeds = [turn["tokens_per_second"] for turn in turns]
        peak = statistics.median(turn["peak_gb"] for turn in turns)
        model = statistics.median(turn["model_gb"] for turn in turns)
        lines.append(
            f"{kind:12}{medians[kind]:10,.0f}{f'{min(speeds):,.0f}…{max(speeds):,.0f}':>16}"
            f"{medians[kind] / first:10.2f}{turns[-1]['padding']:9.1%}{peak:9.2f}"
            f"{peak - model:13.2f}{turns[-1]['losses'][-1]:11.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    options = build_parser().parse_args()
    if options.worker:
        result = work(options.worker, Path(os.environ["WORKLOAD"]), options)
        print(json.dumps(result))
        return
    import torch
    import workload

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.make_model(folder / "model", options.model)
        workload.write_records(folder / "records.jsonl", options.records)
        print(
            f"{options.model} on {device}: {options.steps} updates of {options.accumulation} x "
            f"{options.batch_size} records, {options.rounds} rounds"
        )
        results: dict[str, list[dict]] = {kind: [] for kind in options.contenders}
        for _ in range(options.rounds):
            for kind in options.contenders:
                results[kind].append(measure(kind, folder, sys.argv[1:]))
    print(table(results))
    if options.json:
        with Path(options.json).open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"device": device, "model": options.model, "train": results}) + "\n"
            )
    if options.same_order and {"recipe", "lora"} <= set(results):
        pairs = zip(results["recipe"][0]["losses"], results["lora"][0]["losses"], strict=True)
        print(
            f"largest difference of loss, recipe and lora: {max(abs(a - b) for a, b in pairs):.1e}"
        )


if __name__ == "__main__":
    main()
