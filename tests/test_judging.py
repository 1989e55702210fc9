import pytest

from train_confidence_lora import InputError, judge_answer

FOUR = {"A": "aspirin", "B": "vitamin D", "C": "lung cancer", "D": "cancer"}
FIVE = {letter: f"option {letter.lower()}{letter.lower()}" for letter in "ABCDE"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("**Yes**, it does.", "yes"),
        ("Yes\n\nAnswer (who): somebody", "yes"),
        ("False", "no"),
        ("True. The passage says so.", "yes"),
        ("Based on the passage, the answer is yes.", "yes"),
        ("No, at first sight. But the answer is yes.", "yes"),  # explicit over leading
        ("The answer is yes. On reflection the correct answer is: No", "no"),  # last over first
        ('Final answer: "No" (or Yes, depending on the reading)', "no"),
        ("So the answer is \\boxed{Yes}.", "yes"),
        ("The answer to the question is no because it ended.", "no"),
        ("The statement is false.", "no"),
        ("I think yes.", "yes"),
        ("Hmm. Yes, they are.", "yes"),
        ("No\n\nQuestion: another one?\n\nAnswer: Yes", "no"),  # talking to itself
        ("nothing happened yesterday", None),
        ("I do not know.", None),
        ("There is no evidence.", None),
        ("No information is given.", None),
        ("The answer is no longer clear.", None),
        ("It depends.", None),
        ("", None),
    ],
)
def test_yes_no(response, expected):
    assert judge_answer("boolq", response, None).extracted == expected


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ("B", FOUR, "B"),
        ("(C)", FOUR, "C"),
        ("(c)", FOUR, "C"),
        ("**D**", FOUR, "D"),
        ("B. vitamin D", FOUR, "B"),
        ("B) vitamin D", FOUR, "B"),
        ("A: aspirin", FOUR, "A"),
        ("The answer is B.", FOUR, "B"),
        ("The answer is (b).", FOUR, "B"),
        ("The best option is D because it is.", FOUR, "D"),
        ("A. No: the answer is C. Finally, the correct answer is: **E**", FIVE, "E"),
        ("Option C is correct.", FOUR, "C"),
        ("I would choose D.", FOUR, "D"),
        ("It follows that \\boxed{C}", FOUR, "C"),
        ("Let us see.\n\nC", FOUR, "C"),
        ("Among these, (B) fits.", FOUR, "B"),
        ("The answer is vitamin D.", FOUR, "B"),  # the option's text, not its letter D
        ("The patient has lung cancer.", FOUR, "C"),  # not D, whose text is inside C's
        ("It is aspirin.", FOUR, "A"),
        ("The answer is E", FOUR, None),  # no such option
        ("A patient with fever needs rest.", FIVE, None),  # an article
        ("The answer is A patient with fever.", FIVE, None),
        ("Vitamin D deficiency", FIVE, None),
        ("aspirin or vitamin D", FOUR, None),
        ("I don't know", FIVE, None),
        ("", FOUR, None),
    ],
)
def test_letter(response, options, expected):
    assert judge_answer("medqa", response, None, options).extracted == expected


@pytest.mark.parametrize(
    ("dataset", "response", "truth", "options", "correct"),
    [
        ("boolq", "Yes", True, None, True),
        ("boolq", "Yes", "no", None, False),
        ("boolq", "Perhaps", True, None, None),
        ("boolq", "Yes", None, None, None),
        ("medqa", "B", 9, FOUR, None),  # no answer could match it: not wrong, but not judged
        ("medqa", "B", True, FOUR, None),
        ("medqa", "B", "tea", FOUR, None),
        ("medqa", "C", "C", {"^": "x", "]": "y", "C": "z"}, True),
        ("medqa", "I do not know", "A", {"A": " ", "B": "x"}, None),
        ("medqa", "B", "B", FOUR, True),
        ("mmlu", "B", 1, FOUR, True),  # MMLU gives positions
        ("medqa", "B", "Vitamin D", FOUR, True),  # or the option's text
        ("medqa", "B", "C", FOUR, False),
        ("medqa", "E", "E", FIVE, True),
    ],
)
def test_correct_compares_with_every_form_of_the_truth(dataset, response, truth, options, correct):
    assert judge_answer(dataset, response, truth, options).correct is correct


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("3 + 4 = 7. The answer is $1,200.", "so #### 1200", True),
        ("#### 72", "72", True),
        ("The answer is 3.50 dollars", "3.5", True),
        ("The final answer is: **18** eggs. 5 are left over.", "18", True),
        ("The answer is -4", "4", False),
        ("12 - 5 = 7", "7", True),
        ("it is 3/4", "0.75", True),
        ("no idea", "1", None),
        ("5", "nan", False),
        ("5", "1e999999999", False),
        ("5", "Infinity/0", False),
        ("5", 10**30, False),
    ],
)
def test_number(response, truth, correct):
    assert judge_answer("gsm8k", response, truth).correct is correct


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("thus \\boxed{\\frac{1}{2}}", "\\boxed{\\dfrac12}", True),
        ("\\boxed{1}. No: \\boxed{2}", "2", True),
        ("\\boxed{\\text{(A)}}", "(A)", True),
        ("\\boxed{x=-\\frac34}", "-\\frac{3}{4}", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})", True),
        ("\\boxed{90^\\circ}", "90", True),
        ("\\boxed{3\\sqrt2}", "3\\sqrt{2}", True),
        ("the answer is $5$", "5", True),
        ("\\boxed{4}", "5", False),
        ("\\boxed{nan}", "NaN", False),
        ("\\boxed{1e999999/1e-999999}", "inf", False),
        ("\\boxed{5", "5", None),  # cut off
        ("five", "5", None),
    ],
)
def test_boxed(response, truth, correct):
    assert judge_answer("math", response, truth).correct is correct


def test_unknown_dataset_is_named():
    with pytest.raises(InputError, match="squad"):
        judge_answer("squad", "Yes", True)
