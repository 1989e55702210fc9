"""The confidence report's page: what it shows, that it needs no network, that it fits a phone."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from reporting.page import interval, most_confident_mistakes, write_page
from reporting.statistics import accuracy_at_coverage, aurc
from train_confidence_lora import calibration_error, calibration_error_if_perfect

SYSTEMS = {
    "adapter": "P(C) of the adapter",
    "calibrated": "the adapter's P(C) after Platt scaling",
    "token_probability": "mean probability of the answer's own tokens",
    "p_true": "P(True) asked of the base model",
    "bag_of_words": "logistic regression on the words of question and answer",
    "base_rate": "the share of right answers in training, for every answer",
    "always_confident": "1 for every answer",
}
ATTACK = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
PASSAGE = (
    "The lymphatic system is a network of vessels and nodes that returns fluid to the blood; "
    "in some species – Ærenthia β, 淋巴系統 – it holds a second heart. "
)


def make_answers(name, domain, count, sharpness, rng):
    """Scored answers of one validation set, whose confidence knows about their being right."""
    correct = rng.random(count) < 0.7
    logit = sharpness * (2 * correct - 1) + rng.normal(0.4, 1.2, count)
    noise = rng.normal(0, 1, (3, count))

    def squash(x):
        return 1 / (1 + np.exp(-x))

    confidence = {
        "adapter": squash(1.6 * logit),
        "calibrated": squash(logit),
        "token_probability": squash(2.5 + 0.3 * logit + noise[0]),
        "p_true": squash(0.4 * logit + 1.2 * noise[1]),
        "bag_of_words": squash(0.8 * logit + 1.5 * noise[2]),
        "base_rate": np.full(count, 0.7),
        "always_confident": np.ones(count),
    }
    answers = []
    for i in range(count):
        answer = {
            "set": name,
            "dataset": f"demo_{name}",
            "domain": domain,
            "source": f"tagged/demo/demo_test.jsonl:{i + 1}",
            "response": "Yes." if domain == "READ" else "The answer is B, the lymph node.",
            "correct": bool(correct[i]),
            "emitted": "C" if confidence["adapter"][i] > 0.5 else "U",
            "confidence": {key: round(float(values[i]), 6) for key, values in confidence.items()},
        }
        if domain == "READ":
            answer["question"] = f"is the box №{i} without figs, as the passage says it may be"
            answer["context"] = PASSAGE * 6
            answer["answer"] = bool(correct[i])
        else:
            answer["question"] = f"Case {i}. {PASSAGE * 3}Which\u2028organ is it?"
            answer["options"] = {"A": "the spleen", "B": "a lymph node", "C": "the thymus"}
            answer["answer"] = "B" if correct[i] else "C"
        answers.append(answer)
    return answers


def around(value, width=0.02, lowest=0.0, **more):
    low, high = max(lowest, value - width), min(1.0, value + width)
    return {"value": value, "low": low, "high": high, **more}


def make_figures(answers):
    """Figures of a set as report.json holds them; the intervals are made up."""
    correct = np.array([answer["correct"] for answer in answers])
    systems = {}
    for system in SYSTEMS:
        confidence = np.array([answer["confidence"][system] for answer in answers])
        kept = {
            f"accuracy_at_{at}": around(accuracy_at_coverage(confidence, correct, at / 100))
            for at in (50, 80, 90)
        }
        systems[system] = {
            "auroc": around(roc_auc_score(correct, confidence)),
            "brier": around(brier_score_loss(correct, confidence), 0.01),
            "nll": around(min(1, log_loss(correct, confidence)), 0.01),
            "calibration_error": around(
                calibration_error(confidence, correct),
                0.01,
                if_perfect=calibration_error_if_perfect(confidence, draws=50),
            ),
            "ece": around(float(np.abs(confidence - correct).mean() / 10), 0.01),
            "aurc": around(aurc(confidence, correct)),
            "mean_confidence": around(float(confidence.mean()), 0.01),
            "accuracy": around(float(((confidence > 0.5) == correct).mean())),
            **kept,
        }
    return {
        "num_samples": len(answers),
        "answer_accuracy": around(float(correct.mean())),
        "rates": {"unparsed": around(0.01), "missing_tag": around(0.02)},
        "systems": systems,
    }


def make_route(rng):
    share = np.linspace(0, 1, 101)
    return {
        "system": "calibrated",
        "bigger": "tagged/bigger/bigger_test.jsonl",
        "num_pairs": 1100,
        "local_accuracy": 0.71,
        "bigger_accuracy": 0.98,
        "cost": 1,
        "bigger_cost": 10,
        "curves": {
            "share_routed": share.tolist(),
            "cost": (1 + 10 * share).tolist(),
            "accuracy": (0.71 + 0.27 * (1 - (1 - share) ** 3)).tolist(),
            "random": (0.71 + 0.27 * share).tolist(),
            "perfect": np.minimum(0.98, 0.71 + share).tolist(),
        },
        "at_threshold": {"share_routed": 0.3, "accuracy": 0.71 + 0.27 * 0.657, "cost": 4.0},
        "aurc": around(0.05),
        "accuracy_at_50": around(0.97),
    }


def make_report(folder):
    """A report's folder of the exact form that report_confidence.py writes."""
    rng = np.random.default_rng(0)
    reading = make_answers("reading", "READ", 600, 2.2, rng)
    medicine = make_answers("medicine", "MED", 500, 1.2, rng)
    surest = max(medicine, key=lambda a: (not a["correct"]) * a["confidence"]["calibrated"])
    surest["question"] = f"{ATTACK} & so on. {surest['question']}"
    answers = reading + medicine
    groups = {
        "reading": reading,
        "medicine": medicine,
        "all": answers,
        "all but reading": medicine,
    }
    sets = {name: make_figures(group) for name, group in groups.items()}
    sets["medicine"]["systems"]["base_rate"]["auroc"] = {"value": None, "low": None, "high": None}
    del sets["medicine"]["systems"]["always_confident"]["accuracy"]
    left_out = {"trained on": 3, "used to choose a checkpoint": 0, "kept for scaling": 97}
    report = {
        "title": "demo/model",
        "model_name": "demo/model",
        "adapter": "checkpoints/demo_lora/final",
        "kind": "lora",
        "created": "2026-11-21",
        "answers": "generate",
        "data": [
            {
                "set": name,
                "path": "tagged/demo/demo_test.jsonl",
                "records": len(groups[name]) + 100,
                "used": len(groups[name]),
                "left_out": left_out,
            }
            for name in ("reading", "medicine")
        ],
        "training": {
            "records": 4837,
            "right": 3421,
            "wrong": 1416,
            "train_data": "tagged/demo/demo_all_tagged.jsonl",
            "learning_rate": 0.001,
            "bf16": False,
            "warmup_ratio": None,
        },
        "versions": {"torch": "2.13.0", "transformers": "5.17.0"},
        "main": "calibrated",
        "systems": SYSTEMS,
        "sets": sets,
        "differences": {
            name: {
                system: {
                    "auroc": around(
                        sets[name]["systems"]["calibrated"]["auroc"]["value"]
                        - sets["all"]["systems"][system]["auroc"]["value"],
                        lowest=-1.0,
                    )
                }
                for system in SYSTEMS
                if system != "calibrated"
            }
            for name in sets
        },
        "leave_one_domain_out": {
            domain: {
                "description": "scaling fitted on the other domains",
                "metrics": {"auroc": around(0.95), "calibration_error": around(0.04, 0.01)},
            }
            for domain in ("READ", "MED")
        },
        "scaling": {
            "method": "platt",
            "num_samples": 300,
            "maps": {"READ": {"a": 1.1, "b": -0.2}, "MED": {"a": 0.8, "b": 0.1}},
            "nll_before": {"value": 0.31},
            "nll_after": around(0.28),
            "nll_change": around(-0.03),
        },
    }
    accepted = [a for a in answers if a["confidence"]["calibrated"] >= 0.83]
    threshold = {
        "system": "calibrated",
        "target_precision": 0.95,
        "reached": True,
        "threshold": 0.83,
        "precision": around(float(np.mean([a["correct"] for a in accepted])), 0.012),
        "coverage": around(len(accepted) / len(answers), 0.028),
        "num_samples": len(answers),
        "num_accepted": len(accepted),
        "level": 0.95,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report": report, "threshold": threshold, "route": make_route(rng)}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    (folder / "scores.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside <style>."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.style = tag == "style"

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        if not self.style:
            self.text += data


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = shutil.copytree(source, tmp_path_factory.mktemp("report") / "demo")
    assert write_page(folder) == folder / "report.html"
    return folder


@pytest.fixture
def draft(source, tmp_path):
    """A report of one's own to change, whose page is not yet written."""
    return shutil.copytree(source, tmp_path / "draft")


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def answers(folder):
    with (folder / "scores.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_pictures_are_whole_and_nothing_is_left_of_their_making(folder):
    panels = {"reliability": 2, "confidence": 2, "risk_coverage": 3, "routing": 2}
    for name, count in panels.items():
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert picture.width == count * 880
            assert np.asarray(picture.convert("L")).std() > 10
    assert not list(folder.glob(".*"))


def test_nothing_comes_from_elsewhere(html):
    page = Elements(html)
    for tag, attributes in page.found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#"), (tag, value)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_what_comes_from_data_is_escaped(html):
    assert "<script" not in html
    assert "<img" not in html
    assert ATTACK in Elements(html).text


def test_names_of_sets_and_systems_are_escaped_too(draft):
    report = json.loads((draft / "report.json").read_text())
    text = (draft / "scores.jsonl").read_text(encoding="utf-8")
    name = "'><b>$x_1$"
    report["sets"][name] = report["sets"].pop("reading")
    change(draft, "report.json", sets=report["sets"], title="<i>", training={"<u>": "<s>"})
    (draft / "scores.jsonl").write_text(text.replace('"reading"', f'"{name}"'), "utf-8")
    page = Elements(write_page(draft).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.found} & {"b", "i", "u", "s"}
    assert page.text.count(name) > 4  # in figures too


def test_parts_of_different_figures_have_different_names(html):
    names = [attributes["id"] for _, attributes in Elements(html).found if "id" in attributes]
    assert len(names) == len(set(names))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert used
    assert {a or b for a, b in used} <= set(names)


def test_every_figure_has_caption_and_label(html):
    found = Elements(html).found
    tags = [tag for tag, _ in found]
    assert tags.count("figure") == tags.count("figcaption") == 4
    labels = [attributes["aria-label"] for tag, attributes in found if tag == "svg"]
    assert len(labels) == len(set(labels)) == 9


def test_the_ten_most_confident_mistakes_are_shown_in_order(html, answers):
    wrong = [answer for answer in answers if not answer["correct"]]
    expected = sorted((a["confidence"]["calibrated"] for a in wrong), reverse=True)[:10]
    shown = re.findall(r'<div class="confidence">([\d.]+)</div>', html)
    assert shown == [f"{confidence:.3f}" for confidence in expected]
    mistakes = most_confident_mistakes(answers, "calibrated")
    for mistake in mistakes:
        assert f"{mistake['set']} · {mistake['source']}" in html
    medicine = next(mistake for mistake in mistakes if mistake["set"] == "medicine")
    assert medicine["truth"] == "C: the thymus"
    assert f"<dd>{medicine['truth']}</dd>" in html


def test_numbers_of_the_headline_and_the_decision(html, answers):
    text = " ".join(Elements(html).text.split())
    right = sum(answer["correct"] for answer in answers)
    assert (
        f"Of 1,100 held-out answers of demo/model, {right} ({right / 11:.1f} %) are right" in text
    )
    assert "Accept an answer whose confidence is at least 0.830" in text
    assert "asked for were at least 95.0 % right" in text
    assert "At the threshold, 30.0 % of the questions go to the bigger model" in text


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ({"value": 0.916, "low": 0.89, "high": 0.94}, "(0.89–0.94)"),
        ({"value": 0.987, "low": 0.978, "high": 0.995}, "(0.978–0.995)"),
        ({"value": 0.01, "low": -0.02, "high": 0.04}, "(−0.02 to 0.04)"),
        ({"value": 0.01, "low": -0.001, "high": 0.04}, "(0.00–0.04)"),
        ({"value": 0.9, "low": None, "high": None}, ""),
        ({"value": None, "low": None, "high": None}, ""),
        (None, ""),
    ],
)
def test_intervals(metric, text):
    assert interval(metric) == text


