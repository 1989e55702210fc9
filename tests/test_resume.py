"""What a run leaves when it ends early, and how it goes on from there."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LONG, ROOT, adapter, tagged_records, write_jsonl
from safetensors.torch import load_file, save_file
from test_run import launch, refusal

import train_confidence_lora as confidence
from train_confidence_lora import damage, main

STEPS = """--batch_size 8 --gradient_accumulation_steps 1 --logging_steps 1 --max_steps 8
--save_steps 2 --eval_steps 4 --save_total_limit 9 --lora_dropout 0.1 --val_samples 4
--learning_rate 1e-3""".split()


@pytest.fixture
def line(train_file, tiny_models, tmp_path):
    """A command line of eight steps, saved at every second one, and its output directory."""
    out = tmp_path / "run"
    return ["--model_name", tiny_models["untied"], "--train_data", train_file,
            "--output_dir", str(out), *STEPS], out  # fmt: skip


def cut_after(out, step):
    """The folder as a run leaves it that was killed after this step's checkpoint."""
    for path in [out / "final", *out.glob("checkpoint-*")]:
        if path.name == "final" or int(path.name[11:]) > step:
            shutil.rmtree(path)
    (out / "summary.json").unlink()


@pytest.fixture
def interrupted(line):
    """A finished run's adapter, its command line and its folder, cut back to step 4."""
    arguments, out = line
    summary = main(arguments)
    whole = adapter(out)
    cut_after(out, 4)
    return arguments, out, whole, summary


def test_P10_a_run_goes_on_by_itself_and_nothing_tells_it_from_one_that_was_never_cut(
    interrupted, capsys
):
    arguments, out, whole, before = interrupted
    history = [json.loads(text) for text in (out / "validation.jsonl").read_text().splitlines()]
    capsys.readouterr()
    after = main(arguments)
    assert f"resuming from {out / 'checkpoint-4'}" in capsys.readouterr().out
    assert adapter(out) == whole
    again = [json.loads(text) for text in (out / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again] == [line["step"] for line in history] == [0, 4, 8]
    for name in ("steps", "train_tokens", "train_loss"):
        assert after[name] == before[name]
    logged = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 9))


def test_losses_between_two_log_lines_are_not_lost_by_a_resume(line):
    arguments, out = line
    arguments = [*arguments, "--logging_steps", "3"]
    main(arguments)

    def losses():
        state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    whole = losses()
    cut_after(out, 4)
    main(arguments)
    assert losses() == whole


def test_a_run_cut_off_after_its_last_step_is_only_finished(line, capsys):
    arguments, out = line
    arguments = [*arguments, "--save_total_limit", "1"]
    main(arguments)
    whole = adapter(out)
    cut_after(out, 8)
    capsys.readouterr()
    assert main(arguments)["steps"] == 8
    said = capsys.readouterr().out
    assert f"resuming from {out / 'checkpoint-8'}" in said
    assert "step 8/8" not in said
    assert adapter(out) == whole


def test_two_processes_go_on_exactly_in_the_midst_of_a_later_epoch(line):
    arguments, out = line
    arguments = [*arguments, "--batch_size", "4", "--max_steps", "14", "--no_bf16"]
    launch(2, arguments)
    whole = adapter(out)
    cut_after(out, 10)
    said = launch(2, arguments)
    assert f"resuming from {out / 'checkpoint-10'}" in said
    assert adapter(out) == whole


# ------------------------------------------------------------------------------------------------
# Damage


def test_any_flipped_byte_of_a_checkpoint_is_found(line):
    arguments, out = line
    main([*arguments, "--max_steps", "2"])
    checkpoint, draw = out / "checkpoint-2", random.Random(3)
    assert damage(checkpoint) is None
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=checkpoint, check=True)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in [0, len(content) - 1, *draw.sample(range(len(content)), 2)]:
            flipped = bytearray(content)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            assert damage(checkpoint), (path, at)
        path.write_bytes(content)
    assert damage(checkpoint) is None
    (checkpoint / "scheduler.pt").unlink()
    assert damage(checkpoint) == "scheduler.pt is not what was saved"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(interrupted, capsys):
    arguments, out, whole, _ = interrupted
    path = out / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    main([*arguments, "--save_total_limit", "1"])
    said = capsys.readouterr().out
    assert f"{out / 'checkpoint-4'} is damaged and not used: optimizer.pt is not what" in said
    assert f"resuming from {out / 'checkpoint-2'}" in said
    assert adapter(out) == whole
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_unasked(interrupted, capsys):
    arguments, out, _, _ = interrupted
    for path in out.glob("checkpoint-*"):
        (path / "scheduler.pt").write_bytes(b"")
    assert f"every checkpoint in {out} is damaged" in refusal(arguments, capsys)
    assert len(list(out.glob("checkpoint-*"))) == 2
    main([*arguments, "--overwrite_output_dir"])


