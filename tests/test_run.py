import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import LONG, ROOT, tagged_records, write_jsonl

import train_confidence_lora as confidence
from train_confidence_lora import main

QUICK = """--batch_size 8 --gradient_accumulation_steps 1 --max_steps 3 --lora_dropout 0
--eval_steps 3 --save_steps 3 --logging_steps 1 --lr_scheduler_type constant""".split()


@pytest.fixture
def line(train_file, tiny_models, tmp_path):
    """A command line that runs in a second or two, and its output directory."""
    out = tmp_path / "run"
    return ["--model_name", tiny_models["untied"], "--train_data", train_file,
            "--output_dir", str(out), *QUICK], out  # fmt: skip


def refusal(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train_confidence_lora.py: error: ")
    return error


@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_a_run_leaves_what_the_contract_says(adapter, line):
    arguments, out = line
    main([*arguments, "--adapter", adapter])
    summary = json.loads((out / "summary.json").read_text())
    expected = {
        "status": "completed",
        "run_name": "run",
        "num_processes": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "global_batch_size": 8,
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["train_tokens"] > 0
    assert set(summary["validation"]) == set(summary["validation_before_training"])
    for name in ("train_loss", "train_runtime", "train_tokens_per_second"):
        assert summary[name] > 0
    assert {"final", "best_accuracy", "best_calibration", "checkpoint-3", "logs"} <= {
        path.name for path in out.iterdir() if path.is_dir()
    }
    card = (out / "final" / "README.md").read_text()
    assert f"Kind: `{adapter}`" in card
    assert "demo_reading" in card


def test_settings_are_kept_without_secrets_and_parse_again(line):
    arguments, out = line
    main([*arguments, "--hub_token", "hf_secret", "--lora_r", "4"])
    text = (out / "settings.yaml").read_text()
    assert "hf_secret" not in text
    assert not any("hf_secret" in p.read_text() for p in out.rglob("*.json"))
    saved = yaml.safe_load(text)
    assert saved["lora_r"] == 4
    assert saved.pop("versions")["peft"]
    assert saved.pop("num_processes") == 1
    assert saved.pop("task") == "confidence"
    assert saved.pop("resolved")["per_device_train_batch_size"] == 8
    again = []
    for key, value in saved.items():
        if value not in (None, []):
            again += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    settings, training = confidence.parse_command_line(again)
    assert settings.lora_r == 4
    assert training["learning_rate"] == saved["learning_rate"]


def test_a_finished_run_is_not_overwritten_unless_told(line, capsys):
    arguments, out = line
    main(arguments)
    before = (out / "final" / "adapter_model.safetensors").read_bytes()
    error = refusal([*arguments, "--seed", "7"], capsys)
    assert "holds a finished run" in error
    assert "--overwrite_output_dir" in error
    assert (out / "final" / "adapter_model.safetensors").read_bytes() == before
    (out / "my_notes.txt").write_text("keep")
    main([*arguments, "--seed", "7", "--overwrite_output_dir"])
    assert (out / "final" / "adapter_model.safetensors").read_bytes() != before
    assert (out / "my_notes.txt").read_text() == "keep"


def test_an_unfinished_run_with_other_settings_is_refused_with_the_differences(line, capsys):
    arguments, out = line
    main([*arguments, "--adam_beta2", "0.9"])
    (out / "summary.json").unlink()
    error = refusal([*arguments, "--lora_r", "4", "--learning_rate", "0.5"], capsys)
    assert "--adam_beta2 was 0.9 and is None" in error
    assert "--lora_r was 16 and is 4" in error
    assert "--learning_rate was 0.0003 and is 0.5" in error
    assert (out / "checkpoint-3").is_dir()


def test_a_folder_of_other_files_is_refused(line, capsys):
    arguments, out = line
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no run of this script" in refusal(arguments, capsys)


def test_an_unwritable_output_directory_is_refused(line, tmp_path, capsys):
    arguments, _ = line
    (tmp_path / "file").write_text("")
    error = refusal([*arguments, "--output_dir", str(tmp_path / "file" / "run")], capsys)
    assert "cannot be written: Not a directory" in error


def test_a_missing_model_is_refused(line, capsys):
    arguments, _ = line
    error = refusal([*arguments, "--model_name", "nowhere/nothing"], capsys)
    assert "--model_name nowhere/nothing: cannot load its tokenizer" in error


def test_a_bad_line_stops_the_run_before_the_model_is_loaded(line, tmp_path, capsys, monkeypatch):
    arguments, _ = line
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    monkeypatch.setattr(confidence, "initialize_model_with_tokens", pytest.fail)
    assert f"{path}:65: not JSON" in refusal(arguments, capsys)
    monkeypatch.undo()
    main([*arguments, "--skip_bad_records"])
    assert "left out 1 bad lines" in capsys.readouterr().out


def test_too_long_questions_are_reported_and_the_rest_trains(line, tmp_path, capsys):
    arguments, _ = line
    records = tagged_records(64)
    records[3]["question"] = "does the box hold " + "figs and " * 200
    path = write_jsonl(tmp_path / "train.jsonl", records)
    main([*arguments, "--train_data", path, "--max_seq_length", "128"])
    said = capsys.readouterr().out
    assert "skipped 1 of " in said
    assert "line 4: too long by" in said


def test_quantised_weights_train_end_to_end(line):
    arguments, _ = line
    summary = main([*arguments, "--load_in_4bit"])
    assert summary["status"] == "completed"


@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_bf16_runs_on_a_cpu(adapter, line):
    arguments, _ = line
    summary = main([*arguments, "--bf16", "--adapter", adapter])
    assert summary["status"] == "completed"


def test_gradient_checkpointing_changes_no_step(line):
    arguments, _ = line
    expected = main(arguments)["train_loss"]
    loss = main([*arguments, "--gradient_checkpointing", "--overwrite_output_dir"])["train_loss"]
    assert loss == pytest.approx(expected, abs=1e-6)


def test_a_folder_that_is_no_checkpoint_is_refused(line, tmp_path, capsys):
    arguments, _ = line
    error = refusal([*arguments, "--resume_from_checkpoint", str(tmp_path)], capsys)
    assert "is no checkpoint of a run's folder" in error


def test_the_best_model_comes_back_at_the_end_and_is_the_one_reported(line):
    """With a learning rate that ruins the model after its first steps."""
    arguments, out = line
    arguments = [*arguments, "--max_steps", "6", "--eval_steps", "2", "--save_steps", "2"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "nll"]
    summary = main([*arguments, *best, "--learning_rate", "0.5", "--lora_r", "2"])
    state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    nll = sum(f["nll"] for f in summary["validation"].values()) / len(summary["validation"])
    assert nll == pytest.approx(state["best_metric"], abs=1e-4)


def test_data_too_small_to_hold_anything_out_is_refused(line, tmp_path, capsys):
    arguments, _ = line
    records = tagged_records(64)
    one_each = [next(r for r in records if tag in r["tagged_response"]) for tag in ("C_R", "U_M")]
    path = write_jsonl(tmp_path / "two.jsonl", one_each)
    assert "too few records" in refusal([*arguments, "--train_data", path], capsys)


def test_the_final_adapter_is_pushed_where_asked(line, monkeypatch):
    arguments, out = line
    calls = []
    monkeypatch.setattr(confidence, "create_repo", lambda repo, **k: calls.append(repo))
    monkeypatch.setattr(confidence, "upload_folder", lambda **k: calls.append(k))
    main([*arguments, "--hf_repo", "me/adapter"])
    assert calls == ["me/adapter", {"repo_id": "me/adapter", "folder_path": out / "final"}]


def launch(processes, arguments, script="train_confidence_lora.py", timeout=240):
    """Runs a script as users do, through accelerate and train_config_4gpu.yaml, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "train_config_4gpu.yaml"), "--num_processes", str(processes),
               "--main_process_port", "0", str(ROOT / script), *arguments]  # fmt: skip
    if processes == 1:
        command = [sys.executable, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def without_runtime(validation):
    return {
        name: {metric: value for metric, value in figures.items() if metric != "runtime"}
        for name, figures in validation.items()
    }


@pytest.mark.parametrize("adapter", ["lora", pytest.param("activated", marks=LONG)])
def test_one_two_and_four_processes_give_the_same_results(adapter, tiny_models, tmp_path, capsys):
    """The same global batch, so the same steps; each sample scored once; one process writes."""
    data = write_jsonl(tmp_path / "train.jsonl", tagged_records(80))
    val = write_jsonl(tmp_path / "val.jsonl", tagged_records(40, seed=9))
    summaries, weights = {}, {}
    for processes in (1, 2, 4):
        out = tmp_path / f"run{processes}"
        arguments = [
            "--model_name", tiny_models["untied"], "--train_data", data, "--output_dir", str(out),
            "--adapter", adapter, "--batch_size", str(8 // processes),
            "--gradient_accumulation_steps", "2", "--max_steps", "4", "--lora_dropout", "0",
            "--learning_rate", "1e-3", "--val_data", f"demo={val}", "--no_bf16",
            "--validation_answers", "recorded", "--per_device_eval_batch_size", "4",
        ]  # fmt: skip
        if processes == 1:
            main(arguments)
            said = capsys.readouterr().out
        else:
            said = launch(processes, arguments)
        assert ("Distributed training with" in said) == (processes > 1)
        assert (f"Distributed training with {processes} processes" in said) == (processes > 1)
        assert said.count("validation at step 0") == 1
        summaries[processes] = json.loads((out / "summary.json").read_text())
        weights[processes] = out / "final" / "adapter_model.safetensors"
        assert summaries[processes]["num_processes"] == processes
        assert summaries[processes]["global_batch_size"] == 16
    from safetensors.torch import load_file

    one = summaries[1]
    for processes in (2, 4):
        other = summaries[processes]
        # a fixed adapter (the untrained one) is scored identically, to the last digit
        assert without_runtime(other["validation_before_training"]) == without_runtime(
            one["validation_before_training"]
        )
        assert other["train_tokens"] == one["train_tokens"]
        assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        expected, actual = load_file(weights[1]), load_file(weights[processes])
        for name, tensor in expected.items():
            assert (actual[name] - tensor).abs().max() < 2e-3, name


def test_bad_input_under_two_processes_ends_both_with_one_message(tiny_models, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{}])
    with pytest.raises(AssertionError) as failure:
        launch(2, ["--train_data", data, "--model_name", tiny_models["untied"],
                   "--output_dir", str(tmp_path / "run")])  # fmt: skip
    assert str(failure.value).count("train_confidence_lora.py: error:") == 1


def test_the_module_imports_no_other_file_of_ours():
    source = (ROOT / "train_confidence_lora.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    ours = {path.stem for path in ROOT.glob("*.py")} | {"demo", "tests", "make_demo"}
    assert not imported & ours


def test_one_copied_file_is_enough_to_train(tiny_models, train_file, tmp_path):
    shutil.copy(ROOT / "train_confidence_lora.py", tmp_path / "alone.py")
    command = [sys.executable, "alone.py", "--model_name", tiny_models["untied"],
               "--train_data", train_file, "--output_dir", "run", *QUICK]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, timeout=120)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_readmes_example_runs(tiny_models, tmp_path, capsys):
    """The code block as it stands, on an adapter made here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    data = write_jsonl(tmp_path / "train.jsonl", tagged_records(64))
    main(["--model_name", tiny_models["mistral"], "--train_data", data, "--adapter", "activated",
          "--output_dir", str(tmp_path / "run"), *QUICK])  # fmt: skip
    name = '"checkpoints/demo_activated/final"'
    assert code.count(name) == 1
    code = code.replace(name, repr(str(tmp_path / "run" / "final")))
    exec(code, {})
    assert re.search(r"\(right with probability 0\.\d\d\)", capsys.readouterr().out)
