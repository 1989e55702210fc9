import json

import pytest
from conftest import tagged_records, write_jsonl

import train_confidence_lora as confidence
from train_confidence_lora import (
    InputError,
    Settings,
    ValidationCallback,
    choose_validation,
    initialize_model_with_tokens,
    main,
    read_records,
)

QUICK = "--batch_size 8 --gradient_accumulation_steps 1 --max_steps 4 --max_new_tokens 8".split()


@pytest.fixture
def tagged(tmp_path):
    return write_jsonl(tmp_path / "tagged.jsonl", tagged_records(64))


@pytest.fixture
def records(tagged):
    return read_records(tagged)


def callback_for(records, folder, tokenizer, generate, **settings):
    settings = Settings(max_new_tokens=8, **settings)
    return ValidationCallback({"demo": records}, tokenizer, settings, folder, generate, 8)


def test_the_sample_is_drawn_once_by_seed(records, tokenizer, tmp_path):
    first = callback_for(records, tmp_path, tokenizer, False, val_samples=10)
    again = callback_for(records, tmp_path, tokenizer, False, val_samples=10)
    lines = [record["line"] for record in first.samples["demo"]]
    assert len(set(lines)) == 10
    assert lines == [record["line"] for record in again.samples["demo"]]
    assert len(callback_for(records, tmp_path, tokenizer, False).samples["demo"]) == 64


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "activated"])
def test_every_sample_is_scored_once(adapter, generate, records, tiny_models, tmp_path):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"], adapter)
    callback = callback_for(records, tmp_path, tokenizer, generate, val_samples=50)
    figures, scores = callback._validate_dataset(model.eval(), "demo")
    assert [score.index for score in scores] == list(range(50))
    assert figures["num_samples"] == 50
    if not generate:
        right = [record["confident"] for record in callback.samples["demo"]]
        assert [score.correct for score in scores] == right
        assert figures["unparsed_rate"] == 0.0
    assert figures["missing_tag_rate"] == (0.0 if adapter == "activated" else 1.0)  # untrained


def test_generated_answers_are_judged_against_the_truth(records, tiny_models, tmp_path):
    """Forces one token: "Yes" is right exactly where the truth is yes."""
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"], "activated")
    yes, end = tokenizer.convert_tokens_to_ids("Yes"), tokenizer.eos_token_id
    head = model.get_base_model().get_output_embeddings()

    def answer_yes(module, args, output):
        previous_was_yes = answer_yes.step % 2
        output[..., end if previous_was_yes else yes] += 1e4
        answer_yes.step += 1
        return output

    answer_yes.step = 0
    handle = head.register_forward_hook(answer_yes)
    reading = [record for record in records if record["dataset"] == "demo_reading"][:8]
    callback = callback_for(reading, tmp_path, tokenizer, True)
    _, scores = callback._validate_dataset(model.eval(), "demo")
    handle.remove()
    assert [score.response for score in scores] == ["Yes"] * 8
    assert [score.correct for score in scores] == [bool(record["answer"]) for record in reading]


