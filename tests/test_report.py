"""report_confidence.py: from an adapter to figures, a threshold, routing and exports."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import DEMO_MODEL, ROOT, tagged_records, write_jsonl
from huggingface_hub import ModelCard
from netcal.metrics import ECE
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torchmetrics.classification import BinaryCalibrationError

import train_confidence_lora as confidence
from report_confidence import main
from train_confidence_lora import calibration_error

TRAINED, VALIDATED, HELD_OUT = (tagged_records(300, seed)[:count] for seed, count in
                                ((0, 96), (1, 24), (2, 240)))  # fmt: skip


def train(folder, records, *more):
    """A run of a few steps; returns the folder of its adapter."""
    data = write_jsonl(folder / "train.jsonl", records)
    flags = {
        "model_name": DEMO_MODEL, "train_data": data, "output_dir": folder / "run",
        "batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 24, "eval_steps": 24,
        "learning_rate": 2e-3, "max_seq_length": 128, "max_new_tokens": 16,
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    confidence.main([*given, *more])
    return str(folder / "run" / "final")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    val = write_jsonl(folder / "val.jsonl", VALIDATED)
    return train(folder, TRAINED, "--val_data", f"mixed={val}")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A file of questions the run has not seen, but for three that it has."""
    folder = tmp_path_factory.mktemp("data")
    records = [*HELD_OUT, TRAINED[0], TRAINED[1], VALIDATED[0], HELD_OUT[5]]
    return write_jsonl(folder / "test.jsonl", records)


@pytest.fixture(autouse=True)
def without_page(request, monkeypatch):
    """Draws no page, which takes seconds, for a test that is not marked to look at it."""
    if not request.node.get_closest_marker("page"):
        monkeypatch.setattr("report_confidence.write_page", lambda folder: None)


def command(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(word) for word in words])
    return exit_info.value.code


def evaluate(adapter, data, out, *more):
    return command("evaluate", "--adapter", adapter, "--data", f"demo={data}", "--output_dir", out,
                   "--max_new_tokens", 16, "--max_seq_length", 128, *more)  # fmt: skip


@pytest.fixture(scope="module")
def report(adapter, held_out, tmp_path_factory):
    """(folder, report.json, the lines of scores.jsonl)"""
    out = tmp_path_factory.mktemp("evaluated")
    assert evaluate(adapter, held_out, out, "--calib_beta", 20) == 0
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    return out, json.loads((out / "report.json").read_text()), lines


def test_only_what_the_run_has_not_seen_is_tested_on_and_scaled_by(report):
    _, figures, lines = report
    reasons = {}
    for entry in figures["data"]:
        for reason, count in entry["left_out"].items():
            reasons[reason] = reasons.get(reason, 0) + count
        assert entry["records"] == entry["used"] + sum(entry["left_out"].values())
    assert reasons["trained on"] == 2
    assert reasons["used to choose a checkpoint"] == 1
    assert reasons["asked before"] >= 1
    assert 40 < reasons["kept for scaling"] == figures["scaling"]["num_samples"] < 110
    seen = {confidence.question_key(record) for record in TRAINED + VALIDATED}
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    assert not seen & set(keys)
    assert figures["sets"]["all"]["num_samples"] == len(lines)