def test_what_a_killed_save_left_is_cleared_and_never_resumed_from(interrupted):
    arguments, out, whole, _ = interrupted
    shutil.copytree(out / "checkpoint-4", out / ".checkpoint-6.new")
    shutil.copytree(out / "checkpoint-2", out / ".checkpoint-2.old")
    main(arguments)
    assert adapter(out) == whole
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------
# The same run?


def test_a_resume_with_other_data_model_or_adapter_is_refused_with_the_differences(
    interrupted, tiny_models, tmp_path, capsys
):
    arguments, out, _, _ = interrupted
    data = Path(arguments[arguments.index("--train_data") + 1])
    records = data.read_text()
    data.write_text(records.replace("Yes", "No", 1))
    assert f"the content of {data} has changed" in refusal(arguments, capsys)
    data.write_text(records)
    model = shutil.copytree(tiny_models["untied"], tmp_path / "model")
    again = [*arguments, "--model_name", str(model), "--lora_r", "8", "--adapter", "activated"]
    error = refusal(again, capsys)
    assert f"--model_name was {tiny_models['untied']!r} and is {str(model)!r}" in error
    assert "--lora_r was 16 and is 8" in error
    assert "--adapter was 'lora' and is 'activated'" in error
    error = refusal([*arguments, "--batch_size", "4"], capsys)
    assert "an update had 8 records and has 4" in error
    assert len(list(out.glob("checkpoint-*"))) == 2


def test_a_model_that_has_changed_in_its_place_is_refused(line, tiny_models, tmp_path, capsys):
    arguments, out = line
    model = shutil.copytree(tiny_models["untied"], tmp_path / "model")
    arguments = [*arguments, "--model_name", str(model)]
    main(arguments)
    cut_after(out, 4)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert f"the content of {model} has changed" in refusal(arguments, capsys)


