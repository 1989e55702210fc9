import json

import pytest
from conftest import DEMO_MODEL, tagged_records, write_jsonl

import tag_answers
from train_confidence_lora import question_key, read_records


@pytest.fixture
def questions(tmp_path):
    records = tagged_records(40)
    for record in records:
        del record["tagged_response"]
    return records, write_jsonl(tmp_path / "questions.jsonl", records)


def line(questions, folder, *more):
    return ["--model_name", DEMO_MODEL, "--questions", questions, "--max_new_tokens", "16",
            "--output", str(folder / "demo_all_tagged.jsonl"), "--val_fraction", "0.25",
            "--batch_size", "8", *more]  # fmt: skip


def files(folder):
    return {path.name: path.read_text() for path in folder.glob("*.jsonl")}


def test_questions_become_tagged_records_split_by_dataset(questions, tmp_path, capsys):
    _, path = questions
    tag_answers.main(line(path, tmp_path / "out"))
    names = set(files(tmp_path / "out"))
    assert names == {
        "demo_all_tagged.jsonl",
        "demo_val_demo_reading.jsonl",
        "demo_val_demo_medicine.jsonl",
    }
    tagged = [r for name in names for r in read_records(tmp_path / "out" / name)]
    said = capsys.readouterr().out
    assert len(tagged) == 40
    assert "40 questions: " in said
    for record in tagged:
        truth = record["answer"]
        if record["dataset"] == "demo_reading":
            right = record["response"] == ("Yes." if truth else "No.")
        else:
            right = record["response"] == f"The answer is {truth}."
        assert record["confident"] is right
    assert {record["confident"] for record in tagged} == {True, False}


def test_the_split_of_a_question_does_not_depend_on_the_others(questions, tmp_path):
    records, path = questions
    tag_answers.main(line(path, tmp_path / "all"))
    half = write_jsonl(tmp_path / "half.jsonl", records[::2])
    tag_answers.main(line(half, tmp_path / "half"))
    for name, text in files(tmp_path / "half").items():
        assert set(text.splitlines()) <= set(files(tmp_path / "all")[name].splitlines())


def test_an_interrupted_run_goes_on_where_it_stopped(questions, tmp_path, monkeypatch, capsys):
    _, path = questions
    tag_answers.main(line(path, tmp_path / "whole"))
    import train_confidence_lora as confidence

    generate, asked = confidence.generate_answers, []

    def counting(model, tokenizer, prompts, *arguments):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, *arguments)

    monkeypatch.setattr(confidence, "generate_answers", counting)
    with pytest.raises(KeyboardInterrupt):
        tag_answers.main(line(path, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "demo_all_tagged.jsonl").exists()
    answers = tmp_path / "parts" / "demo_answers" / "answers-0.jsonl"
    answers.write_text(answers.read_text()[:-20])  # the last line was cut off by the kill
    monkeypatch.setattr(confidence, "generate_answers", generate)
    capsys.readouterr()
    tag_answers.main(line(path, tmp_path / "parts"))
    assert "15 questions were answered before" in capsys.readouterr().out
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_cut_off_and_unparsed_answers_are_counted_and_left_out(questions, tmp_path, capsys):
    records, path = questions
    tag_answers.main(line(path, tmp_path / "out", "--max_new_tokens", "3"))
    said = capsys.readouterr().out
    assert "20 cut off" in said  # "The answer is B." is longer
    name = {record["dataset"] for record in read_records(tmp_path / "out/demo_all_tagged.jsonl")}
    assert name == {"demo_reading"}
    unparsed, counts = tag_answers.tag(
        [records[1]], {question_key(records[1]): {"response": "Hm.", "finished": True}}
    )
    assert (unparsed, counts) == ([], {"unparsed": 1})


def test_a_question_whose_passage_was_shortened_keeps_its_answer(tmp_path, capsys):
    [record] = [r for r in tagged_records(2) if r["dataset"] == "demo_reading"]
    del record["tagged_response"]
    record["context"] = "The shelf is old. " * 100 + record["context"]
    path = write_jsonl(tmp_path / "questions.jsonl", [record])
    for _ in range(2):
        tag_answers.main(line(path, tmp_path / "out", "--max_seq_length", "128"))
    assert "no answer" not in capsys.readouterr().out
    answers = (tmp_path / "out" / "demo_answers" / "answers-0.jsonl").read_text().split()
    assert question_key(record) in "".join(answers)


def test_answers_of_another_model_are_not_mixed_in(questions, tiny_models, tmp_path, capsys):
    _, path = questions
    tag_answers.main(line(path, tmp_path / "out"))
    with pytest.raises(SystemExit) as exit_info:
        tag_answers.main(line(path, tmp_path / "out", "--model_name", tiny_models["untied"]))
    assert exit_info.value.code == 2
    assert "holds answers made with --model_name" in capsys.readouterr().err


def test_a_question_without_true_answer_is_named(tmp_path, capsys):
    rows = tagged_records(2)
    del rows[1]["answer"]
    path = write_jsonl(tmp_path / "questions.jsonl", rows)
    with pytest.raises(SystemExit) as exit_info:
        tag_answers.main(line(path, tmp_path / "out"))
    assert exit_info.value.code == 2
    assert f'{path}:2: "answer" is missing' in capsys.readouterr().err


def test_two_processes_answer_each_question_once(questions, tmp_path):
    from test_run import launch

    _, path = questions
    tag_answers.main(line(path, tmp_path / "one"))
    launch(2, line(path, tmp_path / "two"), script="tag_answers.py")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    parts = sorted((tmp_path / "two" / "demo_answers").glob("answers-*.jsonl"))
    assert [len(part.read_text().splitlines()) for part in parts] == [24, 16]


def test_twice_the_same_question_is_answered_once(questions, tmp_path, capsys):
    records, _ = questions
    path = write_jsonl(tmp_path / "twice.jsonl", [*records, *records[:5]])
    tag_answers.main(line(path, tmp_path / "out"))
    assert "5 questions appear twice" in capsys.readouterr().out
    rows = [
        json.loads(row) for text in files(tmp_path / "out").values() for row in text.splitlines()
    ]
    assert len(rows) == 40


def test_a_line_that_is_no_answer_is_asked_again(tmp_path):
    row = {"key": "k", "response": "Yes.", "finished": True}
    lines = [json.dumps(row), "[]", '{"key": 1}', "[" * 10**5, "\0", json.dumps(row)[:-9]]
    (tmp_path / "answers-0.jsonl").write_text("\n".join(lines))
    assert tag_answers.read_answers(tmp_path) == {"k": row}


def test_settings_of_earlier_answers_that_are_damaged_are_one_sentence(tmp_path, capsys):
    (tmp_path / "demo_answers").mkdir()
    (tmp_path / "demo_answers" / "settings.json").write_text("{")
    questions = write_jsonl(tmp_path / "questions.jsonl", tagged_records(2))
    with pytest.raises(SystemExit):
        tag_answers.main(line(questions, tmp_path))
    assert "settings.json:1: not JSON" in capsys.readouterr().err


def test_line_separators_inside_an_answer_do_not_lose_it(tmp_path):
    row = {"key": "k", "response": "Yes.\u2028Really.\x85", "finished": True}
    tag_answers.write_lines(tmp_path / "answers-0.jsonl", [row])
    assert tag_answers.read_answers(tmp_path) == {"k": row}