@pytest.mark.parametrize(
    ("records", "reason"),
    [(TRAINED, "trained on"), (VALIDATED, "used to choose a checkpoint")],
)
def test_data_that_the_run_has_seen_is_refused(records, reason, adapter, tmp_path, capsys):
    data = write_jsonl(tmp_path / "seen.jsonl", records)
    assert evaluate(adapter, data, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is left to use" in said
    assert reason in said


def test_an_adapter_whose_training_is_unknown_is_believed_only_if_told(
    adapter, held_out, tmp_path, capsys
):
    without = shutil.ignore_patterns("scaling.json")
    shutil.copytree(adapter, tmp_path / "alone" / "final", ignore=without)
    out = tmp_path / "out"
    assert evaluate(tmp_path / "alone" / "final", held_out, out) == 2
    assert "--assume_held_out" in capsys.readouterr().err
    Path(tmp_path, "alone", "final", "README.md").write_text("---\na: [\n---\nBy hand.\n")
    few = write_jsonl(tmp_path / "few.jsonl", HELD_OUT[:40])
    more = ["--assume_held_out", "--scaling", "none"]
    assert evaluate(tmp_path / "alone" / "final", few, out, *more) == 0
    figures = json.loads((out / "report.json").read_text())
    assert figures["main"] == "adapter"
    assert figures["scaling"] is None
    assert "bag_of_words" not in figures["systems"]  # nothing to fit it on
    assert not (tmp_path / "alone" / "final" / "scaling.json").exists()
    assert "README.md gets no figures" in capsys.readouterr().out
    assert (tmp_path / "alone" / "final" / "README.md").read_text().endswith("By hand.\n")


def test_the_figures_are_those_of_other_libraries(report):
    _, figures, lines = report
    assert len(figures["systems"]) == 7
    for name, part in figures["sets"].items():
        chosen = [line for line in lines if name in (line["set"], "all")]
        correct = np.array([line["correct"] for line in chosen])
        assert part["num_samples"] == len(chosen)
        assert part["answer_accuracy"]["value"] == pytest.approx(correct.mean())
        for system, metrics in part["systems"].items():
            p = np.array([line["confidence"][system] for line in chosen])
            expected = {
                "auroc": roc_auc_score(correct, p),
                "brier": brier_score_loss(correct, p, pos_label=True),
                "nll": log_loss(correct, np.clip(p, 1e-15, 1 - 1e-15), labels=[False, True]),
                "calibration_error": calibration_error(p, correct, "2", 20),
            }
            for metric, value in expected.items():
                if system == "always_confident" and metric == "nll":
                    continue  # infinite; clipped by each library at a place of its own
                assert metrics[metric]["value"] == pytest.approx(value, abs=1e-9), (system, metric)
            inside = p.min() > 0 and p.max() < 1  # they differ in where 0 and 1 belong
            edges = np.isclose(p * 15, np.round(p * 15)).any()
            if inside and not edges:
                theirs = BinaryCalibrationError(n_bins=15, norm="l1")(
                    torch.tensor(p), torch.tensor(correct)
                )
                assert metrics["ece"]["value"] == pytest.approx(float(theirs), abs=1e-6)
                assert metrics["ece"]["value"] == pytest.approx(ECE(15).measure(p, correct))
            for figure in metrics.values():
                if figure["low"] is not None:
                    assert figure["low"] <= figure["high"]


def test_the_answers_judged_are_those_of_the_adapter(adapter, report):
    from confidence_model import ConfidenceModel

    _, _, lines = report
    model = ConfidenceModel.from_pretrained(adapter, max_seq_length=128)
    chosen = lines[::10]
    for line, answer in zip(chosen, model.answer(chosen, 16), strict=True):
        assert line["response"] == answer.text
        assert line["confidence"]["adapter"] == pytest.approx(answer.confidence, abs=1e-5)
        assert line["confidence"]["scaled"] == pytest.approx(answer.probability, abs=1e-5)
        judged = confidence.judge_answer(
            line["dataset"], line["response"], line["answer"], line.get("options")
        )
        assert line["correct"] is bool(judged.correct)


def test_the_model_card_has_the_same_figures_in_the_hubs_form(adapter, report):
    _, figures, _ = report
    card = ModelCard.load(f"{adapter}/README.md")
    metadata = yaml.safe_load(card.content.split("---")[1])
    [entry] = metadata["model-index"]
    found = {
        (result["dataset"]["type"], metric["type"]): metric["value"]
        for result in entry["results"]
        for metric in result["metrics"]
    }
    for name, part in figures["sets"].items():
        main_system = part["systems"][figures["main"]]
        assert found[name, "auroc_of_confidence"] == main_system["auroc"]["value"]
        assert found[name, "answer_accuracy"] == part["answer_accuracy"]["value"]
    assert "Load it with this folder's tokenizer" in card.content  # what was there stays


@pytest.mark.page
def test_a_model_without_adapter_is_reported_on_by_its_baselines(held_out, tmp_path):
    out = tmp_path / "out"
    code = command("evaluate", "--model_name", DEMO_MODEL, "--data", f"demo={held_out}", "--limit",
                   80, "--output_dir", out, "--max_new_tokens", 16, "--scaling", "temperature",
                   "--train_data", write_jsonl(tmp_path / "train.jsonl", TRAINED))  # fmt: skip
    assert code == 0
    figures = json.loads((out / "report.json").read_text())
    assert figures["systems"].keys() == {
        "scaled", "token_probability", "p_true", "bag_of_words", "base_rate", "always_confident"
    }  # fmt: skip
    assert all(part["b"] == 0 for part in figures["scaling"]["maps"].values())
    assert (out / "report.html").is_file()


def test_recorded_answers_are_scored_by_their_tags(adapter, tmp_path):
    records = [{k: v for k, v in r.items() if k != "answer"} for r in HELD_OUT[:40]]
    data = write_jsonl(tmp_path / "test.jsonl", records)
    assert evaluate(adapter, data, tmp_path / "out", "--scaling_share", 0) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    for line in lines:
        record = next(r for r in records if confidence.question_key(r) == line["key"])
        assert line["correct"] is ("<C_" in record["tagged_response"])
        assert record["tagged_response"].startswith(line["response"])


def test_a_domain_left_out_is_tested_by_what_never_saw_it(adapter, held_out, tmp_path, capsys):
    without = train(tmp_path, [r for r in TRAINED if r["dataset"] == "demo_medicine"])
    out = tmp_path / "out"
    more = ["--limit", 60, "--scaling_share", 0.5]
    assert evaluate(adapter, held_out, out, *more, "--without", f"READ={without}") == 0
    found = json.loads((out / "report.json").read_text())["leave_one_domain_out"]
    assert {"READ: scaling", "MED: scaling", "READ: bag_of_words", "READ: adapter"} <= found.keys()
    assert "its MED tags" in found["READ: adapter"]["description"]
    assert evaluate(adapter, held_out, out, "--without", f"MED={without}") == 2
    assert "of domain MED" in capsys.readouterr().err


def copy_of(adapter, folder):
    """A copy of an adapter's run; returns the adapter's folder."""
    shutil.copytree(Path(adapter).parent, folder / "run", ignore=shutil.ignore_patterns("scaling*"))
    return folder / "run" / "final"


def test_training_data_that_has_changed_tells_nothing_any_more(adapter, tmp_path, capsys):
    copy = copy_of(adapter, tmp_path)
    settings = tmp_path / "run" / "settings.yaml"
    saved = yaml.safe_load(settings.read_text())
    path = saved["train_data"]
    changed = write_jsonl(tmp_path / "changed.jsonl", TRAINED[:50])
    saved["resolved"]["content"][changed] = saved["resolved"]["content"][path]
    settings.write_text(yaml.safe_dump({**saved, "train_data": changed}))
    data = write_jsonl(tmp_path / "test.jsonl", TRAINED[50:])
    assert evaluate(copy, data, tmp_path / "out") == 2
    assert "is not what" in capsys.readouterr().err
    assert evaluate(copy, data, tmp_path / "out", "--assume_held_out") == 0


def test_the_scaling_beside_an_adapter_is_that_of_its_last_evaluation(adapter, tmp_path):
    copy, out = copy_of(adapter, tmp_path), tmp_path / "out"
    path = copy / "scaling.json"
    path.write_text('{"maps": {"MED": {"a": 0.2, "b": -1}, "MATH": {"a": 2, "b": 0}}}')
    data = write_jsonl(tmp_path / "test.jsonl", HELD_OUT[:120])
    assert evaluate(copy, data, out, "--limit", 30) == 0  # a try, which changes nothing
    assert json.loads(path.read_text())["maps"]["MED"] == {"a": 0.2, "b": -1}
    assert evaluate(copy, data, out) == 0
    maps = json.loads(path.read_text())["maps"]
    assert maps.keys() == {"MED", "READ", "MATH"}
    assert maps["MED"] != {"a": 0.2, "b": -1}
    assert maps["MATH"] == {"a": 2, "b": 0}
    assert evaluate(copy, data, out, "--scaling", "none") == 0
    assert json.loads(path.read_text())["maps"].keys() == {"MATH"}


def test_a_question_keeps_its_key_when_its_passage_is_shortened(adapter, tmp_path, capsys):
    long = [{**r, "context": "The room is empty. " * 60 + r["context"]}
            for r in HELD_OUT if r["dataset"] == "demo_reading"]  # fmt: skip
    data, out = write_jsonl(tmp_path / "test.jsonl", long[:20]), tmp_path / "out"
    assert evaluate(adapter, data, out, "--scaling", "none", "--limit", 20) == 0
    bigger = write_jsonl(tmp_path / "bigger.jsonl", [{**r, "correct": True} for r in long])
    assert command("route", out, "--bigger", bigger) == 0
    assert json.loads((out / "route.json").read_text())["num_pairs"] == 20
    assert "are left out" not in capsys.readouterr().out


def test_what_scaling_and_words_are_fitted_on_is_not_tested_on(adapter, tmp_path, capsys):
    data, out = write_jsonl(tmp_path / "test.jsonl", HELD_OUT[:60]), tmp_path / "out"
    seen = write_jsonl(tmp_path / "seen.jsonl", TRAINED)
    assert evaluate(adapter, data, out, "--limit", 60, "--scaling_data", f"s={seen}") == 2
    assert "--scaling_data s/demo_medicine: none of" in capsys.readouterr().err
    fit = write_jsonl(tmp_path / "fit.jsonl", HELD_OUT[40:140])
    more = ["--limit", 100, "--scaling_data", f"s={fit}", "--train_data", data]
    assert evaluate(adapter, data, out, *more) == 0
    figures = json.loads((out / "report.json").read_text())
    assert figures["scaling"]["num_samples"] == 100
    left_out = [entry["left_out"] for entry in figures["data"]]
    assert [part.get("asked before") for part in left_out] == [10, 10]
    # All records with which the words could be fitted are asked, or fitted on already
    assert "bag_of_words" not in figures["systems"]
    assert figures["training"]["records"] == len(TRAINED)


def test_too_few_answers_to_fit_anything_on_are_no_error(adapter, tmp_path):
    data, out = write_jsonl(tmp_path / "test.jsonl", HELD_OUT[:14]), tmp_path / "out"
    assert evaluate(adapter, data, out, "--limit", 14) == 0
    figures = json.loads((out / "report.json").read_text())
    assert figures["main"] == "adapter"
    assert "READ: scaling" not in figures["leave_one_domain_out"]


# ------------------------------------------------------------------------------------------------
# threshold and route, on scores made here


@pytest.fixture
def scores(report, tmp_path):
    """A report folder whose 800 answers are right as often as the confidence says."""
    _, figures, lines = report
    rng = np.random.default_rng(0)
    p = np.round(1 - rng.random(800) ** 2 * 0.9, 3)
    correct, bigger = rng.random(800) < p, rng.random(800) < 0.95
    made = []
    for i in range(800):
        line = {**lines[i % len(lines)], "question": f"question {i}", "correct": bool(correct[i])}
        line["confidence"] = {name: float(p[i]) for name in figures["systems"]}
        line["key"] = confidence.question_key(line)
        made.append(line)
    folder = tmp_path / "scores"
    folder.mkdir()
    write_jsonl(folder / "scores.jsonl", made)
    (folder / "report.json").write_text(json.dumps(figures))
    asked = [{**line, "correct": bool(right)} for line, right in zip(made, bigger)]
    names = ("question", "context", "options", "dataset", "correct")
    asked = [{k: line[k] for k in names if k in line} for line in asked]
    return folder, p, correct, bigger, write_jsonl(tmp_path / "bigger.jsonl", asked)


@pytest.mark.page
def test_a_threshold_for_a_precision_is_what_it_says(scores, capsys):
    folder, p, correct, _, _ = scores
    assert command("threshold", folder, "--target_precision", 0.9) == 0
    found = json.loads((folder / "threshold.json").read_text())
    accepted = p >= found["threshold"]
    assert found["num_accepted"] == accepted.sum()
    assert found["precision"]["value"] == pytest.approx(correct[accepted].mean())
    assert found["precision"]["low"] >= 0.9
    assert found["coverage"]["value"] == pytest.approx(accepted.mean())
    assert f"{accepted.mean():.1%} of the questions" in capsys.readouterr().out
    assert f"{found['threshold']:.2f}"[:4] in (folder / "report.html").read_text()


@pytest.mark.page
def test_a_precision_that_cannot_be_reached_is_told(scores, capsys):
    folder, *_ = scores
    assert command("threshold", folder, "--target_precision", 0.9999) == 1
    assert "cannot be reached" in capsys.readouterr().out
    found = json.loads((folder / "threshold.json").read_text())
    assert (found["reached"], found["threshold"]) == (False, None)
    assert "cannot be reached" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("flag", "value", "coverage"), [("--coverage", 0.75, 0.75),
                                                         ("--share_routed", 0.2, 0.8)])  # fmt: skip