def test_what_changes_no_step_may_change_when_a_run_goes_on(interrupted):
    arguments, out, whole, _ = interrupted
    main([*arguments, "--logging_steps", "4", "--save_steps", "1", "--run_name", "again"])
    assert adapter(out) == whole
    state = json.loads((out / "checkpoint-7" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


def test_an_update_may_be_split_otherwise_and_the_run_says_what_that_means(interrupted, capsys):
    """The remedy for too little memory."""
    arguments, out, whole, _ = interrupted
    capsys.readouterr()
    main([*arguments, "--batch_size", "4", "--gradient_accumulation_steps", "2"])
    said = capsys.readouterr().out
    assert "batch_size was 8, is 4" in said
    assert "the last bits of its sums and its dropout will differ" in said
    assert adapter(out) != whole  # dropout draws other numbers


def test_no_resume_begins_anew_in_an_empty_folder_only(interrupted, tmp_path, capsys):
    arguments, out, whole, _ = interrupted
    assert "--no_resume begins anew in an empty folder only" in refusal(
        [*arguments, "--no_resume"], capsys
    )
    capsys.readouterr()
    main([*arguments, "--no_resume", "--overwrite_output_dir"])
    assert "resuming" not in capsys.readouterr().out
    assert adapter(out) == whole


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_run_goes_on_although_it_was_told_to_overwrite(
    variable, interrupted, monkeypatch, capsys
):
    arguments, out, whole, _ = interrupted
    monkeypatch.setenv(variable, "1")
    capsys.readouterr()
    main([*arguments, "--overwrite_output_dir"])
    assert f"resuming from {out / 'checkpoint-4'}" in capsys.readouterr().out
    assert adapter(out) == whole


def test_a_checkpoint_can_be_named_and_goes_on_in_another_folder(interrupted, tmp_path, capsys):
    arguments, out, whole, _ = interrupted
    elsewhere = tmp_path / "elsewhere"
    named = ["--output_dir", str(elsewhere), "--resume_from_checkpoint", str(out / "checkpoint-2")]
    assert main([*arguments, *named])["steps"] == 8
    assert adapter(elsewhere) == whole
    error = refusal([*arguments, *named, "--lora_r", "8"], capsys)
    assert f"--output_dir {elsewhere} is not empty" in error
    shutil.rmtree(elsewhere)
    assert "--lora_r was 16 and is 8" in refusal([*arguments, *named, "--lora_r", "8"], capsys)


def test_a_measured_batch_size_is_kept_by_the_run_that_goes_on(line, monkeypatch, capsys):
    arguments, out = line
    at = arguments.index("--batch_size")
    arguments = [*arguments[:at], *arguments[at + 4 :], "--batch_size", "auto"]
    arguments += ["--global_batch_size", "8"]
    main(arguments)
    whole = adapter(out)
    cut_after(out, 4)
    monkeypatch.setattr(confidence, "largest_batch", pytest.fail)
    main(arguments)
    assert adapter(out) == whole


# ------------------------------------------------------------------------------------------------
# What goes wrong in a run


def failure(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return exit_info.value.code, capsys.readouterr().err


@pytest.fixture
def room(tmp_path):
    """Lets files grow to so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_G8_a_failed_save_is_told_and_training_goes_on(line, room, capsys, monkeypatch):
    arguments, out = line
    save = confidence.LabelTrainer._save_checkpoint

    def with_little_room(trainer, model, trial=None):
        room(40_000 if trainer.state.global_step == 4 else -1)
        save(trainer, model, trial)
        room(-1)

    monkeypatch.setattr(confidence.LabelTrainer, "_save_checkpoint", with_little_room)
    main(arguments)
    said = capsys.readouterr().out
    assert f"warning: {out / 'checkpoint-4'} cannot be saved: " in said
    assert f"the last one is {out / 'checkpoint-2'}; training goes on" in said
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == [
        f"checkpoint-{step}" for step in (2, 6, 8)
    ]


def test_G8_three_failed_saves_in_a_row_end_the_run_with_what_it_has(
    line, room, capsys, monkeypatch
):
    arguments, out = line
    save = confidence.LabelTrainer._save_checkpoint

    def with_little_room(trainer, model, trial=None):
        room(40_000 if trainer.state.global_step > 2 else -1)
        save(trainer, model, trial)
        room(-1)

    monkeypatch.setattr(confidence.LabelTrainer, "_save_checkpoint", with_little_room)
    try:
        code, error = failure(arguments, capsys)
    finally:
        room(-1)
    assert code == 1
    assert f"{out / 'checkpoint-8'} cannot be saved" in error
    assert "that was 3 in a row" in error
    assert damage(out / "checkpoint-2") is None
    monkeypatch.undo()
    assert main(arguments)["status"] == "completed"


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_a_loss_that_is_no_number_names_its_record(
    accumulation, line, tiny_models, tmp_path, capsys, monkeypatch
):
    """The embedding of what one record alone contains is none."""
    arguments, out = line
    records = tagged_records(64)
    records[17]["question"] += " zyzzyva"
    data = write_jsonl(tmp_path / "train.jsonl", records)
    val = write_jsonl(tmp_path / "val.jsonl", tagged_records(4))
    tokenizer = confidence.load_tokenizer(tiny_models["untied"])
    kept = [confidence.parse_record(json.dumps(record)) for record in records]
    texts = [confidence.build_prompt(tokenizer, record) + record["response"] for record in kept]
    own = set(tokenizer(texts.pop(17))["input_ids"]).difference(*tokenizer(texts)["input_ids"])
    assert own

    def with_a_hole(*args, **kwargs):
        model, tokenizer = make(*args, **kwargs)
        [table] = [p for name, p in model.named_parameters() if "embed_tokens" in name and
                   len(p) >= len(tokenizer)]  # fmt: skip
        table.data[list(own)] = torch.nan
        return model, tokenizer

    make = confidence.initialize_model_with_tokens
    monkeypatch.setattr(confidence, "initialize_model_with_tokens", with_a_hole)
    code, error = failure(
        [*arguments, "--train_data", data, "--max_steps", "16", "--batch_size",
         str(8 // int(accumulation)), "--gradient_accumulation_steps", accumulation,
         "--val_data", f"demo={val}", "--validation_answers", "recorded"],
        capsys,
    )  # fmt: skip
    assert code == 1
    assert "not a finite number at step" in error
    assert f"  {data}:18\n" in error
    assert error.count("train.jsonl:") == 1
    for checkpoint in out.glob("checkpoint-*"):
        for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items():
            assert tensor.isfinite().all(), name


def test_too_little_memory_is_one_message_with_the_flag_to_change(line, capsys, monkeypatch):
    arguments, _ = line

    def too_large(model, batch, ids):
        if len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_loss(model, batch, ids)

    label_loss = confidence.label_loss
    monkeypatch.setattr(confidence, "label_loss", too_large)
    code, error = failure(arguments, capsys)
    assert code == 1
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert "out of memory at step 1 with 8 records of " in error
    assert "--batch_size 4 --gradient_accumulation_steps 2" in error
    main([*arguments, "--batch_size", "4", "--gradient_accumulation_steps", "2"])


# ------------------------------------------------------------------------------------------------
# Signals


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_confidence_lora.py"), *arguments], cwd=ROOT,
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_process_ends_by_the_signal_that_another_was_told(monkeypatch):
    told = confidence.Interruption()
    monkeypatch.setattr(confidence, "gather_object", lambda own: [*own, signal.SIGTERM])
    assert told.agreed() == told.signal == signal.SIGTERM
    told.receive(signal.SIGTERM, None)  # the launcher hands it on: no second one
    told.join(signal.SIGINT)
    assert told.signal == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=LONG)])
def test_a_signal_saves_the_step_in_progress_and_the_run_goes_on_exactly(number, line):
    arguments, out = line
    arguments = [*arguments, "--max_steps", "150", "--save_steps", "150", "--eval_steps", "100"]
    main([*arguments, "--output_dir", str(out.with_name("whole"))])
    run = start(arguments)
    for text in run.stdout:
        if text.startswith("step 20/"):
            run.send_signal(number)
            break
    said, error = run.communicate(timeout=60)
    assert run.returncode == 128 + number, error
    [saved] = out.glob("checkpoint-*")
    assert f"{number.name}: {saved} is saved; the same command goes on" in said
    assert "Traceback" not in error
    assert not (out / "summary.json").exists()
    main(arguments)
    assert adapter(out) == adapter(out.with_name("whole"))


TOLD_THRICE = """import os, signal, time
import train_confidence_lora as confidence
with confidence.interruption.listening():
    confidence.interruption.training = True
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("the launcher's copy is no second one", flush=True)
    time.sleep(confidence.Interruption.same + 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_signal_ends_the_run_at_once():
    command = [sys.executable, "-c", TOLD_THRICE]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "the launcher's copy is no second one\n"
    assert ended.returncode == 128 + signal.SIGTERM


def test_a_signal_before_training_ends_the_run_in_one_line(line):
    arguments, _ = line
    run = start(arguments)
    assert run.stdout.readline().startswith(("MED", "READ", "held"))
    run.send_signal(signal.SIGTERM)
    said, error = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "Traceback" not in error
    assert "SIGTERM: the same command goes on" in said


# ------------------------------------------------------------------------------------------------
# Safety


def test_weights_come_from_safetensors_alone(line, tiny_models, tmp_path, capsys):
    """A pickle runs what it holds when it is opened."""
    arguments, _ = line
    model = shutil.copytree(tiny_models["untied"], tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "safetensors" in refusal([*arguments, "--model_name", str(model)], capsys)


def test_settings_of_a_damaged_folder_are_refused_in_a_sentence(interrupted, capsys):
    arguments, out, _, _ = interrupted
    saved = yaml.safe_load((out / "settings.yaml").read_text())
    for text in ("a: [", "- a\n", yaml.safe_dump(saved | {"resolved": 3}), "\x00"):
        (out / "settings.yaml").write_text(text)
        assert str(out / "settings.yaml") in refusal(arguments, capsys)


def test_a_token_is_in_nothing_that_a_run_says_or_leaves(line, capsys):
    arguments, out = line
    main([*arguments, "--max_steps", "2", "--hub_token", "hf_secret"])
    said = capsys.readouterr()
    assert "hf_secret" not in said.out + said.err
    left = [path for path in out.rglob("*") if path.is_file()]
    assert len(left) > 20
    assert not [path for path in left if b"hf_secret" in path.read_bytes()]


def test_a_pickle_in_a_checkpoint_runs_nothing(interrupted, tmp_path, capsys):
    """Even one that its checksums vouch for."""
    arguments, out, _, _ = interrupted
    proof = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (proof,)

    path = out / "checkpoint-4" / "processes.pt"
    torch.save(Harmful(), path)
    confidence.seal(path.parent)
    with pytest.raises(Exception, match="Weights only"):
        main(arguments)
    assert not proof.exists()


def test_the_best_model_and_the_last_step_are_both_kept(line):
    """With room for one checkpoint: what is best at the end must not cost the last step."""
    arguments, out = line
    main([*arguments, "--save_total_limit", "1", "--load_best_model_at_end", "--eval_steps", "2",
          "--metric_for_best_model", "nll", "--learning_rate", "0.5"])  # fmt: skip
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    kept = {Path(state["best_model_checkpoint"]).name, "checkpoint-8"}
    assert {path.name for path in out.glob("checkpoint-*")} == kept