def test_null_metrics_are_dashes(html):
    table = html.split("<h3>medicine: 500 answers")[1].split("</table>")[0]
    row = table.split("base rate</th>")[1].split("</tr>")[0]
    assert row.startswith("<td>–</td>")
    others = html.split("<h3>medicine</h3>")[1].split("</table>")[0]
    assert others.split("always confident</th>")[1].split("</tr>")[0].endswith("<td>–</td>")
    assert "None" not in Elements(html).text.replace("<p>None.</p>", "")


def test_a_report_without_extras(draft):
    for name in ("threshold.json", "route.json"):
        (draft / name).unlink()
    report = json.loads((draft / "report.json").read_text())
    change(
        draft,
        "report.json",
        adapter=None,
        kind=None,
        training=None,
        scaling=None,
        leave_one_domain_out={},
        differences={},
        answers="recorded",
        sets={"reading": report["sets"]["reading"]},
    )
    lines = (draft / "scores.jsonl").read_text(encoding="utf-8").split("\n")[:600]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["answer"], row["context"], row["confidence"]["p_true"]
    (draft / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    text = Elements(write_page(draft).read_text(encoding="utf-8")).text
    assert "held-out answers (reading) of demo/model" in text
    assert "No threshold has been chosen." in text
    assert "Nothing is known about it." in text
    assert not (draft / "routing.png").exists()


def test_a_threshold_that_cannot_be_reached(draft):
    nothing = dict.fromkeys(["threshold", "precision", "coverage", "num_accepted"])
    change(draft, "threshold.json", reached=False, **nothing)
    change(draft, "route.json", at_threshold=None)
    assert "cannot be reached" in write_page(draft).read_text(encoding="utf-8")


def test_all_answers_right(draft):
    text = (draft / "scores.jsonl").read_text(encoding="utf-8")
    (draft / "scores.jsonl").write_text(text.replace('"correct": false', '"correct": true'))
    assert "Not one answer is wrong." in write_page(draft).read_text(encoding="utf-8")


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores\.jsonl|report\.json"):
        write_page(tmp_path)


# ------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    remedy = "apt-get install chromium; pip install playwright==1.65.2"
    playwright = pytest.importorskip("playwright.sync_api", reason=f"needs a browser: {remedy}")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip(f"needs a browser: {remedy}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, path, width, scheme="light", script=False):
    """The page at a width, and what it said on the console or asked of the network."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        offline=True,
        color_scheme=scheme,
        java_script_enabled=script,
    )
    page, heard = context.new_page(), []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(path.as_uri())
    assert heard.pop(0) == path.as_uri()
    return page, heard


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits(browser, folder, width):
    # The page's scripts stay off by its own policy; the test's own need the browser's to be on.
    page, heard = open_page(browser, folder / "report.html", width, script=True)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        """Array.from(document.querySelectorAll('body *'))
        .filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))"""
    ) == []  # fmt: skip
    assert page.evaluate(
        """Array.from(document.querySelectorAll('.grid .scroll'))
        .every(table => table.scrollWidth <= table.clientWidth)"""
    )
    boxes = [figure.bounding_box() for figure in page.locator("svg").all()]
    assert len(boxes) == 9
    assert min(box["width"] for box in boxes) > 300
    assert len({box["x"] for box in boxes}) == (2 if width == 1280 else 1)
    heights = page.evaluate(
        """Array.from(document.querySelectorAll('svg text')).map(
            text => Math.min(parseFloat(getComputedStyle(text).fontSize)
                * text.getScreenCTM().a || Infinity, text.getBoundingClientRect().height))"""
    )
    assert min(heights) >= 8
    assert heard == []


@pytest.mark.parametrize("width", [390, 1280])
def test_texts_of_a_figure_do_not_overlap_and_are_not_cut(browser, folder, width):
    page, _ = open_page(browser, folder / "report.html", width, script=True)
    faults = page.evaluate(
        """Array.from(document.querySelectorAll('svg')).flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            const texts = Array.from(svg.querySelectorAll('text'));
            const boxes = texts.map(text => text.getBoundingClientRect());
            return texts.flatMap((text, i) => {
                const a = boxes[i], found = [];
                if (a.left < frame.left - 1 || a.right > frame.right + 1) found.push('cut');
                boxes.slice(i + 1).forEach((b, j) => {
                    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                    if (wide > 1 && high > 3) found.push('on ' + texts[i + 1 + j].textContent);
                });
                return found.map(fault => text.textContent + ': ' + fault);
            });
        })"""
    )
    assert faults == []


def test_it_works_without_scripts_and_in_the_dark(browser, folder):
    page, heard = open_page(browser, folder / "report.html", 390, scheme="dark")
    page.locator("summary").first.click()
    assert page.get_by_text("Tag accuracy").first.is_visible()
    dark = np.asarray(Image.open(write_shot(page, folder / "dark.png")).convert("L"))
    assert np.median(dark) < 60
    assert heard == []


def write_shot(page, path):
    page.screenshot(path=path)
    return path