def test_a_threshold_for_a_share_answers_that_share(flag, value, coverage, scores):
    folder, p, _, _, _ = scores
    assert command("threshold", folder, flag, value) == 0
    found = json.loads((folder / "threshold.json").read_text())
    assert (p >= found["threshold"]).mean() == pytest.approx(coverage, abs=0.01)
    assert found["coverage"]["low"] < coverage < found["coverage"]["high"]


@pytest.mark.page
def test_routing_asks_the_bigger_model_below_the_threshold(scores, capsys):
    folder, p, correct, bigger, path = scores
    assert command("threshold", folder, "--coverage", 0.7) == 0
    chosen = json.loads((folder / "threshold.json").read_text())["threshold"]
    assert command("route", folder, "--bigger", path, "--cost", 2, "--bigger_cost", 30) == 0
    found = json.loads((folder / "route.json").read_text())
    routed = p < chosen
    assert found["at_threshold"]["share_routed"] == pytest.approx(routed.mean())
    expected = np.where(routed, bigger, correct).mean()
    assert found["at_threshold"]["accuracy"] == pytest.approx(expected)
    assert found["at_threshold"]["cost"] == pytest.approx(2 + 30 * routed.mean())
    curves = found["curves"]
    assert curves["accuracy"][0] == curves["random"][0] == pytest.approx(correct.mean())
    assert curves["accuracy"][-1] == curves["perfect"][-1] == pytest.approx(bigger.mean())
    assert max(curves["perfect"]) == pytest.approx((correct | bigger).mean())
    assert "at the threshold" in capsys.readouterr().out
    assert (folder / "routing.png").is_file()


