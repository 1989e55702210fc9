import gzip
import json

import pytest
from conftest import write_jsonl

from train_confidence_lora import InputError, hold_out, read_hub_dataset, read_records

GOOD = {"question": "is it", "dataset": "boolq", "tagged_response": "Yes. <C_READ>"}


def test_a_record_is_split_into_answer_and_meaning(tmp_path):
    records = read_records(write_jsonl(tmp_path / "a.jsonl", [GOOD]))
    assert records == [{**GOOD, "response": "Yes.", "confident": True, "line": 1}]


def test_gzip_bom_crlf_and_blank_lines_are_read(tmp_path):
    text = "\ufeff" + json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD) + "\r\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    assert [record["line"] for record in read_records(tmp_path / "a.jsonl.gz")] == [1, 3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset": "squad"}, "unknown dataset 'squad'; known are boolq"),
        ({"dataset": ["boolq"]}, "unknown dataset ['boolq']"),
        ({"question": " "}, '"question" is missing or empty'),
        ({"tagged_response": "Yes."}, "it must end with <C_READ> or <U_READ>"),
        ({"tagged_response": "Yes <C_READ> <U_READ>"}, "2 confidence tags"),
        ({"tagged_response": "Yes <C_MED>"}, "tag <C_MED> is not of the dataset's domain READ"),
        ({"tagged_response": "Yes <C_READ> indeed"}, "text after the tag"),
        ({"tagged_response": " <C_READ>"}, "no answer before the tag"),
        ({"tagged_response": "Yes <CONFIDENCE> <C_READ>"}, "marker <CONFIDENCE> is in the data"),
        ({"tagged_response": 7}, '"tagged_response" must be a string'),
        ({"context": 7}, '"context" must be a string'),
        ({"options": ["a"]}, '"options" must be an object of strings'),
    ],
)
def test_a_bad_record_is_named_with_file_line_and_reason(change, reason, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 16 + [{**GOOD, **change}])
    with pytest.raises(InputError) as error:
        read_records(path)
    assert f"{path}:17: " in str(error.value)
    assert reason in str(error.value)


def test_broken_json_in_line_17_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 16 + '{"question": \n', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl:17: not JSON"):
        read_records(path)


def test_a_record_without_tag_or_answer_is_no_record(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "is it", "dataset": "boolq"}])
    with pytest.raises(InputError, match='neither "tagged_response" nor "answer"'):
        read_records(path)


def test_the_first_20_bad_lines_are_listed_and_the_rest_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{}] * 25)
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).count(f"{path}:") == 20
    assert "25 bad lines" in str(error.value)
    assert "and 5 more" in str(error.value)


def test_bad_records_can_be_skipped_and_are_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, {}, GOOD, {}])
    assert len(read_records(path, skip_bad=True)) == 2
    assert "left out 2 bad lines" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no records"):
        read_records(tmp_path / "a.jsonl")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot read"):
        read_records(tmp_path / "a.jsonl.gz")


def test_holding_out_is_seeded_per_dataset_and_loses_nothing():
    records = [{"dataset": "boolq", "line": i} for i in range(200)]
    records += [{"dataset": "medqa", "line": i} for i in range(40)]
    kept, held = hold_out(records, 0.05, 200, seed=1)
    assert [record["dataset"] for record in held] == ["boolq"] * 10 + ["medqa"] * 2
    assert sorted(map(str, kept + held)) == sorted(map(str, records))
    assert hold_out(records, 0.05, 200, seed=1) == (kept, held)
    assert hold_out(records, 0.05, 200, seed=2) != (kept, held)
    assert len(hold_out(records, 0.05, 4, seed=1)[1]) == 6  # at most 4 of each


def test_a_dataset_of_the_hub_is_read_with_its_own_column_names(tmp_path):
    rows = [{"question": "is it", "passage": "It is.", "answer": True}]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    location = f"{tmp_path}:validation"  # a folder of data files loads as a Hub dataset does
    (record,) = read_hub_dataset("boolq", location)
    assert (record["context"], record["answer"]) == ("It is.", True)


def test_a_dataset_that_cannot_be_loaded_is_one_sentence():
    with pytest.raises(InputError, match="cannot be loaded"):
        read_hub_dataset("boolq", "nobody/nothing:validation")
    with pytest.raises(InputError, match="name it as one of"):
        read_hub_dataset("squad", "nobody/nothing:validation")
