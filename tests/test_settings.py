import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_jsonl

import train_confidence_lora as confidence
from train_confidence_lora import InputError, check_settings, main, parse_command_line

GUIDE = """--model_name Qwen/Qwen2.5-7B-Instruct --train_data tagged/qwen/qwen_all_tagged.jsonl
--output_dir ./checkpoints/qwen_fast --num_epochs 2 --batch_size 16
--gradient_accumulation_steps 2 --learning_rate 3e-4 --eval_steps 500 --bf16"""


def test_the_guides_command_line_parses_as_typed():
    settings, training = parse_command_line(shlex.split(GUIDE))
    assert settings.model_name == "Qwen/Qwen2.5-7B-Instruct"
    assert settings.train_data == "tagged/qwen/qwen_all_tagged.jsonl"
    expected = {
        "output_dir": "./checkpoints/qwen_fast",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "eval_steps": 500,
        "bf16": True,
    }
    assert {key: training[key] for key in expected} == expected


def test_flags_of_the_guide_and_of_training_arguments_both_work_and_later_ones_win():
    line = "--max_steps 10 --max_seq_length 1024 --dataloader_num_workers 4 --warmup_ratio 0.1"
    line += " --adam_beta2 0.98 --batch_size 4 --per_device_train_batch_size 8 --bf16 --no_bf16"
    settings, training = parse_command_line(line.split())
    assert settings.max_seq_length == 1024
    assert (training["max_steps"], training["dataloader_num_workers"]) == (10, 4)
    assert (training["warmup_steps"], training["adam_beta2"]) == (0.1, 0.98)
    assert training["per_device_train_batch_size"] == 8
    assert training["bf16"] is False


def test_editing_a_constant_changes_the_default(tmp_path):
    source = (ROOT / "train_confidence_lora.py").read_text(encoding="utf-8")
    edited = source.replace("VAL_SAMPLES = 200 ", "VAL_SAMPLES = 123 ")
    assert edited != source
    (tmp_path / "train_confidence_lora.py").write_text(edited, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "train_confidence_lora.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "(default: 123)" in " ".join(shown.split())


def test_help_answers_within_two_seconds():
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_confidence_lora.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 2
    flags = """--model_name --train_data --output_dir --num_epochs --batch_size
        --gradient_accumulation_steps --learning_rate --warmup_ratio --eval_steps --save_steps
        --max_steps --bf16 --no_bf16 --max_seq_length --dataloader_num_workers --lora_r
        --lora_alpha --lora_dropout --adapter --calib_beta --calib_p_norm --val_data --val_samples
        --validation_answers --load_in_8bit --load_in_4bit --hf_repo --seed"""
    assert [flag for flag in flags.split() if flag not in shown] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lerning_rate 1", "unknown argument --lerning_rate, did you mean --learning_rate?"),
        ("--num_epochs two", "argument --num_epochs/--num_train_epochs: invalid float value"),
        ("--adapter dora", "invalid choice: 'dora'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(line.split())
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bf16 --fp16", "--bf16 and --fp16 exclude each other"),
        ("--load_in_8bit --load_in_4bit", "--load_in_8bit and --load_in_4bit exclude"),
        ("--learning_rate 0", "--learning_rate is 0.0: give a number above 0"),
        ("--max_seq_length 8", "give at least 64 tokens"),
        ("--adapter activated --gradient_checkpointing", "leave it out"),
        ("--val_data boolq", "write NAME=PATH"),
        ("--val_data a=nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("--train_data nowhere.jsonl", "make it with: python tag_answers.py"),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_loaded(line, message, train_file):
    settings, training = parse_command_line(["--train_data", train_file, *line.split()])
    with pytest.raises(InputError) as error:
        check_settings(settings, training)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_transformers_refusals_are_one_sentence(train_file, tmp_path, capsys):
    line = ["--train_data", train_file, "--output_dir", str(tmp_path / "out"), "--logging_steps"]
    with pytest.raises(SystemExit) as exit_info:
        main([*line, "0"])
    assert exit_info.value.code == 2
    assert "transformers refuses these settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [("auroc", True), ("boolq_accuracy", True), ("calibration_error", False), ("boolq_nll", False)],
)
def test_the_best_model_is_chosen_in_the_metrics_own_direction(metric, greater_is_better, tmp_path):
    _, training = parse_command_line(
        ["--metric_for_best_model", metric, "--output_dir", str(tmp_path)]
    )
    confidence.resolve_precision(training)
    args = confidence.make_training_arguments(training, None)
    assert args.greater_is_better is greater_is_better


def test_classes_must_differ(tmp_path, capsys):
    record = {"question": "is it", "dataset": "boolq", "tagged_response": "Yes <C_READ>"}
    path = write_jsonl(tmp_path / "one.jsonl", [record] * 3)
    with pytest.raises(SystemExit) as exit_info:
        main(["--train_data", path, "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert "all 3 records" in capsys.readouterr().err