def test_a_new_threshold_is_marked_in_the_routing_too(scores):
    folder, *_, path = scores
    assert command("threshold", folder, "--coverage", 0.7) == 0
    assert command("route", folder, "--bigger", path) == 0
    assert command("threshold", folder, "--coverage", 0.2) == 0
    found = json.loads((folder / "route.json").read_text())
    assert found["at_threshold"]["share_routed"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("name", ["report.json", "scores.jsonl", "threshold.json", "route.json"])
def test_a_broken_report_is_told_in_a_sentence(name, scores, capsys):
    folder, *_, path = scores
    assert command("threshold", folder, "--coverage", 0.7) == 0
    (folder / name).write_text('{"main": "adapter", "systems": ')
    assert command("route", folder, "--bigger", path) == 2
    assert command("threshold", folder, "--coverage", 0.5) == 2
    said = capsys.readouterr().err
    assert "is no report" in said or f"{name}:1: not JSON" in said


def test_a_bigger_models_tagged_answers_are_paired_by_question(scores, tmp_path, capsys):
    folder, _, correct, bigger, path = scores
    tagged = []
    for line in map(json.loads, Path(path).read_text().splitlines()):
        domain = confidence.DATASETS[line["dataset"]].domain
        line["tagged_response"] = f"Yes. <{'C' if line.pop('correct') else 'U'}_{domain}>"
        tagged.append(line)
    half = write_jsonl(tmp_path / "half.jsonl", tagged[::-2])
    assert command("route", folder, "--bigger", half) == 0
    found = json.loads((folder / "route.json").read_text())
    assert found["num_pairs"] == 400
    assert found["bigger_accuracy"] == pytest.approx(bigger[1::2].mean())
    assert found["local_accuracy"] == pytest.approx(correct[1::2].mean())
    assert "400 of 800 questions are not in" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "reason"), [
    (["threshold", "{folder}", "--target_precision", "95"], "between 0 and 1"),
    (["threshold", "{folder}", "--coverage", "0.5", "--system", "magic"], "there are adapter"),
    (["threshold", "{folder}/nowhere", "--coverage", "0.5"], "is no report"),
    (["route", "{folder}", "--bigger", "{folder}/scores.jsonl", "--cost", "-1"], "0 or more"),
    (["route", "{folder}", "--bigger", "{folder}/gone"], "No such file"),
    (["route", "{folder}", "--bigger", "{data}"], "none of"),
    (["evaluate", "--data", "demo={data}"], "--adapter"),
    (["evaluate", "--adapter", "x", "--data", "{data}"], "NAME=PATH"),
    (["evaluate", "--adapter", "x", "--data", "demo={data}", "--limit", "0"], "at least 1"),
    (["evaluate", "--adapter", "x", "--data", "demo={data}"], "no adapter in x"),
    (["evaluate", "--adapter", "x", "--data", "demo={data}", "--scaling", "none",
      "--scaling_data", "more={data}"], "leave it out"),
    (["evaluate", "--adapter", "x", "--data", "demo={data}", "--scaling_share", "1"], "below 1"),
    (["evaluate", "--adapter", "x", "--data", "demo={data}", "--without", "X=y"], "DOMAIN=ADAPTER"),
    (["export", "{folder}", "--merged", "{folder}/out"], "no adapter in"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_a_sentence(words, reason, scores, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", tagged_records(4, seed=9))
    words = [word.format(folder=scores[0], data=data) for word in words]
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("report_confidence.py: error: ")
    assert reason in said


def test_exports_print_how_far_they_are_from_their_adapter(adapter, tmp_path, capsys):
    for way in ("--merged", "--rows-in-base"):
        assert command("export", adapter, way, tmp_path / way, "--max_new_tokens", 16) == 0
        said = capsys.readouterr().out
        assert "max |ΔP(C)|" in said
        assert float(said.split("max |ΔP(C)| ")[1].split()[0]) < 0.02


def test_help_answers_within_two_seconds():
    for words in (["--help"], ["evaluate", "--help"], ["export", "--help"]):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, ROOT / "report_confidence.py", *words], capture_output=True, check=True
        )
        assert time.perf_counter() - start < 2
        assert b"usage: report_confidence.py" in result.stdout
