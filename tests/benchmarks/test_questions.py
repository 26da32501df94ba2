"""The forty questions: what counts as a right answer, and as one that is kept."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.questions import Question, answers, kept, questions


def test_there_are_forty_different_questions() -> None:
    asked = questions()
    assert len({question.text for question in asked}) == len(asked) == 40
    assert Counter(question.kind for question in asked) == {
        **{"fact": 16, "arithmetic": 8, "translation": 6, "instruction": 10}
    }
    # A question must not hold its own answer, or an echo would be right.
    echoes = {question.text for question in asked if question.is_right(question.text)}
    assert echoes <= {
        "Is the sentence 'I love this film, it is wonderful' positive or negative?",
        "Which number is larger, 15 or 9? Answer with the number.",
    }


@pytest.mark.parametrize(
    ("beginning", "answer", "right"),
    [
        ("What is the capital of France?", "It is\nparis.", True),
        ("What is the capital of France?", "It is Parisian.", False),
        ("What is 7 + 5?", "7 + 5 = 12", True),
        ("What is 7 + 5?", "7 + 5 = 120", False),
        ("Which number is larger", "The larger one is 15, not 9.", True),
        ("Which number is larger", "9 is larger than 15.", False),
        ("Say only the word", "Banana!", True),
        ("Say only the word", "The word is banana.", False),
        ("Write the word 'hello'", "HELLO", True),
        ("Write the word 'hello'", "Hello", False),
        ("List the three primary", "1. yellow\n2. Blue\n3. red", True),
        ("List the three primary", "Red and blue", False),
    ],
)
def test_right_answers_are_told_from_wrong_ones(beginning: str, answer: str, right: bool) -> None:
    (question,) = [question for question in questions() if question.text.startswith(beginning)]
    assert question.is_right(answer) == right


def test_only_answers_that_dense_has_right_can_be_kept() -> None:
    asked = [Question("fact", str(i), "yes") for i in range(4)]
    assert kept(asked, ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]) == (1, 2)


@pytest.mark.slow
def test_a_real_model_answers_and_keeps_all_of_its_own(smollm2: Path) -> None:
    asked = questions()
    found = answers(smollm2, asked)
    right, known = kept(asked, found, found)
    assert right == known >= 20
    assert "Paris" in found[0]
