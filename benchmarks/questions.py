"""Forty short questions: which of those that the dense model answers right does a compressed model still answer?

    python benchmarks/questions.py DENSE COMPRESSED... [--quick] [--json FILE]

Facts, arithmetic, translation and instructions (questions.json), through the chat template, greedy, in float32. An
answer is right if it matches the question's regular expression, without regard to case.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import pgsvd_vllm.hf  # noqa: E402, F401  (registers the format)
from benchmarks.rows import write_rows  # noqa: E402
from pgsvd_vllm.offline.data.text import load_tokenizer  # noqa: E402

FILE = Path(__file__).with_name("questions.json")
NEW_TOKENS = 40
# Least share of the dense model's right answers that a compressed one keeps, in percent.
KEPT = 85.0
QUICK = 4  # every fourth question


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        kind: fact, arithmetic, translation or instruction.
        text: of the user's turn.
        answer: regular expression that right answers match.
    """

    kind: str
    text: str
    answer: str

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right."""
        return re.search(self.answer, answer, re.IGNORECASE | re.DOTALL) is not None


def questions(quick: bool = False) -> list[Question]:
    """All of them, or a quarter."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return [Question(row["kind"], row["question"], row["answer"]) for row in rows][:: QUICK if quick else 1]


@torch.inference_mode()
def answers(folder: Path, asked: list[Question]) -> list[str]:
    """A model's greedy answers, at most 40 tokens each."""
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [[{"role": "user", "content": question.text}] for question in asked]
    prompts = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None)
    texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def right(asked: list[Question], given: list[str]) -> int:
    """The number of right answers."""
    return sum(question.is_right(answer) for question, answer in zip(asked, given, strict=True))


def kept(asked: list[Question], dense: list[str], compressed: list[str]) -> tuple[int, int]:
    """(right answers that the compressed model keeps, right answers of the dense one)."""
    known = [(q, new) for q, old, new in zip(asked, dense, compressed, strict=True) if q.is_right(old)]
    return sum(question.is_right(new) for question, new in known), len(known)


def main() -> int:
    """Ask, print, write; the status is 0 where every compressed model keeps enough answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path, metavar="DENSE")
    parser.add_argument("compressed", type=Path, nargs="+", metavar="COMPRESSED")
    parser.add_argument("--quick", action="store_true", help="ten questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows {case, value, bar, ok}")
    arguments = parser.parse_args()
    asked = questions(arguments.quick)
    dense = answers(arguments.dense, asked)
    rows: list[dict[str, Any]] = [
        {"case": f"dense, right of {len(asked)}", "value": right(asked, dense), "bar": None, "ok": True},
    ]
    for folder in arguments.compressed:
        found = answers(folder, asked)
        for question, old, new in zip(asked, dense, found, strict=True):
            print(side_by_side(question, {"dense": old, folder.name: new}))
        same, known = kept(asked, dense, found)
        share = 100 * same / known if known else 0.0
        rows.append({"case": f"{folder.name}, kept in %", "value": share, "bar": KEPT, "ok": share >= KEPT})
    print()
    for row in rows:
        bar = "" if row["bar"] is None else f"  (bar: at least {row['bar']:.0f}){'' if row['ok'] else '  MISSED'}"
        print(f"{row['case']}: {row['value']:.4g}{bar}")
    write_rows(arguments.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


def side_by_side(question: Question, given: dict[str, str]) -> str:
    """A question with the answers of some models, and whether they are right."""
    lines = [f"\n{question.kind}: {question.text}"]
    for name, answer in given.items():
        lines.append(f"  {name} ({'right' if question.is_right(answer) else 'wrong'}): {_line(answer)}")
    return "\n".join(lines)


def _line(text: str) -> str:
    """An answer's beginning in one line."""
    return " ".join(text.split())[:100]


if __name__ == "__main__":
    sys.exit(main())
