import pytest
from conftest import DEMO_MODEL, ROOT

from train_confidence_lora import judge_answer, read_records

TAGGED = ROOT / "tagged" / "demo"
FILES = sorted(TAGGED.glob("*.jsonl"))


def test_the_demo_model_is_small_enough_for_git():
    files = [*(ROOT / "demo").rglob("*"), *FILES]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 6_000_000
    assert (ROOT / "demo" / "model" / "chat_template.jinja").is_file()
    assert DEMO_MODEL


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_shipped_tags_are_what_the_judge_says(path):
    records = read_records(path)
    assert len(records) > 400
    for record in records:
        judged = judge_answer(
            record["dataset"], record["response"], record["answer"], record.get("options")
        )
        assert judged.correct is record["confident"]


@pytest.mark.parametrize("dataset", ["demo_reading", "demo_medicine"])
def test_the_model_is_partly_right_in_each_world(dataset):
    records = [r for path in FILES for r in read_records(path) if r["dataset"] == dataset]
    share = sum(record["confident"] for record in records) / len(records)
    assert 0.55 <= share <= 0.85


def test_no_held_out_question_is_trained_on():
    def key(record):
        return str([record.get(part) for part in ("question", "context", "options")])

    trained = {key(record) for record in read_records(TAGGED / "demo_all_tagged.jsonl")}
    for path in FILES:
        if "_val_" in path.name:
            assert not trained & {key(record) for record in read_records(path)}
