import random

import pytest
from conftest import DEMO_MODEL
from transformers import AutoTokenizer

from train_confidence_lora import (
    CONFIDENCE_TOKENS,
    HELD_TOKENS,
    MARKER_TOKEN,
    Collator,
    InputError,
    build_prompt,
    confidence_segments,
    encode_segments,
    fit_record,
    fit_records,
    tokenize,
)

READING = {
    "question": "does the box hold figs",
    "context": "The box holds figs and plums.",
    "dataset": "boolq",
    "response": "Yes.",
    "confident": True,
    "line": 3,
}
CHOICE = {
    "question": "which",
    "options": {"A": "gout", "B": "kuru"},
    "dataset": "medqa",
    "response": "The answer is B.",
    "confident": False,
}


@pytest.fixture
def with_tags(tokenizer):
    tags = [tag for pair in CONFIDENCE_TOKENS.values() for tag in pair]
    tokenizer.add_special_tokens({"extra_special_tokens": [MARKER_TOKEN, *tags]})
    return tokenizer


def test_the_prompt_holds_passage_question_options_and_instruction(tokenizer):
    prompt = build_prompt(tokenizer, READING)
    assert prompt.startswith(
        "<|im_start|>user\nPassage: The box holds figs and plums.\n\nQuestion:"
    )
    assert prompt.endswith("Answer yes or no.<|im_end|>\n<|im_start|>assistant\n")
    assert "A. gout\nB. kuru" in build_prompt(tokenizer, CHOICE)


def test_a_base_model_without_chat_template_is_asked_plainly(tokenizer):
    tokenizer.chat_template = None
    assert build_prompt(tokenizer, READING).endswith("Answer yes or no.\n\nAnswer:")


def labelled_text(tokenizer, row):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [("lora", ["Yes.<CONFIDENCE><C_READ>", "The answer is B.<CONFIDENCE><U_MED>"]),
     ("activated", ["<C_READ>", "<U_MED>"])],
)  # fmt: skip
def test_the_loss_is_on_the_tag_and_for_lora_on_marker_and_answer_too(with_tags, adapter, expected):
    for record, labelled in zip((READING, CHOICE), expected):
        row = encode_segments(with_tags, [confidence_segments(with_tags, record, adapter)])[0]
        assert labelled_text(with_tags, row) == labelled
        assert row["input_ids"][-2] == with_tags.convert_tokens_to_ids(MARKER_TOKEN)
        text = with_tags.decode(row["input_ids"][:-2])
        assert text == build_prompt(with_tags, record) + record["response"]
        labels = [(i, t) for i, t in zip(row["input_ids"], row["labels"]) if t != -100]
        assert all(token == label for token, label in labels)


def test_a_long_answer_is_held_at_a_few_tokens_the_first_among_them(with_tags):
    record = {**READING, "response": "apples " + "plums " * 200}
    row = encode_segments(with_tags, [confidence_segments(with_tags, record, "lora")])[0]
    assert sum(label != -100 for label in row["labels"]) == HELD_TOKENS + 2
    prompt = len(tokenize(with_tags, build_prompt(with_tags, record)))
    assert set(row["labels"][:prompt]) == {-100}
    assert row["labels"][prompt] == row["input_ids"][prompt]


def test_encoded_prompts_hold_the_special_tokens_once(with_tags):
    ids = tokenize(with_tags, build_prompt(with_tags, READING))
    assert ids.count(with_tags.convert_tokens_to_ids("<|im_start|>")) == 2


@pytest.mark.parametrize("part", ["context", "response"])
def test_a_long_record_loses_its_middle_and_never_its_tag(with_tags, part):
    long = {**READING, part: "first " + "apples plums " * 500 + "last"}
    record = fit_record(with_tags, long, 198)
    row = encode_segments(with_tags, [confidence_segments(with_tags, record, "lora")])[0]
    assert 150 < len(row["input_ids"]) <= 200
    assert with_tags.convert_ids_to_tokens(row["input_ids"][-1]) == "<C_READ>"
    assert record[part].startswith("first ")
    assert record[part].endswith("last")
    assert " … " in record[part]
    assert record["question"] == READING["question"]


def test_any_long_text_can_be_shortened_to_any_length(with_tags):
    """Characters cut in two and stray white space take other tokens than before the cut."""
    draw = random.Random(0)
    pieces = ["plums", " ", "\n\n", "东京", "🙂", "é", "Yes. ", "…", "\t", "\x07"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=300))
        budget = draw.randint(110, 300)
        record = fit_record(with_tags, {**READING, "response": text, "context": text}, budget)
        row = encode_segments(with_tags, [confidence_segments(with_tags, record, "lora")])[0]
        assert len(row["input_ids"]) <= budget + 2


def test_the_passage_is_shortened_before_the_answer(with_tags):
    long = {**READING, "context": "apples " * 300, "response": "Yes. " * 60}
    record = fit_record(with_tags, long, 250)
    assert record["response"] == long["response"]
    assert len(record["context"]) < len(long["context"])


def test_a_fitting_record_is_left_alone(with_tags):
    assert fit_record(with_tags, READING, 200) == READING


def test_a_question_too_long_is_reported_with_its_line_and_skipped(with_tags, capsys):
    long = {**READING, "question": "does it hold figs " * 100, "line": 17}
    assert fit_records(with_tags, [READING, long], 126, "train.jsonl") == [READING]
    said = capsys.readouterr().out
    assert "skipped 1 of 2 of train.jsonl" in said
    assert "line 17: too long by" in said
    with pytest.raises(InputError, match=r"no record of train\.jsonl fits --max_seq_length"):
        fit_records(with_tags, [long], 126, "train.jsonl")


def test_batches_are_padded_on_the_right_and_the_padding_has_no_labels(with_tags):
    rows = [
        encode_segments(with_tags, [confidence_segments(with_tags, record, "lora")])[0]
        for record in (READING, CHOICE)
    ]
    batch = Collator(with_tags.pad_token_id)(rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert (batch["labels"][i, length:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )


def test_any_text_survives_the_demo_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "Grüße, 東京 🙂\t\x07 <b>"
    assert tokenizer.decode(tokenize(tokenizer, text)) == text
