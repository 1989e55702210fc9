"""10,000 mutated lines through every reader, 1,000 mutated configurations through the launcher:
each is taken or refused in words, in bounded time and memory, by file and line."""

import gzip
import json
import re
import resource
import shutil
import time

import pytest
import yaml
from conftest import DEMO_DATA, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plan_training as plan
import tag_answers
import train_language_model as language
from train_confidence_lora import (
    InputError,
    judge_answer,
    parse_record,
    question_key,
    read_records,
)

pytestmark = pytest.mark.chaos
SECONDS, MEGABYTES = 20, 500  # of one input; above what the imports and the sound inputs take
LINES, CONFIGURATIONS = 10_000, 1_000


def seeded(count):
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


RESPONSES = ["Yes", "No, the answer is B.", "#### 12", "\\boxed{\\frac12}", "1e9/0", ""]
CHAT = {"messages": [{"role": "user", "content": "hi 😀"}, {"role": "assistant", "content": "é"}]}
SOUND = [
    DEMO_DATA.read_bytes().split(b"\n")[0],
    DEMO_DATA.read_bytes().split(b"\n")[1],
    *(
        json.dumps(row, ensure_ascii=False).encode()
        for row in (
            {"question": "q", "dataset": "boolq", "answer": True, "context": "é \\u0000"},
            {"question": "q", "dataset": "medqa", "answer": 1, "options": {"A": "x", "B": "y"}},
            {"question": "q", "dataset": "mmlu", "answer": "B"},
            {"question": "q", "dataset": "gsm8k", "answer": "so #### 1,200"},
            {"question": "q", "dataset": "math", "answer": "\\frac{1}{2}"},
            {"question": "q", "dataset": "gsm8k", "answer": 1e300, "tagged_response": "3 <C_MATH>"},
            CHAT,
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "do", "input": "it", "output": "done"},
            {"prompt": "p", "completion": "c"},
            {"text": "A text \U0001f600 of some words.\n" * 3},
            {"key": "k", "response": "Yes.", "finished": True},
        )
    ),
]
PACKED = [gzip.compress(b"\n".join([line] * 9), mtime=0) for line in SOUND]
SPECIAL = [
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\\u0000", b"\\\\u0000", b"\\ud800",
    b"\\udc00\\ud800", b"\r", b"\n", b"\x1a", b"\xc3", b"\xed\xa0\x80", b"[" * 2000,
    b'{"a":' * 70, b"]" * 70, b"9" * 5000, b"1e999", b"-1", b"2.5", b"NaN", b"-Infinity",
    b"null", b"true",
    b'"question": "again", ', b'"answer": {"a": [1]}, ', b'"answer": 99, ', b'"answer": "nan", ',
    b'"dataset": "math", ', b'"dataset": "medqa", ', b'"options": {"]": "x", "^-a": ""}, ',
    b'"options": {}, ', b'"response": 7, "confident": 7, ', b"<C_READ>", b"<CONFIDENCE>", b"[]",
    b'"', b"\\", b"}", b"{", b",", b":", b" ", b"a" * 70_000, "\u2028".encode(),
]  # fmt: skip


