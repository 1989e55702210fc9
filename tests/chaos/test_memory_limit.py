"""A process that may not have the memory it asks for."""

import sys

import pytest
from conftest import ROOT, tagged_records, write_jsonl
from harness import Started, command_line

pytestmark = pytest.mark.chaos


def test_too_little_memory_is_told_with_the_batch_and_what_makes_it_smaller(tiny_models, tmp_path):
    records = tagged_records(256)
    for record in records:
        record["question"] += " and figs and rice" * 250
    data = write_jsonl(tmp_path / "long.jsonl", records)
    line = command_line(
        tiny_models["untied"], tmp_path, tmp_path / "run", "--train_data", data,
        "--batch_size", "128", "--global_batch_size", "128",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "train_confidence_lora.py"), *line]
    run = Started(["bash", "-c", 'ulimit -v 9000000 && exec "$@"', "-", *command])
    assert run.finish() == 1, run.said
    assert "Traceback" not in run.said
    assert "out of memory at step 1 with 128 records of " in run.said
    assert "--batch_size 64 --gradient_accumulation_steps 2" in run.said
