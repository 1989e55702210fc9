"""What happens before the first update: tokenising, padding, and how long until training begins.

make benchmark

With a file of --json lines of the other two benchmarks, it ends with the minutes that a run of two
epochs takes: loading, tokenising, training, five validations of 200 generated answers, saving.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
RECORDS = 18_600  # the guide's


def seconds_until(command: list[str], text: str) -> float:
    """Seconds from the start of a command until it prints a line with `text`, or ends."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        found = any(text in line for line in process.stdout)
        seconds = time.perf_counter() - start
        process.kill()
    if not found:
        sys.exit(f"{' '.join(command)} never printed {text!r}")
    return seconds


def padding_share(lengths: list[int], batch_size: int, order: list[int]) -> float:
    padded = sum(
        max(lengths[i] for i in order[k : k + batch_size]) * len(order[k : k + batch_size])
        for k in range(0, len(order), batch_size)
    )
    return 1 - sum(lengths) / padded


def main() -> None:
    script = [sys.executable, "train_confidence_lora.py"]
    help_seconds = seconds_until([*script, "--help"], "usage")
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = name  # read when datasets is imported, below
        demo = ["--model_name", "demo/model", "--train_data", "tagged/demo/demo_all_tagged.jsonl"]
        demo += ["--output_dir", f"{name}/run", "--batch_size", "8", "--logging_steps", "1"]
        demo += ["--max_steps", "3", "--eval_on_start", "False"]
        first_step = seconds_until([*script, *demo], "step 1/")

        import workload

        import train_confidence_lora as confidence

        path = workload.write_records(Path(name) / "records.jsonl", RECORDS)
        tokenizer = workload.make_tokenizer(3300)
        confidence.add_confidence_tokens(tokenizer)
        settings = confidence.Settings(train_data=path)
        marks = [time.perf_counter()]
        records = confidence.read_records(path)
        marks.append(time.perf_counter())
        for _ in range(2):
            encodings = confidence.encode_dataset(tokenizer, records, settings)
            marks.append(time.perf_counter())
        lengths = list(encodings["length"])

    read, encode, again = (after - before for before, after in pairwise(marks))
    characters = sum(len(r["question"]) + len(r["response"]) for r in records) / RECORDS
    print(f"--help                                        {help_seconds:6.2f} s")
    print(f"first update of the demo, encoded anew        {first_step:6.2f} s")
    print(f"reading {RECORDS} records of {characters:,.0f} characters {read:11.2f} s")
    print(f"tokenising them                               {encode:6.2f} s")
    print(f"taking them from the cache in the next run    {again:6.2f} s")
    for batch_size in (16, 4):
        sampler = confidence.LengthGroupedSampler(lengths, 128, seed=42)
        share = padding_share(lengths, batch_size, list(sampler))
        print(f"padding, {batch_size:2} records at a time of updates of 128 {share:9.1%}")
    share = padding_share(lengths, 16, list(range(RECORDS)))
    print(f"padding, 16 at a time in random order         {share:6.1%}")

    if len(sys.argv) > 1:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        project([json.loads(line) for line in lines], read + encode, 2 * sum(lengths))


def project(results: list[dict], preparing: float, tokens: int) -> None:
    """Prints the minutes of a run on so many tokens, from the last result of each kind."""
    training = next(result for result in reversed(results) if "train" in result)
    for adapter in ("lora", "activated"):
        validation = next(r for r in reversed(results) if r.get("adapter") == adapter)
        turns = training["train"][adapter]

        def median(name: str, turns: list[dict] = turns) -> float:
            return statistics.median(turn[name] for turn in turns)

        parts = {
            "loading": median("loading_seconds"),
            "tokenising": preparing,
            "training": tokens / median("tokens_per_second"),
            "validating": 5 * 200 * validation["seconds_an_answer"]["generate"],
            "saving": 5 * median("saving_seconds"),
        }
        told = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
        print(
            f"projected for {training['model']} on {training['device']}, {adapter}: "
            f"{sum(parts.values()) / 60:.1f} minutes ({told})"
        )


if __name__ == "__main__":
    main()
