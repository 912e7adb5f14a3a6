"""Games of several turns: tic-tac-toe against an opponent of chosen skill, and Mastermind."""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import Counter

from skyrl.envs.base import register_environment
from skyrl.envs.single_turn import require
from skyrl.tasks.base import Tasks, TurnedTask
from skyrl.types import Message, Metrics, Prompt

LINES = ("012", "345", "678", "036", "147", "258", "048", "246")
DIGITS = re.compile(r"\d+", re.ASCII)


@register_environment("tic_tac_toe")
class TicTacToe(TurnedTask):
    """The model is X and writes the number of a free cell, 1 to 9; the last number of its text counts.

    skill: the part of the opponent's moves that are perfect; the others are drawn, by the seed of reset. opening: moves
    that are on the board at most when the model begins; each of these positions is a task. Reward, at the end: 1 for a
    win, `draw` for a draw, 0 for a loss. What is no free cell uses up a turn and is counted. env.max_turns: 5 are
    enough; a game that is not over then is lost.
    """

    in_process, files = True, False

    def __init__(self, *, skill: float = 0.0, draw: float = 0.5, opening: int = 2, max_turns: int = 8) -> None:
        super().__init__(max_turns)
        require(0.0 <= skill <= 1.0, "skill", skill, "0 to 1")
        require(0.0 <= draw <= 1.0, "draw", draw, "0 to 1")
        require(0 <= opening <= 6, "opening", opening, "0 to 6")
        self.skill, self.draw, self.opening = skill, draw, opening

    def made(self) -> Tasks:
        """One for each position."""
        boards = positions(self.opening)
        return [(f"You are X. Write a free cell, 1 to 9.\n{shown(board)}\n", {"board": board}) for board in boards]

    def reset(self, prompt: Prompt, seed: int = 0) -> list[Message]:
        """Sets the prompt's position up."""
        self.board, self.illegal, self.rng = str(prompt.extra["board"]), 0, random.Random(seed)
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """Puts an X, and the opponent's O."""
        found = DIGITS.findall(text)
        cell = int(found[-1]) - 1 if found and len(found[-1]) == 1 else -1
        if not (0 <= cell < 9 and self.board[cell] == "."):
            self.illegal += 1
            return f"not a free cell\n{shown(self.board)}\n"
        self.board = placed(self.board, cell, "X")
        if outcome(self.board) is not None:
            return None
        free = [index for index, sign in enumerate(self.board) if sign == "."]
        if self.rng.random() < self.skill:
            values = {index: value_of(placed(self.board, index, "O")) for index in free}
            free = [index for index in free if values[index] == min(values.values())]
        self.board = placed(self.board, self.rng.choice(free), "O")
        return None if outcome(self.board) is not None else f"{shown(self.board)}\n"

    def score(self) -> tuple[float, Metrics]:
        """Reward, and how the game has ended; correct is a win."""
        result = outcome(self.board)
        won, drawn = float(result == 1), float(result == 0)
        metrics = {"drawn:mean": drawn, "illegal_moves:mean": float(self.illegal), "correct:mean": won}
        return won + self.draw * drawn, metrics


def shown(board: str) -> str:
    """A board as three lines."""
    return "\n".join(board[row : row + 3] for row in (0, 3, 6))


def placed(board: str, cell: int, sign: str) -> str:
    """The board with a sign more."""
    return board[:cell] + sign + board[cell + 1 :]


def outcome(board: str) -> int | None:
    """1 when X has a line, -1 when O has one, 0 for a full board, None while the game goes on."""
    for sign, value in (("X", 1), ("O", -1)):
        if any(all(board[int(cell)] == sign for cell in line) for line in LINES):
            return value
    return None if "." in board else 0


@functools.cache
def value_of(board: str) -> int:
    """The outcome when both play perfectly from here; X is next when there are as many X as O."""
    result = outcome(board)
    if result is not None:
        return result
    sign = "X" if board.count("X") == board.count("O") else "O"
    values = [value_of(placed(board, cell, sign)) for cell in range(9) if board[cell] == "."]
    return max(values) if sign == "X" else min(values)


def positions(moves: int) -> list[str]:
    """Every board with X next, after at most so many moves of a game that goes on, in a fixed order."""
    found, latest = ["." * 9], {"." * 9}
    for number in range(moves):
        sign = "XO"[number % 2]
        latest = {placed(board, cell, sign) for board in latest for cell in range(9) if board[cell] == "."}
        latest = {board for board in latest if outcome(board) is None}
        found += sorted(latest) if sign == "O" else []
    return found


@register_environment("mastermind")
class Mastermind(TurnedTask):
    """The model guesses a code of digits; the answer is how many are in their place, and how many are elsewhere.

    length: digits of the code; symbols: the digits 1 to so many occur in it, 2 to 9. A guess is the last number of the
    text; one of another length or with other digits is answered "not a code" and uses up a turn. Reward, on the turn
    that finds it: discount^(turns used before it). The number of turns is env.max_turns.
    """

    in_process, files = True, False

    def __init__(self, *, length: int = 3, symbols: int = 4, discount: float = 1.0, max_turns: int = 8) -> None:
        super().__init__(max_turns)
        require(1 <= length <= 8, "length", length, "1 to 8")
        require(2 <= symbols <= 9, "symbols", symbols, "2 to 9")
        require(symbols**length <= 10**6, "length", length, f"fewer than a million codes of {symbols} symbols")
        require(0.0 < discount <= 1.0, "discount", discount, "above 0, at most 1 (no discount)")
        self.length, self.symbols, self.discount = length, symbols, discount

    def made(self) -> Tasks:
        """One for each code."""
        text = f"Guess my code of {self.length} digits from 1 to {self.symbols}.\n"
        codes = itertools.product("123456789"[: self.symbols], repeat=self.length)
        return [(text, {"code": "".join(code)}) for code in codes]

    def reset(self, prompt: Prompt) -> list[Message]:
        """Starts a game with the prompt's code."""
        self.found, self.malformed = False, 0
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """Answers one guess of the code."""
        code, found = str(self.prompt.extra["code"]), DIGITS.findall(text)
        guess = found[-1] if found else ""
        if len(guess) != self.length or not set(guess) <= set("123456789"[: self.symbols]):
            self.malformed += 1
            return "not a code\n"
        self.found = guess == code
        placed_right = sum(one == other for one, other in zip(guess, code, strict=True))
        elsewhere = sum((Counter(guess) & Counter(code)).values()) - placed_right
        return None if self.found else f"{placed_right} in place, {elsewhere} elsewhere\n"

    def score(self) -> tuple[float, Metrics]:
        """Reward, and how many guesses were none."""
        reward = self.discount ** (self.turns - 1) if self.found else 0.0
        return reward, {"malformed:mean": float(self.malformed), "correct:mean": float(self.found)}
