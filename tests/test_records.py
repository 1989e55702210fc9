import gzip
import json
import os
import zlib

import pytest
from conftest import write_jsonl

from train_confidence_lora import (
    MAX_LINE_BYTES,
    InputError,
    hold_out,
    read_hub_dataset,
    read_records,
)

GOOD = {"question": "is it", "dataset": "boolq", "tagged_response": "Yes. <C_READ>"}


def test_a_record_is_split_into_answer_and_meaning(tmp_path):
    records = read_records(write_jsonl(tmp_path / "a.jsonl", [GOOD]))
    place = {"file": str(tmp_path / "a.jsonl"), "line": 1}
    assert records == [{**GOOD, "response": "Yes.", "confident": True, **place}]


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
        ({"answer": {"A": 1}}, '"answer" is dict'),
        ({"question": "half \ud800"}, r"half a surrogate pair, \ud800"),
        ({"question": "nul \0"}, "a NUL character"),
        ({"note": float("nan")}, "NaN is no JSON"),
    ],
)
def test_a_bad_record_is_named_with_file_line_and_reason(change, reason, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 16 + [{**GOOD, **change}])
    with pytest.raises(InputError) as error:
        read_records(path)
    assert f"{path}:17: " in str(error.value)
    assert reason in str(error.value)


MEDICINE = {"question": "which", "dataset": "medqa", "options": {"A": "aspirin", "B": "rest"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "C"}, "neither the letter"),
        ({"answer": 2}, "neither the letter"),
        ({"answer": -1}, "neither the letter"),
        ({"answer": 1.0}, "neither the letter"),
        ({"answer": "tea", "options": None}, "neither the letter"),
        ({"answer": True}, '"answer" is bool'),
        ({"answer": "A", "options": {"A": "x", "": "y"}}, "must be single letters"),
        ({"answer": "A", "options": {"A": "x", "]": "y"}}, "must be single letters"),
        ({"response": "A", "confident": True}, 'neither "tagged_response" nor "answer"'),
    ],
)
def test_a_question_whose_answer_no_response_could_match_is_refused(change, reason, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**MEDICINE, **change}])
    with pytest.raises(InputError, match=reason):
        read_records(path)


@pytest.mark.parametrize("answer", ["A", "(b).", 1, "Rest"])
def test_an_answer_may_be_a_letter_a_position_or_an_options_text(answer, tmp_path):
    [record] = read_records(write_jsonl(tmp_path / "a.jsonl", [{**MEDICINE, "answer": answer}]))
    assert record["answer"] == answer


LINE = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (LINE.replace(b"is it", b"is \xffit"), "not UTF-8 (byte 0xff at column 18)"),
        (LINE.replace(b"is it", b"is \0it"), "a NUL character at column 18"),
        (LINE.replace(b"is it", rb"\\\u0000"), r"a NUL character, written \u0000"),
        (LINE.replace(b"dataset", b"question"), "the key 'question' is there 2 times"),
        (LINE[:-1] + b', "a": ' + b"[" * 10**5, "nested deeper than 64 levels"),
        (LINE[:-1] + b', "a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
        (LINE[:-1] + b', "a": ' + b"9" * 5000 + b"}", "a number of more than 4300 digits"),
        (LINE[:-1] + b', "a": 1e999}', "a number too large for a float"),
        (LINE[:-1] + b', "a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": [' + b"0," * 10**6 + b"0]}", "more than 1,000,000 values"),
        (b'{"question": "' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 16 MiB"),
        (b'{"dataset": "' + b"a" * 2**20 + b'"}', "question"),
    ],
    ids=range(12),
)
def test_a_line_that_chokes_later_work_is_one_bad_line(line, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([LINE, line, LINE.replace(b"is it", rb"\\u0000 [")]))
    with pytest.raises(InputError) as error:
        read_records(path)
    assert f"{path}:2: " in str(error.value)
    assert reason in str(error.value)
    assert len(str(error.value)) < 1000
    assert [record["line"] for record in read_records(path, skip_bad=True)] == [1, 3]


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
    for encoding in ("UTF-16", "UTF-32"):
        (tmp_path / "a.jsonl").write_bytes(LINE.decode().encode(encoding))
        with pytest.raises(InputError, match=rf"a\.jsonl:1: it looks like {encoding}: save it"):
            read_records(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"cannot read .*gz:1: Not a gzipped file"):
        read_records(tmp_path / "a.jsonl.gz")


def test_a_broken_gz_file_is_named_with_the_line_reached(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = gzip.compress(b"".join(LINE + b" " * i + b"\n" for i in range(10_000)))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"gz:\d{4}: Compressed file ended before"):
        read_records(path)
    path.write_bytes(packed[:2000] + b"\xff" * 100 + packed[2100:])
    with pytest.raises(InputError, match=r"gz:\d+: Error -3 while decompressing"):
        read_records(path)


@pytest.mark.parametrize(("line", "reached"), [(bytes(2**20), 1), (b"x" * 1023 + b"\n", 10**5)])
def test_a_gz_file_that_unpacks_without_end_is_stopped(line, reached, tmp_path):
    packer = zlib.compressobj(wbits=31)
    path = tmp_path / "a.jsonl.gz"
    with open(path, "wb") as file:
        for _ in range(150 * 2**20 // len(line)):
            file.write(packer.compress(line))
        file.write(packer.flush())
    with pytest.raises(InputError, match="unpacks to more than 100 times its size") as error:
        read_records(path)
    assert int(str(error.value).split("gz:")[1].split(":")[0]) >= reached


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "", tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot read"):
            read_records(path)


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