@st.composite
def mutated(draw, sound, special):
    """One of `sound`, changed in one to four places."""
    text = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        change = draw(st.sampled_from("flip delete insert insert truncate splice".split()))
        if change == "flip" and at < len(text):
            text[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "delete":
            del text[at : at + draw(st.integers(1, 20))]
        elif change == "insert":
            if draw(st.booleans()):  # where a value or a key begins, most special texts fit
                begins = [found.start() for found in re.finditer(rb'[{,: ](?=["\w\[-])', text)]
                at = draw(st.sampled_from(begins)) + 1 if begins else at
            text[at:at] = draw(st.sampled_from(special))
        elif change == "truncate":
            del text[at:]
        else:
            other = draw(st.sampled_from(sound))
            text[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(text)


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB: Linux counts KiB


def bounded(function, *arguments):
    """What a function returns; fails if it takes too long. One that never ends is ended by the
    test's own time limit."""
    start = time.monotonic()
    try:
        return function(*arguments)
    finally:
        assert time.monotonic() - start < SECONDS


def read_everything(path):
    """All readers of .jsonl, and what is done with a record before a model is there."""
    refusals = []
    for read in (
        lambda: read_records(path),
        lambda: read_records(path, True, parse_record),
        lambda: read_records(f"{path}.gz"),
        lambda: read_records(path, False, language.parse_chat),
        lambda: language.read_texts(str(path)),
        lambda: language.read_either(str(path)),
        lambda: language.read_texts(str(path.with_suffix(".txt"))),
        lambda: list(tag_answers.read_answers(path.parent).values()),
    ):
        try:
            records = read()
        except InputError as error:
            refusals.append(str(error))
            continue
        json.dumps(records).encode()  # the key of the cache of encodings
        for record in records:
            if "question" in record:
                question_key(record)
                for response in (*RESPONSES, record.get("response", "")):
                    judge_answer(
                        record["dataset"], response, record.get("answer"), record.get("options")
                    )
    return refusals


def test_fuzzed_lines_are_read_or_refused_by_file_and_line(tmp_path):
    path, before, refused = tmp_path / "answers-0.jsonl", memory(), []

    @seeded(LINES)
    @given(mutated(SOUND, SPECIAL), mutated(PACKED, [b"\0", b"\x1f\x8b", b"\xff" * 9]))
    def fuzz(line, packed):
        path.write_bytes(SOUND[2] + b"\n" + line + b"\n")
        path.with_name("answers-0.jsonl.gz").write_bytes(packed)
        path.with_suffix(".txt").write_bytes(line)
        refused.append(bounded(read_everything, path))
        for refusal in refused[-1]:
            nothing = "holds no" in refusal  # nothing that could have a line
            assert nothing or re.search(r"answers-0\.(jsonl|jsonl\.gz|txt):\d+: ", refusal), refusal

    fuzz()
    assert len(refused) == LINES
    assert memory() - before < MEGABYTES


CONFIGS = sorted((ROOT / "configs" / "runs").iterdir())
IN_CONFIGS = [
    b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\t", b"\r", b"\n", b"\x85", b"\xc3", b"&a ", b"*a",
    b"<<: ", b"!!python/object/apply:os.system [x] ", b"!!timestamp ", b"!!binary ", b"!!set ",
    b"[" * 500, b"{a: " * 50, b"a." * 40, b"9" * 5000, b"1" * 17, b".nan ", b"nan", b".inf ",
    b"inf", b"1e999", b"-1 ", b"0 ", b"2.5 ", b"2024-01-01 ", b"2024-99-99", b"12:30:45",
    b"[1, [2]] ",
    b"[a, b] ", b"{a: 1} ", b"~ ", b"true ", b"auto ", b"1: 2\n", b"no: 1\n", b"? [a]\n",
    b'"\\ud800" ', b'"\\0" ', b"'" , b'"', b"#", b"---\n", b"...\n", b"task: cpt_mixed\n",
    b"strategy: zero3\n", b"strategy = 'tp'\n", b"num_processes: 4\n", b"num_machines = 2\n",
    b"num_processes: 1000000000\n", b"num_layers: 1000000000\n", b"max_restarts: -1\n",
    b"max_restarts = 2\n", b"optim: [a]\n", b"model_type: bert\n", b"hub_token: secret\n",
    b"deepspeed: x\n", b"output_dir: $(id)\n", b"learning_rate: {a: 1}\n", b"a" * 5000,
]  # fmt: skip


def test_fuzzed_configurations_launch_or_are_refused_by_file_and_line(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "data" / "texts").mkdir(parents=True)
    (tmp_path / "tagged" / "qwen").mkdir(parents=True)
    shutil.copy(DEMO_DATA, tmp_path / "tagged" / "qwen" / "qwen_all_tagged.jsonl")
    for name in ("chats_train.jsonl", "chats_val.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps(CHAT) + "\n")
    for name in ("texts/one.txt", "texts_val.txt"):
        (tmp_path / "data" / name).write_text("word " * 1000)
    for script in {*plan.SCRIPTS.values()}:
        (tmp_path / script).symlink_to(ROOT / script)
    monkeypatch.delenv("GPU_TYPE", raising=False)
    monkeypatch.chdir(tmp_path)
    here = plan.Hardware([], cores=4)
    for path in CONFIGS:  # imports what it takes
        plan.main(["plan", str(path)], here, tmp_path)
    saved = {"task": "confidence", "weight_decay": 0.1, "report_to": [], "versions": {"torch": "2"}}
    by_kind = {
        suffix: [path.read_bytes() for path in CONFIGS if path.suffix == suffix]
        for suffix in (".yaml", ".toml")
    }
    by_kind[".yaml"].append(yaml.safe_dump(saved).encode())
    either = st.sampled_from(sorted(by_kind)).flatmap(
        lambda suffix: mutated(by_kind[suffix], IN_CONFIGS).map(lambda text: (suffix, text))
    )
    before, codes = memory(), []
    capsys.readouterr()

    @seeded(CONFIGURATIONS)
    @given(either)
    def fuzz(configuration):
        suffix, text = configuration
        path = tmp_path / f"run{suffix}"
        path.write_bytes(text)
        code = bounded(plan.main, ["launch", path.name, "--dry_run"], here, tmp_path)
        out, error = capsys.readouterr()
        codes.append(code)
        assert code in (0, 2)
        if code:
            assert (out, error.count("\n")) == ("", 1), error
            assert re.search(rf"run{suffix}:\d+: ", error), error
        assert "secret" not in out + error

    fuzz()
    assert len(codes) == CONFIGURATIONS
    assert memory() - before < MEGABYTES
    assert min(codes.count(0), codes.count(2)) > CONFIGURATIONS / 10  # both are tried
