"""A trained adapter in use, and its exports."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from test_model import batch_of, train_steps
from test_scoring import plain_probability, records_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from confidence_model import (
    ConfidenceModel,
    export_merged,
    export_rows_in_base,
    plain_confidence,
)
from reporting.statistics import Scaling
from train_confidence_lora import (
    InputError,
    RunError,
    initialize_model_with_tokens,
    save_adapter,
    score_batch,
    tokenize,
)

KINDS = [("lora", "untied"), ("lora", "tied"), ("lora", "spare"), ("activated", "untied"),
         ("activated", "tied")]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def saved(request, tiny_models, tmp_path_factory):
    """(the folder of an adapter that does something, its kind, what its base is)."""
    kind, base = request.param
    model, tokenizer = initialize_model_with_tokens(tiny_models[base], kind)
    train_steps(model, batch_of(tokenizer), steps=5)
    folder = tmp_path_factory.mktemp("adapter") / "final"
    save_adapter(model.eval(), tokenizer, folder)
    return str(folder), kind, base


def test_answers_are_those_of_the_model_in_the_questions_order(saved):
    folder, _, _ = saved
    model = ConfidenceModel.from_pretrained(folder)
    questions = records_of(13)
    answers = model.answer(questions, max_new_tokens=6, batch_size=4)
    for question, answer in zip(questions, answers, strict=True):
        [(confidence, tag, text)] = score_batch(model.model, model.tokenizer, [question], 6)
        assert (answer.text, answer.tag) == (text, tag)
        assert answer.confidence == answer.probability == pytest.approx(confidence, abs=1e-5)


def test_answers_given_before_are_judged_as_by_a_plain_pass(saved):
    folder, _, _ = saved
    model = ConfidenceModel.from_pretrained(folder)
    records = records_of(9)
    judged = model.judge(records, batch_size=4)
    served = plain_confidence(model.model, model.tokenizer, records)
    for record, answer, plain in zip(records, judged, served, strict=True):
        ids = tokenize(model.tokenizer, record["response"])
        expected = plain_probability(model.model, model.tokenizer, record, ids)
        assert answer.confidence == pytest.approx(expected, abs=1e-5)
        assert plain == pytest.approx(expected, abs=1e-6)
    [other] = model.judge([{**records[0], "dataset": "demo_reading"}], domain="MED")
    assert other.confidence != pytest.approx(judged[0].confidence, abs=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("way", [export_merged, export_rows_in_base])
def test_an_export_answers_and_judges_as_its_adapter(way, dtype, most, saved, tmp_path):
    folder, kind, _ = saved
    if way is export_merged and kind == "activated":
        with pytest.raises(InputError, match="cannot be merged: use --rows_in_base"):
            way(folder, tmp_path / "out", dtype)
        return
    records = records_of(16)
    before = ConfidenceModel.from_pretrained(folder, dtype=dtype)
    written = way(folder, tmp_path / "out", dtype)
    after = ConfidenceModel.from_pretrained(written, dtype=dtype)
    confidences = [[a.confidence for a in model.judge(records)] for model in (before, after)]
    assert np.ptp(confidences[0]) > 0.01
    assert np.abs(np.subtract(*confidences)).max() <= most
    served = plain_confidence(after.model, after.tokenizer, records)
    assert np.abs(served - confidences[0]).max() <= 2 * most
    if dtype is torch.float32:
        texts = [[a.text for a in model.answer(records, 6)] for model in (before, after)]
        assert texts[0] == texts[1]


def test_rows_in_base_is_a_base_and_a_plain_lora_that_peft_alone_loads(saved, tmp_path):
    folder, kind, base = saved
    adapter = export_rows_in_base(folder, tmp_path / "out", torch.float32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None
    assert bool(config["alora_invocation_tokens"]) is (kind == "activated")
    matrices = load_file(adapter / "adapter_model.safetensors")
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in matrices)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    assert model.config.tie_word_embeddings is (base == "tied")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied is (base == "tied")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    [record] = records_of(1)
    ids = tokenize(tokenizer, record["response"])
    plain = PeftModel.from_pretrained(model, adapter).eval()
    expected = ConfidenceModel.from_pretrained(folder)
    assert plain_probability(plain, tokenizer, record, ids) == pytest.approx(
        plain_probability(expected.model, expected.tokenizer, record, ids), abs=1e-5
    )


def test_an_export_replaces_an_earlier_one_and_nothing_else(saved, tmp_path):
    folder, _, _ = saved
    for _ in range(2):
        export_rows_in_base(folder, tmp_path / "out", torch.float32)
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "mine" / "base" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no earlier export"):
        export_rows_in_base(folder, tmp_path / "mine", torch.float32)
    assert (tmp_path / "mine" / "base" / "thesis.txt").read_text() == "years of work"

    def refuse(exported):
        raise RunError("it differs")

    def written():
        return sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*"))

    before = written()
    with pytest.raises(RunError, match="it differs"):
        export_rows_in_base(folder, tmp_path / "out", torch.float32, refuse)
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*")
    )
    with pytest.raises(InputError, match="has its rows in its base already"):
        export_merged(tmp_path / "out" / "adapter", tmp_path / "again", torch.float32)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert ConfidenceModel.from_pretrained(tmp_path / "moved" / "adapter").judge(records_of(2))


def test_the_scaling_beside_the_adapter_is_applied_and_goes_with_an_export(saved, tmp_path):
    folder, _, _ = saved
    records = records_of(8)
    raw = ConfidenceModel.from_pretrained(folder).judge(records)
    path = Path(folder, "scaling.json")
    try:
        path.write_text('{"maps": {"READ": {"a": 2.0, "b": -0.5}}}')
        adapter = export_rows_in_base(folder, tmp_path / "out", torch.float32)
        for place in (folder, adapter):
            scaled = ConfidenceModel.from_pretrained(place).judge(records)
            for record, before, after in zip(records, raw, scaled, strict=True):
                expected = before.confidence
                if record["dataset"] == "demo_reading":
                    expected = float(Scaling(2.0, -0.5).apply(before.confidence))
                assert after.confidence == pytest.approx(before.confidence, abs=1e-5)
                assert after.probability == pytest.approx(expected, abs=1e-4)
        unscaled = ConfidenceModel.from_pretrained(folder, scale=False).judge(records)
        assert [a.probability for a in unscaled] == [a.confidence for a in raw]
        path.write_text('{"maps": {"READ": {"a": "steep"}}}')
        with pytest.raises(InputError, match=r"scaling\.json"):
            ConfidenceModel.from_pretrained(folder)
    finally:
        path.unlink()


def test_a_question_that_is_none_is_named(saved):
    folder, _, _ = saved
    model = ConfidenceModel.from_pretrained(folder, max_seq_length=96)
    good = records_of(2)[1]
    for bad, reason in (
        ({"question": "is it"}, "unknown dataset None"),
        ({**good, "question": "figs " * 200}, "too long by"),
    ):
        with pytest.raises(InputError, match=f"question 1: {reason}"):
            model.answer([good, bad], 4)
    long = {**good, "context": f"Many words. {'So many. ' * 200} {good['context']}"}
    [answer] = model.answer([long], 4)
    assert 0 < answer.probability < 1
    with pytest.raises(InputError, match='"response" is missing'):
        model.judge([{key: good[key] for key in ("question", "dataset")}])


def test_what_is_no_adapter_is_refused(tiny_models, tmp_path):
    with pytest.raises(InputError, match="no adapter in"):
        ConfidenceModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="its tokenizer has no tags"):
        ConfidenceModel.from_pretrained(tiny_models["untied"])
    with pytest.raises(InputError, match="neither a folder nor on the Hub"):
        ConfidenceModel.from_pretrained(tmp_path / "not" / "there")


def test_the_serving_guides_code_runs(saved, capsys):
    folder, _, _ = saved
    guide = (ROOT / "SERVING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    local = [block for block in blocks if "openai" not in block]
    assert local
    for block in local:
        exec(block.replace("checkpoints/demo_lora/final", folder), {})
    assert re.search(r"0\.\d+", capsys.readouterr().out)
    for block in blocks:
        compile(block, "SERVING.md", "exec")
