"""Games: who wins, what is no move, and that the opponent is keyed by the seed of reset."""

import itertools

import pytest

from skyrl.tasks.games import outcome, placed, positions, value_of
from skyrl.types import UserError


def board_of(said):
    return "".join(line for line in said.splitlines() if len(line) == 3 and set(line) <= set("XO."))


def perfect(said):
    board = board_of(said)
    free = [cell for cell in range(9) if board[cell] == "."]
    return f"I take {max(free, key=lambda cell: value_of(placed(board, cell, 'X'))) + 1}."


def first_free(said):
    return str(board_of(said).index(".") + 1)


def test_a_perfect_player_never_loses_and_wins_against_chance(rows, play):
    prompts = rows("tic_tac_toe") + rows("tic_tac_toe", split="test")
    assert len(prompts) == len({p.extra["board"] for p in prompts}) == len(positions(2)) == 73
    fair = [p for p in prompts if value_of(p.extra["board"]) >= 0]
    chance = [play(p, perfect, max_turns=5, seed=i)[0] for i, p in enumerate(fair)]
    assert all(result.reward in (0.5, 1.0) for result in chance)
    assert sum(result.metrics["correct:mean"] for result in chance) > 0.8 * len(chance)
    empty = next(p for p in prompts if p.extra["board"] == "." * 9)
    result, _ = play(empty, perfect, max_turns=5, skill=1.0, draw=0.25)
    assert (result.reward, result.metrics["drawn:mean"], result.metrics["correct:mean"]) == (0.25, 1.0, 0.0)
    assert play(empty, first_free, max_turns=5, skill=1.0)[0].reward == 0.0


def test_the_seed_of_reset_alone_chooses_what_the_opponent_draws(rows, play):
    empty = next(p for p in rows("tic_tac_toe") + rows("tic_tac_toe", split="test") if p.extra["board"] == "." * 9)
    games = [tuple(play(empty, first_free, max_turns=5, seed=seed)[1]) for seed in (*range(8), *range(8))]
    assert games[:8] == games[8:] and len(set(games[:8])) > 3


@pytest.mark.parametrize("answer", ["", "no", "0", "10", "55", "-", "1.", "\u0661", "X"])
def test_what_is_no_free_cell_uses_up_a_turn(rows, play, answer):
    taken = next(p for p in rows("tic_tac_toe") if p.extra["board"][0] == "X")
    result, heard = play(taken, answer, answer)
    assert heard[1].startswith("not a free cell\n") and board_of(heard[1]) == taken.extra["board"]
    assert result.reward == 0.0 and result.metrics["illegal_moves:mean"] == 2.0


@pytest.mark.parametrize("opening", [0, 1])
def test_a_single_beginning_is_trained_on_and_held_out(rows, play, opening):
    train, test = (rows("tic_tac_toe", split=split, options={"opening": opening}) for split in ("train", "test"))
    assert [p.extra["board"] for p in (*train, *test)] == ["." * 9] * 2


def test_outcomes():
    assert [outcome(b) for b in ("XXX......", "O..O..O..", "XOXXOOOXX", "XOXOXOOX.")] == [1, -1, 0, None]
    assert value_of("." * 9) == 0 and value_of("XX.OO....") == 1


def test_mastermind(rows, play):
    prompts = rows("mastermind") + rows("mastermind", split="test")
    assert len({p.extra["code"] for p in prompts}) == 64
    prompt = next(p for p in prompts if p.extra["code"] == "112")
    result, heard = play(prompt, "121", "is it 3 or 434", "21", "115", "1 1 2", "112", discount=0.5)
    told = ["1 in place, 2 elsewhere\n", "0 in place, 0 elsewhere\n", *["not a code\n"] * 3]
    assert heard[1:] == told and result.reward == 0.5**5
    assert result.metrics == {"malformed:mean": 3.0, "correct:mean": 1.0}
    assert play(prompt, "111", "111")[0].reward == 0.0


def test_mastermind_is_won_by_ruling_out(rows, play):
    every = ["".join(code) for code in itertools.product("1234", repeat=3)]

    def told(guess, code):
        right = sum(map(str.__eq__, guess, code))
        return right, sum(min(guess.count(d), code.count(d)) for d in "1234") - right

    for prompt in rows("mastermind", split="test"):
        left = list(every)

        def player(said):
            nonlocal left
            if "in place" in said:
                answer = int(said.split()[0]), int(said.split()[3])
                left = [code for code in left[1:] if told(left[0], code) == answer]
            return left[0]

        assert play(prompt, player, max_turns=8)[0].reward == 1.0


@pytest.mark.parametrize(
    ("env", "options", "told"),
    [
        ("tic_tac_toe", {"skill": 1.5}, "env.options.skill=1.5"),
        ("tic_tac_toe", {"opening": 9}, "env.options.opening=9"),
        ("mastermind", {"symbols": 1}, "env.options.symbols=1"),
        ("mastermind", {"length": 8, "symbols": 9}, "env.options.length=8: wanted fewer than a million"),
    ],
)
def test_bad_options(rows, env, options, told):
    with pytest.raises(UserError, match=told):
        rows(env, options=options)
    with pytest.raises(UserError, match="makes its own prompts"):
        rows(env, {"prompt": "?"})
