"""The pages about episodes: found, read turn by turn, and one prompt at two steps side by side."""

from __future__ import annotations

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from skyrl.dashboard.episodes import FLAGS, EpisodeSummary, Query, add_trained, summaries, turn_spans
from skyrl.dashboard.index import RunEntry
from skyrl.dashboard.series import board_of
from skyrl.web.http import HttpError, whole_number

PAGE_EPISODES = 50
MOST_DUMPS = 200  # the newest, of those that are searched together
COLOURS = ("logprob", "advantage", "gap", "none")
SHOWN_TOKENS = 20_000  # of one turn, token by token; a browser is slow beyond
SHOWN_CHARACTERS = 200_000


def episodes(request: Request) -> Response:
    """Episodes of one dumped step, or of all of them. Query: dump ("" = the newest, "all"), q, uid, flag, least, most,
    order, page."""
    board, given = board_of(request), request.query_params
    entry = board.entry(request)
    dumps = entry.run.dumps()
    dump = given.get("dump") or (dumps[-1] if dumps else "")
    if dump and dump not in (*dumps, "all"):
        raise HttpError(404, f"this run has no dumped step {dump[:60]!r}; there are {', '.join(dumps[-5:]) or 'none'}")
    text, uid, flag, order = (given.get(name, "") for name in ("q", "uid", "flag", "order"))
    query = Query(text, uid, flag, _number(given, "least"), _number(given, "most"), order)
    looked_at = dumps[: -MOST_DUMPS - 1 : -1] if dump == "all" else [dump] if dump else []
    found = query.pick([one for name in looked_at for one in summaries(entry.run, name)])
    at = whole_number(request, "page", 0)
    asked: dict[str, Any] = {"dumps": dumps, "dump": dump, "query": query, "flags": FLAGS}
    asked["rewards"] = [one.reward for one in found if not math.isnan(one.reward)]
    asked |= {"found": found[at * PAGE_EPISODES : (at + 1) * PAGE_EPISODES], "count": len(found), "at": at}
    return board.page(request, "rollouts.html", entry=entry, **asked, pages=-(-len(found) // PAGE_EPISODES))


def _number(given: Any, name: str) -> float | None:
    text = given.get(name, "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise HttpError(400, f"{name}={text[:40]!r}; give a number")
    return value


def episode(request: Request) -> Response:
    """One episode, turn by turn. Query: colour."""
    board = board_of(request)
    entry, path = board.entry(request), request.path_params
    dump, rank, start = path["dump"], path["rank"], path["start"]
    if dump not in entry.run.dumps():
        raise HttpError(404, f"this run has no dumped step {dump[:60]!r}; a resumed run drops those it plays again")
    listed = summaries(entry.run, dump)
    place = next((i for i, one in enumerate(listed) if (one.rank, one.start) == (rank, start)), None)
    if place is None:
        raise HttpError(404, "there is no such episode in this step any more")
    colour = request.query_params.get("colour", "logprob")
    colour = colour if colour in COLOURS else "logprob"
    shown = shown_episode(entry, listed[place], colour)
    others = [name for name in entry.run.dumps_with(shown["one"].uid) if name != dump]
    group = [one for one in listed if one.uid == shown["one"].uid]
    after = listed[place + 1] if place + 1 < len(listed) else None
    shown |= {"before": listed[place - 1] if place else None, "after": after, "group": group, "other_dumps": others}
    shown |= {"colour": colour, "colours": COLOURS, "flags": FLAGS}
    return board.page(request, "episode.html", entry=entry, **shown)


def shown_episode(entry: RunEntry, one: EpisodeSummary, colour: str) -> dict[str, Any]:
    """What the templates need of an episode: "one", the "episode" itself, its "turns" as spans."""
    found = entry.run.episode(one.dump, one.rank, one.start)
    if found is None:
        raise HttpError(404, "there is no such episode in this step any more")
    texts, turns, seen = entry.run.token_texts(), [], ""
    add_trained(found, entry.run.trained(one.dump))
    for turn in found["turns"]:
        context, text = str(turn["context_text"]), str(turn["text"])
        new = context[len(seen) :] if context.startswith(seen) else context
        many = len(turn.get("tokens") or ()) > SHOWN_TOKENS
        spans = turn_spans(turn, texts, "none" if many else colour)
        whole = len(spans) == 1
        if whole:
            spans[0].text = spans[0].text[:SHOWN_CHARACTERS]
        turns.append(
            {
                "given": new[-SHOWN_CHARACTERS:],
                "given_cut": max(0, len(new) - SHOWN_CHARACTERS),
                "spans": spans,
                "coloured": any(span.tone for span in spans),
                "cut": max(0, len(text) - SHOWN_CHARACTERS) if whole else 0,
                "turn": turn,
            }
        )
        seen = context + text
    return {"one": one, "episode": found, "turns": turns}


def pair(request: Request) -> Response:
    """The episodes of one prompt at two dumped steps, side by side. Query: uid, a, b (dumps), i, j (which episode)."""
    board, given = board_of(request), request.query_params
    entry, uid = board.entry(request), given.get("uid", "")
    having = entry.run.dumps_with(uid)
    if not having:
        raise HttpError(404, f"no dumped step of this run has the prompt {uid[:100]!r}")
    sides = []
    for name, default, which in (("a", having[0], "i"), ("b", having[-1], "j")):
        dump = given.get(name, "") if given.get(name) in having else default
        found = [one for one in summaries(entry.run, dump) if one.uid == uid]
        place = min(whole_number(request, which, 0), len(found) - 1)
        sides.append({"dump": dump, "found": found, "place": place, **shown_episode(entry, found[place], "logprob")})
    return board.page(request, "pair.html", entry=entry, uid=uid, having=having, sides=sides, flags=FLAGS)
