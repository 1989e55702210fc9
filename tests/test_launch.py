"""train_fast_4gpu.sh, train_config_4gpu.yaml and the Makefile."""

import os
import re
import subprocess

import pytest
import yaml
from conftest import ROOT, make_would_run

from train_confidence_lora import parse_command_line, split_update


def wrapper(*arguments, gpus=0, path=None, dry_run=True):
    environment = {**os.environ, "GPUS": str(gpus), **({"DRY_RUN": "1"} if dry_run else {})}
    if path:
        environment["PATH"] = path
    return subprocess.run(
        ["bash", str(ROOT / "train_fast_4gpu.sh"), *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def parsed(*arguments, **options):
    """Processes, settings and training arguments of the command that would run."""
    result = wrapper(*arguments, **options)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()[-1].split()
    processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
    settings, training = parse_command_line(words[words.index("train_confidence_lora.py") + 1 :])
    return processes, settings, training


def test_the_wrapper_shows_no_secret_and_runs_nothing_of_a_number():
    for words in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        shown = wrapper("qwen", *words, "--run_name", "$(id); x", gpus=1).stdout
        assert "--hub_token" in shown
        assert "***" in shown
        assert "secret" not in shown
        assert r"\$\(id\)\;\ x" in shown
    result = wrapper("qwen", gpus="a[$(touch /dev/stdout)]")
    assert (result.returncode, result.stderr.count("give a number")) == (2, 1)


@pytest.mark.parametrize(
    ("gpus", "processes", "total"),
    [(1, 1, 128), (2, 2, 128), (3, 3, 126), (4, 4, 128), (8, 4, 128)],
)
def test_an_update_stays_at_128_records_of_which_memory_decides_how_many_at_a_time(
    gpus, processes, total
):
    count, settings, training = parsed("qwen", gpus=gpus)
    assert count == processes
    assert training["per_device_train_batch_size"] == "auto"
    share, _ = split_update("auto", "auto", count, settings.global_batch_size)
    assert share * count == total


def test_a_batch_size_of_the_users_own_wins_over_auto():
    _, settings, training = parsed("qwen", "--batch_size", "12", gpus=4)
    batch, accumulation = (
        training[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert split_update(batch, accumulation, 4, settings.global_batch_size) == (12, 2)


@pytest.mark.parametrize(
    ("preset", "processes", "batch", "accumulation", "rate"),
    [
        ("1gpu", 1, 8, 1, 2e-4),
        ("2gpu", 2, 12, 2, 2.5e-4),
        ("4gpu", 4, 16, 2, 3e-4),
        ("8gpu", 8, 16, 2, 4e-4),
    ],
)
def test_the_guides_scaling_presets(preset, processes, batch, accumulation, rate):
    count, _, training = parsed("qwen", "--preset", preset, gpus=8)
    assert count == processes
    assert training["per_device_train_batch_size"] == batch
    assert training["gradient_accumulation_steps"] == accumulation
    assert training["learning_rate"] == rate


def test_a_preset_with_too_few_gpus_is_refused():
    result = wrapper("qwen", "--preset", "8gpu", gpus=2)
    assert result.returncode == 2
    assert "needs 8 GPUs, 2 are here" in result.stderr


def test_models_and_flags_are_passed_and_later_flags_win():
    _, settings, training = parsed(
        "mistral", "--num_epochs", "1", "--learning_rate", "1e-5", gpus=4
    )
    assert settings.model_name == "mistralai/Mistral-7B-Instruct-v0.2"
    assert settings.train_data == "tagged/mistral/mistral_all_tagged.jsonl"
    assert (training["num_train_epochs"], training["learning_rate"]) == (1, 1e-5)


def test_a_7b_model_without_a_gpu_is_refused_in_one_sentence():
    result = wrapper("qwen", gpus=0)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "needs at least one GPU" in result.stderr


def test_the_demo_runs_on_the_cpu_in_two_processes():
    processes, settings, _ = parsed("demo", "--adapter", "activated", gpus=0)
    assert processes == 2
    assert settings.adapter == "activated"
    assert [item.partition("=")[0] for item in settings.val_data] == ["reading", "medicine"]


@pytest.mark.parametrize(
    "arguments", [[], ["llama"], ["qwen", "--preset"], ["qwen", "--preset", "3gpu"]]
)
def test_wrong_words_show_the_usage(arguments):
    result = wrapper(*arguments, gpus=8)
    assert result.returncode == 2
    assert "usage: bash train_fast_4gpu.sh" in result.stderr


def test_missing_packages_name_the_make_target(tmp_path):
    """A copy of the wrapper without .venv, where `python` has nothing installed."""
    script = (ROOT / "train_fast_4gpu.sh").read_text()
    (tmp_path / "train_fast_4gpu.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    result = subprocess.run(
        ["bash", str(tmp_path / "train_fast_4gpu.sh"), "demo"], capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 2
    assert "'make setup' installs them" in result.stderr


def test_the_accelerate_configuration_is_the_guides():
    config = yaml.safe_load((ROOT / "train_config_4gpu.yaml").read_text())
    expected = {"num_processes": 4, "distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}
    assert {key: config[key] for key in expected} == expected


def test_make_help_lists_the_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [name for name in ("setup", "demo", "test", "lint") if name not in shown] == []


def test_presets_whose_batch_is_fixed_recompute_the_activations_of_a_lora():
    preset = ("--preset", "1gpu")
    assert parsed("qwen", *preset, gpus=1)[2]["gradient_checkpointing"]
    assert "gradient_checkpointing" not in parsed("qwen", gpus=1)[2]  # measured instead
    activated = parsed("qwen", *preset, "--adapter", "activated", gpus=1)[2]
    assert "gradient_checkpointing" not in activated
    off = parsed("qwen", *preset, "--gradient_checkpointing", "False", gpus=1)[2]
    assert not off["gradient_checkpointing"]


def test_P12_make_test_eval_measures_coverage_of_files_that_are_there():
    said = make_would_run("test-eval")
    files = re.findall(r"tests/\w+\.py", said)
    assert "--cov=train_confidence_lora" in said
    assert len(files) > 5
    assert all((ROOT / file).is_file() for file in files)