def test_it_fires_before_during_and_after_and_leaves_its_files(tagged, tiny_models, tmp_path):
    out = tmp_path / "run"
    line = ["--model_name", tiny_models["untied"], "--train_data", tagged, *QUICK]
    line += ["--output_dir", str(out), "--val_data", f"demo={tagged}", "--val_samples", "12"]
    summary = main([*line, "--eval_steps", "3", "--metric_for_best_model", "demo/demo_reading_nll"])
    lines = [json.loads(text) for text in (out / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 4]
    assert set(lines[0]["datasets"]) == {"demo/demo_reading", "demo/demo_medicine"}
    figures = lines[-1]["datasets"]["demo/demo_reading"]
    assert set(figures) == set(
        """num_samples accuracy majority_accuracy answer_accuracy calibration_error
        calibration_error_if_perfect ece brier nll auroc mean_confidence missing_tag_rate
        wrong_domain_rate unparsed_rate runtime""".split()
    )
    assert summary["validation"] == lines[-1]["datasets"]
    assert summary["validation_before_training"] == lines[0]["datasets"]
    for name in ("best_accuracy", "best_calibration", "final"):
        assert (out / name / "adapter_model.safetensors").is_file()
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    nlls = [line["datasets"]["demo/demo_reading"]["nll"] for line in lines]
    assert state["best_metric"] == pytest.approx(
        min(nlls[1:])
    )  # the untrained model is no candidate

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs")).Reload()
    steps = [event.step for event in events.Scalars("eval/demo/demo_reading_auroc")]
    assert steps == [0, 3, 4]  # NaN where a random model is never right, but always there
    assert "eval/calibration_error" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["validation/reliability"]


def test_an_interval_longer_than_the_run_is_shortened_with_a_warning(
    tagged, tiny_models, tmp_path, capsys
):
    line = ["--model_name", tiny_models["untied"], "--train_data", tagged, *QUICK]
    main([*line, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "--eval_steps 500 is longer than the run of 4 steps; shortened to 1" in said
    assert said.count("validation at step") == 5


def test_without_strategy_the_final_adapter_is_validated_all_the_same(
    tagged, tiny_models, tmp_path
):
    line = ["--model_name", tiny_models["untied"], "--train_data", tagged, *QUICK]
    line += ["--output_dir", str(tmp_path / "run"), "--eval_strategy", "no"]
    main([*line, "--eval_on_start", "False"])
    text = (tmp_path / "run" / "validation.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [4]


def test_held_out_records_are_not_trained_on(records):
    settings = Settings(val_samples=200)
    training, sets, generate = choose_validation(settings, records, seed=1)
    held = [record["line"] for members in sets.values() for record in members]
    assert set(sets) == {"demo_reading", "demo_medicine"}
    assert not generate
    assert sorted(held + [record["line"] for record in training]) == list(range(1, 65))


@pytest.mark.parametrize(
    ("answers", "missing"), [("generate", "answer"), ("recorded", "tagged_response")]
)
def test_a_validation_record_that_lacks_what_is_needed_is_named(
    answers, missing, records, tmp_path
):
    rows = tagged_records(4)
    del rows[2][missing]
    path = write_jsonl(tmp_path / "val.jsonl", rows)
    settings = Settings(val_data=[f"demo={path}"], validation_answers=answers)
    with pytest.raises(InputError, match=f'{path}:3: "{missing}" is missing'):
        choose_validation(settings, records, seed=1)


def test_the_best_adapter_is_kept_and_a_worse_one_does_not_replace_it(
    records, tiny_models, tmp_path, monkeypatch
):
    model, tokenizer = initialize_model_with_tokens(tiny_models["untied"])
    callback = callback_for(records, tmp_path, tokenizer, False)
    saved = []
    monkeypatch.setattr(
        confidence,
        "save_adapter",
        lambda model, tokenizer, folder, figures: saved.append(folder.name),
    )

    class State:
        is_world_process_zero, epoch = True, 0.0

    def validate(step, accuracy, error):
        State.global_step = step
        figures = callback._validate_dataset(model.eval(), "demo")
        figures[0].update(accuracy=accuracy, calibration_error=error)
        monkeypatch.setattr(callback, "_validate_dataset", lambda model, name: figures)
        saved.clear()
        callback.on_evaluate(None, State, None, model=model, metrics={})
        return list(saved)

    assert validate(0, 0.9, 0.01) == []  # before training nothing is kept
    assert validate(5, 0.5, 0.2) == ["best_accuracy", "best_calibration"]
    assert validate(10, 0.6, 0.3) == ["best_accuracy"]
    assert validate(15, 0.6, 0.1) == ["best_calibration"]
    assert validate(20, 0.55, 0.15) == []
