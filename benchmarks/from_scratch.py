#!/usr/bin/env python3
"""The whole path without any downloaded weight: a small model and its tokenizer from scratch on the
texts of tagged answers, then a confidence LoRA on it, on answers that neither has seen.

    python benchmarks/from_scratch.py tagged/qwen/qwen_all_tagged.jsonl [MORE.jsonl …]

The first file is tuned and tested on, all are read for the texts. Prints the held-out AUROC of each
adapter beside that of a bag of words (logistic regression on the words of question and answer), and
the minutes each step took. Two processes; 2.6 million parameters unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="+", help="tagged answers, JSON Lines")
    add("--held_out", type=int, default=400, help="records of the first file to test on")
    add("--adapters", nargs="+", default=["lora", "activated"])
    add("--processes", type=int, default=2)
    add("--folder", type=Path, help="where the runs go; default: a temporary one")
    add("--pretraining", default="", help="more flags for train_language_model.py, in one string")
    add("--tuning", default="", help="more flags for train_confidence_lora.py, in one string")
    return parser


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def launch(processes: int, script: str, *flags: str) -> float:
    """Runs a training script through accelerate; returns the minutes it took."""
    strategy = "ddp" if processes > 1 else "single"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"configs/strategies/{strategy}.yaml", "--main_process_port", "0"]
    command += ["--num_processes", str(processes), script, *flags]
    environment = dict(os.environ)
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return (time.perf_counter() - start) / 60


def bag_of_words(train: list[dict], test: list[dict]) -> float:
    """Held-out AUROC of a logistic regression on the words and pairs of words of each record."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    def text(record: dict) -> str:
        return f"{record['question']} {record['response']}"

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000)
    model.fit(words.fit_transform(map(text, train)), [record["confident"] for record in train])
    scores = model.predict_proba(words.transform(map(text, test)))[:, 1]
    return roc_auc_score([record["confident"] for record in test], scores)


def main() -> None:
    options = build_parser().parse_args()
    import train_confidence_lora as confidence
    import train_language_model as language

    folder = options.folder or Path(tempfile.mkdtemp(prefix="from_scratch"))
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = [confidence.read_records(path) for path in options.data]
    chosen = set(random.Random(0).sample(range(len(first)), options.held_out))
    test = [record for i, record in enumerate(first) if i in chosen]
    train = [record for i, record in enumerate(first) if i not in chosen]

    # The texts are the chats the model would have: prompt and answer without the tag, so that the
    # base model knows nothing of what is right. No held-out answer is among them.
    plain = language.train_tokenizer(iter([]), 300)
    unseen = {record["question"] for record in test}
    texts = [
        {"text": confidence.build_prompt(plain, record) + record["response"]}
        for record in [*train, *(record for records in others for record in records)]
        if record["question"] not in unseen
    ]
    base = folder / "base"
    common = "--overwrite_output_dir --no_bf16 --gradient_accumulation_steps 1 --logging_steps 50 "
    common += "--save_strategy no"
    shape = "--vocab_size 4096 --hidden_size 192 --num_heads 6 --num_layers 4 --max_seq_length 512"
    reading = "--batch_size 2 --num_epochs 8 --learning_rate 2e-3"
    minutes = {
        "pretraining": launch(
            options.processes, "train_language_model.py", "--task", "cpt", "--tuning", "scratch",
            "--train_data", str(write_lines(folder / "texts.jsonl", texts)),
            "--output_dir", str(base), *f"{common} {shape} {reading} {options.pretraining}".split(),
        )
    }  # fmt: skip
    results = {}
    recorded = "--validation_answers recorded --val_samples 1000 --max_seq_length 1024 "
    recorded += "--batch_size 4 --num_epochs 3 --learning_rate 1e-3"
    for adapter in options.adapters:
        run = folder / adapter
        minutes[adapter] = launch(
            options.processes, "train_confidence_lora.py", "--model_name", str(base / "final"),
            "--train_data", str(write_lines(folder / "train.jsonl", train)),
            "--val_data", f"held_out={write_lines(folder / 'test.jsonl', test)}",
            "--adapter", adapter, "--output_dir", str(run),
            *f"{common} {recorded} {options.tuning}".split(),
        )  # fmt: skip
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        results[adapter] = summary["validation"]["held_out"]
    print(f"\n{'':24}{'AUROC':>8}{'tag acc':>9}{'cal err':>9}{'minutes':>9}")
    print(f"{'pretraining':24}{'':26}{minutes['pretraining']:9.1f}")
    for adapter, figures in results.items():
        print(
            f"{adapter:24}{figures['auroc']:8.3f}{figures['accuracy']:9.3f}"
            f"{figures['calibration_error']:9.3f}{minutes[adapter]:9.1f}"
        )
    print(f"{'bag of words':24}{bag_of_words(train, test):8.3f}")
    print(f"{len(train)} records, {len(test)} held out, {len(texts)} texts; runs: {folder}")


if __name__ == "__main__":
    main()
