"""The talk that the demo plays: several conversations that begin with the same long instructions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

#: Tokens 0..3 of the demo's vocabulary have a meaning; the rest are words.
FIRST_WORD = 4


@dataclass
class Conversation:
    """What was said so far, as tokens. ``questions`` holds what the user says in each turn."""

    history: list[int]
    questions: list[list[int]]
    prompts: list[list[int]] = field(default_factory=list)

    def ask(self, turn: int) -> list[int]:
        """The prompt of ``turn`` (counted from 0): all that was said before, and the user's new words."""
        self.history = self.history + self.questions[turn]
        self.prompts.append(self.history)
        return self.history

    def answered(self, tokens: list[int]) -> None:
        """Adds the model's answer to what was said."""
        self.history = self.history + tokens


def make_conversations(
    count: int, turns: int, *, vocabulary: int, instructions: int = 512, document: int = 1000, question: int = 120
) -> list[Conversation]:
    """``count`` conversations of ``turns`` turns; the other numbers are lengths in tokens.

    All of them begin with the same instructions; the first turn of each brings a document of its own.
    """
    draw = random.Random(20260101)

    def words(n: int) -> list[int]:
        return [draw.randrange(FIRST_WORD, vocabulary) for _ in range(n)]

    shared = words(instructions)
    return [
        Conversation(shared, [words(document + question)] + [words(question) for _ in range(turns - 1)])
        for _ in range(count)
    ]
