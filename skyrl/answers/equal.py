"""Whether two final answers are the same: numbers, expressions, tuples, sets, intervals, matrices, units, words.

A text becomes a tree (`read`), whose leaves are expressions of parse.py or words; trees are compared part by part.
Rational numbers are compared exactly. Other expressions are computed with 2048 bits at fixed odd values of their
variables, of both signs, and are equal when they agree to 1280 bits: no text of 256 characters comes that close to a
root or to pi without being it. Every step is bounded by the length of the text, so untrusted text costs milliseconds.
math-verify was tried in its place on the pairs of the tests: right on 445 of 519, 70 times slower, no bound on time.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from skyrl.answers.parse import (
    FUNCTIONS,
    MAX_CHARACTERS,
    NAMES,
    ExpressionError,
    Node,
    agree,
    evaluate,
    mp,
    names_of,
    parse,
    spell,
)

MAX_ITEMS = 64
MAX_LEVELS = 12
MAX_WRAPPERS = 8
_PARTS = ("word", "row", "bag", "unit")  # no expressions

_CURRENCY = "\u20ac\u00a3\u00a5\u20b9"  # besides the dollar
_PLAIN = set("0123456789+-,.$%\\ \u2212" + _CURRENCY)
_NUMBER = re.compile(
    rf"(?P<sign>[-+\u2212]?)\s?\\?[${_CURRENCY}]?\s?(?P<again>[-\u2212]?)\s?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)\s?\\?%?\.?"
)
_WRAPPERS = [
    re.compile(pattern + r"[.,;:]?", re.S)
    for pattern in (r"\$\$(?P<x>[^$]+)\$\$", r"\$(?P<x>[^$]+)\$", r"\\\((?P<x>.+)\\\)", r"\\\[(?P<x>.+)\\\]")
    + (r"\*\*(?P<x>[^*]+)\*\*", r"__(?P<x>[^_]+)__", r"\*(?P<x>[^*]+)\*", r"`+(?P<x>[^`]+)`+", r'"(?P<x>[^"]+)"')
    + (r"'(?P<x>[^']+)'",)
]
_SAYS = r"(?:the\s+)?(?:(?:final|correct)\s+)?answer\s*(?:is\b|[:=])\s*"
_LABEL = re.compile(rf"(?:\\text\{{{_SAYS}\}}|\*\*{_SAYS}\*\*|{_SAYS})\s*(?=\S)", re.I)

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BOLD = re.compile(r"\\(?:math|text)bf(?=\{.*\\)", re.S)  # around an expression; of a letter it marks a choice
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3001: ",", 0x3002: "."}  # of Chinese typography
_WIDE |= dict.fromkeys((0x201C, 0x201D), '"') | dict.fromkeys((0x2018, 0x2019), "'") | {0xBA: "\u00b0"}
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])(?:[).:]|\Z))[\s.:]*(?!.*\b[A-J]\b)", re.S
)

# ---- from text to a tree

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])(?![^(\[\u2983]*[)\]\u2984])")  # in no brackets


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction, or as a whole number."""
    whole, once, again = match["whole"] or "0", match["once"], re.sub(r"\D", "", match["again"])
    value = Fraction(int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)


_DOT = r"\\dot\s?(?:\{\d{1,16}\}|\d)"
_AGAIN = rf"\\(?:overline|bar)\s?(?:\{{\d{{1,16}}\}}|\d)|{_DOT}(?:\d{{0,16}}{_DOT})?|\(\d{{1,16}}\)(?![\d^(])"
_ENDS = r"[^\[\]()]+[,;][^\[\]()]+"  # of an interval
_SETTING = (  # what LaTeX shows nothing for, or only sets off
    r"\\(?:bf|rm|it|sf|textstyle|large|Large|checkmark)\b|\\(?:text)?color\{\w+\}|\\(?:angle|triangle)\s?(?=[A-Z])",
    r"\\[hv]?(?:space|phantom)\*?\s?\{[^{}]*\}|\\(?:left|right)\s?\.|(?<!\\)\{\}(?=\s?\^)|:(?==)",
    r"\\(?:begin|end)\{(?:aligned|align|equation|gathered)\*?\}|&(?=\s?=)|\A\s*\\(?:therefore|Rightarrow|implies)\b",
)
_REWRITES: list[tuple[re.Pattern[str], Any]] = [  # before spelling, which would lose it
    (re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;: ])(?=\d{3}(?!\d))"), ""),  # LaTeX's thousands
    (re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])"), lambda m: m[0].replace(" ", "")),
    (re.compile(rf"(?P<whole>\d*)\.(?P<once>\d*)(?P<again>{_AGAIN})"), _repeating),
    (re.compile(r"(?<![A-Za-z])\{([:.;])\}"), r"\1"),
    (re.compile(r"\{([^{}]+)\\choose\b([^{}]+)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\(?:text)?cents?(?![A-Za-z])"), "\u00a2"),
    # ]0,1[ as (0,1), and [0,1[ as [0,1): brackets that open outwards leave the end out.
    (re.compile(rf"(?:\A|(?<=[=,;\s\u222a\u2208])|(?<=\\in)|(?<=\\cup)|(?<=\\left))\]({_ENDS})(?=[\[\])])"), r"(\1"),
    (re.compile(rf"([(\[])({_ENDS})\[(?=\Z|[\s,;.=\u222a]|\\cup)"), r"\1\2)"),
    (re.compile(r"(?<=\d)\s?\^\s?\{?(?:\\(?:text|mathrm)\{o\}|o)(?:\}|\b)"), "\u00b0"),
    (re.compile("|".join(_SETTING)), " "),
    (re.compile(r"(?<=\d)\s?(?:\^\s?)?\{?(?:\\text\{)?(?:st|nd|rd|th)\b\}{0,2}"), ""),
    (re.compile(r"\b(sq|cu)\."), r"\1"),
    (re.compile(r"\\(?:mathbf|boldsymbol|vec|hat)(?:\s?\{([a-z])\}|\s([a-z])\b)"), r"\1\2"),
    (re.compile(r"\\\{\s*[a-z]\s*(?:\\in\s?\\mathbb\s?\{?R\}?\s*)?(?:\\mid\b|[:|])(?=[^:|]*[<>]|.*\\[lg])"), r"\\{"),
    (
        re.compile(
            r"\\(?:overline|overrightarrow|overleftrightarrow|vec)\s?\{([A-Z]{2,4})\}|\\underline\s?\{([^{}]*)\}"
        ),
        r"\1\2",
    ),
    (re.compile(r"\\mathbb\s?\{?R(?:\}|\b)|\u211d"), r"(-\\infty,\\infty)"),
    (re.compile(r"\A(?:\\text\{)?(?:the set of )?all real(?: number)?s\.?\}?\Z", re.I), r"(-\\infty,\\infty)"),
    (re.compile(r"\\\\(?:\[\w*\])?"), "\u23ce"),
    (re.compile(r"\\begin\{(?:(?:small|[pbB])?matrix|array)\}(?:\{[clr|]*\})?"), "\u27e6"),
    (re.compile(r"\\end\{(?:(?:small|[pbB])?matrix|array)\}"), "\u27e7"),
    (re.compile(r"\\[()\[\]]|(?<!\*)\*\*(?=\S[^*]*\S\*\*)|(?<=\S)\*\*(?=[^\w(\\-]|$)"), " "),
    (re.compile(r"\\(?:text|mbox|hbox|text(?:bf|it|rm|normal)|math(?:rm|bf|it|sf)|operatorname)\s*\{"), r"\\text{"),
    (re.compile(r"\\text\{\s*(and|or)\s*\}"), r" \1 "),
    (re.compile(r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}"), r"\\text{\1/\2}"),
    (re.compile(r"\\\{"), "\u2983"),
    (re.compile(r"\\\}"), "\u2984"),
    (re.compile(r"\\?\$"), "\uff04"),
    (re.compile(r"<="), "\u2264"),
    (re.compile(r">="), "\u2265"),
    (re.compile(r"\+/-"), "\u00b1"),
    (re.compile(r"(?<![\d./])(\d+)(?:\s+and)?\s+(\d+)\s?/\s?(\d+)(?![\d./])"), r"\1\\frac{\2}{\3}"),  # 3 1/2
]
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\u2983": "\u2984", "\u27e6": "\u27e7"}
_NAME = re.compile(
    r"(?!\\?(?:pi|frac|sqrt|binom)(?![a-z]))\\?[A-Za-z]\w*(?:_\{?\w+\}?)?'?\s?(?:\((?:[A-Za-z, ]*|[A-Z]=\d+|-?\d+)\))?|"
    r"\\text\{[^{}]*\}|[A-Za-z ]+|\([A-Za-z, ]*\)"
)
_OPENING, _PAIRS = set(_BRACKETS) - {"{"}, "".join(a + b for a, b in _BRACKETS.items())
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*(?:[\d,;]|\b(?:and|or)\b)[^{}]*)\}|\{(.*)\}", re.S)
_TAIL = re.compile(
    r"(?:\s*\\text\{(?P<text>[^{}]+)\}|\s*(?P<sign>[\u00b0%\u00a2\uff04" + _CURRENCY + r"])|"
    r"(?P<space>\s*)(?<![^\W\d_])(?P<word>[^\W\d_]+(?:/[^\W\d_]+)?))"
    r"(?:\s?\^\s?\{?(?P<power>-?\d)\}?)?"
)
_ANGLE = re.compile(r"(?<!arc)(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # of what degrees are taken
_ALIASES = dict(
    pair.split(":")
    for pair in (
        "mm:millimeter cm:centimeter m:meter km:kilometer in:inch inche:inch ft:foot feet:foot yd:yard mi:mile g:gram "
        "mg:milligram kg:kilogram lb:pound oz:ounce l:liter ml:milliliter s:second sec:second min:minute "
        "h:hour hr:hour mph:mile/hour deg:degree \u00b0:degree %:percent \uff04:dollar usd:dollar \u20ac:euro "
        "\u00a3:pound \u00a5:yen \u20b9:rupee \u00a2:cent"
    ).split()
)


def parse_number(text: str) -> Fraction | None:
    """The value of one written number, or None when `text` is anything else, a calculation for example.

    Understood: a sign, decimals (".5", "3."), thousands commas, a currency sign, a final full stop; a per cent sign is
    a unit ("50%" is 50, as in GSM8K's answers). ASCII digits, at most 64 characters.
    """
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= 64 and not (set(text) - _PLAIN) else None
    if match is None or (match["sign"] and match["again"]):
        return None
    value = Fraction(match["digits"].replace(",", ""))
    return -value if match["sign"] in ("-", "\u2212") or match["again"] else value


def unwrap(text: str) -> str:
    """The text without what only sets it off: dollar signs of LaTeX, \\boxed{}, bold, quotes, "The answer is"."""
    for _ in range(MAX_WRAPPERS):
        before = text = text.strip()
        match = next((m for pattern in _WRAPPERS if (m := pattern.fullmatch(text))), None)
        if match is not None:
            text = match["x"]
        elif (box := BOX.match(text) or _BOLD.match(text)) and closing(text, box.end()) == len(text.rstrip(".")) - 1:
            text = text.rstrip(".")[box.end() + 1 : -1]
        elif mark := next((m for m in ("\\$", "$", "**", "`") if text.endswith(m) and text.count(m) == 1), ""):
            text = text.removesuffix(mark)
        else:
            text = text[label.end() :] if (label := _LABEL.match(text)) else text
        if text == before:
            break
    return text


def closing(text: str, start: int, pairs: str = "{}") -> int:
    """The place of what closes the bracket at `start`, escaped ones left aside; -1 when nothing does."""
    depth = 0
    for match in re.compile(r"\\[{}]|[" + re.escape(pairs) + "]").finditer(text, start):
        depth += 0 if len(match[0]) > 1 else 1 if match[0] in pairs[::2] else -1
        if depth == 0:
            return match.start()
    return -1


@functools.lru_cache(maxsize=4096)
def read(text: str, thousands: bool = True) -> Node:
    """The tree of an answer. Inner nodes: "row" (ordered; value: brackets or relations), "bag" (a set, or a list
    without brackets: in any order) and "unit" (value: its name); leaves: expressions and "word". Never raises."""
    text = unwrap(text)
    if len(text) > MAX_CHARACTERS:
        return _words(text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if thousands:
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    try:
        return _list(spell(text), 0)
    except ExpressionError:
        return _words(spell(text))


def _words(text: str) -> Node:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if re.search(r"[\\^_=]", text):  # LaTeX that is not understood: spaces mean nothing, capitals do
        return Node("word", re.sub(r"\{(\w)\}", r"\1", "".join(text.split())))
    return Node("word", " ".join(text.split()).strip(" .!'\"").casefold())


def _split(text: str, pattern: str) -> tuple[list[str], list[str]]:
    """The parts of a text between matches of the pattern that stand outside of all brackets, and these matches.
    Raises ExpressionError above 64 parts."""
    parts, cuts, depth, start = [], [], 0, 0
    for match in re.finditer(pattern + r"|[(\[{\u2983\u27e6]|[)\]}\u2984\u27e7]", text):
        if match[0] in _BRACKETS:
            depth += 1
        elif match[0] in _BRACKETS.values():
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            cuts.append(match[0])
            start = match.end()
    if len(cuts) >= MAX_ITEMS:
        raise ExpressionError(f"more than {MAX_ITEMS} parts")
    return [*parts, text[start:].strip()], cuts


def _list(text: str, level: int) -> Node:
    parts = [part for part in _split(text, r"[,;]|\b(?:and|or)\b")[0] if part]
    parts = [
        part.replace("\u00b1", first).replace("\u2213", second)
        for part in parts
        for first, second in (("+-", "-+") if re.search("[\u00b1\u2213]", part) else ("  ",))
    ]
    items = tuple(_item(part, level) for part in parts)
    return items[0] if len(items) == 1 else Node("bag", ",", items)


def _item(text: str, level: int) -> Node:
    if level > MAX_LEVELS:
        raise ExpressionError(f"nested deeper than {MAX_LEVELS}")
    text = text.strip().lstrip("=\u2248: ")
    if (match := _WHOLE_TEXT.fullmatch(text)) and closing(text, text.index("{")) == len(text) - 1:
        return _list(match[1] or match[2] or "", level + 1)
    sides, relations = _split(text, "[=<>\u2264\u2265\u2260\u2208\u2248]")
    if relations and all(sides):
        kinds = "".join(relations)
        if not set(kinds) - set(">\u2265"):
            sides, kinds = sides[::-1], kinds[::-1].replace(">", "<").replace("\u2265", "\u2264")
        if kinds == "=" and re.fullmatch("[A-Za-z]", sides[1]) and not _NAME.fullmatch(sides[0]):
            sides = sides[::-1]  # 5=x
        nodes = tuple(_item(side, level + 1) for side in sides)
        if not set(kinds) - set("=\u2208\u2248") and _NAME.fullmatch(sides[0]):
            chain = Node("row", kinds[1:], nodes[1:])  # of x=6/2=3, or x=2\\sqrt2≈2.83
            nodes, kinds = (nodes[0], chain if len(nodes) > 2 and _results(chain) else nodes[-1]), "named"
        return Node("row", kinds, nodes)
    for separator, op in (("\u222a", "bag"), (":", "row")):
        parts, cuts = _split(text, separator)
        if cuts and all(parts):
            return Node(op, separator, tuple(_item(part, level + 1) for part in parts))
    text = text.rstrip(". ")
    if "\u00b0" in text and _ANGLE.search(text):
        text = text.replace("\u00b0", r"(\pi/180)")
    if text[:1] in _OPENING and closing(text, 0, _PAIRS) == len(text) - 1:
        return _in_brackets(text, level)
    core, unit = _without_unit(text)
    node = _expression(core)
    return Node("unit", unit, (node,)) if unit and node.op != "word" else _expression(text) if unit else node


def _in_brackets(text: str, level: int) -> Node:
    inner, brackets = text[1:-1].strip(), text[0] + text[-1]
    if text[0] == "\u27e6":
        rows = [_split(row, "&")[0] for row in _split(inner, "\u23ce")[0] if row]
        return Node("row", "matrix", tuple(Node("row", "&", tuple(_item(x, level + 1) for x in row)) for row in rows))
    parts = [part for part in _split(inner, "[,;]")[0] if part]
    if brackets == "\u2983\u2984":
        return _list(inner, level + 1)
    if len(parts) == 1 and inner[0] == "\u27e6":
        return _item(inner, level + 1)
    if len(parts) == 1 and text[0] == "[":
        return _item(inner, level + 1)
    if len(parts) > 1:
        return Node("row", brackets, tuple(_item(part, level + 1) for part in parts))
    return _expression(text)


def _expression(text: str) -> Node:
    marked = False
    while match := re.fullmatch(r"\s*\\text\{([^{}]*)\}[.)]?\s*", text):
        text, marked = match[1].strip(), True
    if (letter := _LETTER.fullmatch(text)) and (marked or len(text) > 1):
        return Node("word", letter[1].casefold())  # a choice: (B)
    short = len(text) == 2 and set(text) <= set("abcxyzmnkpqrt") or set(text) <= set("xyz")
    if _WORD.fullmatch(text) and text not in ("pi",) and not short:
        return _words(text)
    try:
        return parse(text)
    except ExpressionError:
        return _words(text)


def _without_unit(text: str) -> tuple[str, str]:
    """The text without the unit behind it, or the currency before it, and that unit's name; "" without one."""
    units: list[str] = []
    if currency := re.match(rf"([-+]?)\s?([\uff04{_CURRENCY}])\s?(?=[-\d.])", text):
        text, units = currency[1] + text[currency.end() :], [currency[2]]
    while True:
        text = text.rstrip()
        match = next((m for m in _TAIL.finditer(text) if m.end() == len(text)), None)
        core = text[: match.start()] if match else ""
        if match is None or not core.strip() or not re.search(r"\d|\\", core):
            break
        word, known = match["word"] or "", (match["word"] or "").casefold() in _ALIASES
        glued = match["space"] == "" and (not known or len(word) < 2)
        if word in FUNCTIONS | NAMES or core.endswith("\\"):
            break
        if word and core[-1] != "\u00b0" and (glued or (len(word) == 1 and not known)):
            break
        units.insert(0, (match["text"] or match["sign"] or word) + (f"^{match['power']}" if match["power"] else ""))
        text = core
    return text, _unit(" ".join(units))


def _unit(words: str) -> str:
    words = re.sub(r"\bper\b", "/", words.strip().casefold())
    words = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", words)
    words = re.sub(r"\b(?:cubic|cu\.?)\s+(\w+)", r"\1^3", words)
    words = re.sub(r"(?<=\w\w)(?<!s)s\b", "", words.replace("metre", "meter"))
    return "".join(_ALIASES.get(word, word) for word in re.findall(r"[^\W\d_]+|\S", words))


# ---- comparing trees


def answers_equal(given: str, wanted: str) -> bool:
    """Whether two final answers are the same.

    Where `wanted` is a number, `given` must be worked out: a number, a mixed one, one times a power of ten, a fraction
    (where `wanted` is not whole), or an expression with roots or functions of that value; "9*2" is not 18, and "10^6"
    is not 1000000. Otherwise expressions count by their value. A unit that only one of them has is passed over; so are
    a name that only one has ("x=5"), and the letter case of words. Text of more than 256 characters is compared as
    words.
    """
    given, wanted = given.strip().translate(_WIDE), wanted.strip().translate(_WIDE)
    if given == wanted:
        return given != ""
    value, target = parse_number(given), parse_number(wanted)
    if value is not None and target is not None:
        marks = {mark for text in (given, wanted) for mark in "$%" + _CURRENCY if mark in text}
        return value == target and len(marks) < 2
    chosen, letter = _choice(given), _choice(wanted)
    if chosen and letter and not (chosen[1] and letter[1]):  # one of them says what the choice stands for
        return chosen[0] == letter[0]
    return _same(given, wanted)


def _choice(text: str) -> tuple[str, str] | None:
    """The letter that "(B) 5", "B. 5", "\\textbf{(B)}" or "option B" chooses, and what is said of it."""
    if len(text) > MAX_CHARACTERS or not text.isascii():
        return None
    text = re.sub(r"\\(?:text\w*|math\w*|mbox)\s?\{([^{}]*)\}", r"\1", unwrap(text))
    text = re.sub(r"\\[,;:! ]|\\q?quad|[~$]", " ", text).strip()
    match = _CHOICE.match(text)
    return (match[1] or match[2], text[match.end() :]) if match else None


@functools.lru_cache(maxsize=4096)
def _same(given: str, wanted: str) -> bool:
    a, b = read(given), read(wanted)
    if _match(a, b):
        return True
    # "100,200" is a number on its own, and a list beside one; "1,000" stays a number.
    if (a.op == "bag") != (b.op == "bag") and not re.search(r",0\d\d", given + wanted):
        return _match(read(given, False), read(wanted, False))
    return False


def _match(given: Node, wanted: Node) -> bool:
    if given == wanted:
        return True
    equations = [node for node in (given, wanted) if node.value in ("named", "=") and len(node.args) == 2]
    if len(equations) == 2 and given.op == wanted.op == "row":
        if all(map(_match, given.args, wanted.args)) or all(map(_match, given.args[::-1], wanted.args)):
            return True
        return _same_equation(given, wanted)
    if (given.value == "named") != (wanted.value == "named"):
        given, wanted = (node.args[-1] if node.value == "named" else node for node in (given, wanted))
        return _match(given, wanted)
    ours, theirs = _results(given), _results(wanted)
    if bool(ours) != bool(theirs):
        return any(_match(a, b) for a in ours or [given] for b in theirs or [wanted])
    if "unit" in (given.op, wanted.op):
        units = {node.value for node in (given, wanted) if node.op == "unit"}
        given, wanted = (node.args[0] if node.op == "unit" else node for node in (given, wanted))
        return len(units) == 1 and _match(given, wanted)
    if "word" in (given.op, wanted.op):
        words = str(given.value).casefold() == str(wanted.value).casefold()
        return words and {given.op, wanted.op} <= {"word", "name"}
    if not {given.op, wanted.op} & {"row", "bag"}:
        return _same_value(given, wanted)
    given, wanted = _union(given, wanted), _union(wanted, given)
    if str(given.value) == "()" or str(wanted.value) == "()":
        given, wanted = _point(given), _point(wanted)
    if "(" in str(given.value) + str(wanted.value) or "[" in str(given.value) + str(wanted.value):
        given, wanted = _interval(given), _interval(wanted)
    if (given.op, given.value, len(given.args)) != (wanted.op, wanted.value, len(wanted.args)):
        return False
    if given.op == "row":
        return all(map(_match, given.args, wanted.args))
    rest = list(wanted.args)
    for item in given.args:
        found = next((i for i, other in enumerate(rest) if _match(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _results(node: Node) -> list[Node]:
    """What an equation of numbers comes to: 7 of 3+4=7, both sides of 2\\sqrt{2}≈2.83. [] for a false one, and for
    anything else."""
    kinds = str(node.value)
    if node.op != "row" or set(kinds) - set("=\u2248") or any(names_of(x) or x.op in _PARTS for x in node.args):
        return []
    try:
        values = [mp().convert(evaluate(side, 0)) for side in node.args]
    except (ExpressionError, ArithmeticError, ValueError):
        return []
    pairs = zip(kinds, values, values[1:], strict=False)
    if not all(agree(a, b) if kind == "=" else abs(a - b) <= abs(a) / 50 for kind, a, b in pairs):
        return []
    return [node.args[-1], *([node.args[kinds.index("\u2248")]] if "\u2248" in kinds else [])]


def _union(node: Node, other: Node) -> Node:
    """x<0 or x>1 beside a union of intervals as one; anything else as it is."""
    if node.value != "," or other.value != "\u222a" or any(set(str(item.value)) - set("<\u2264") for item in node.args):
        return node
    return Node("bag", "\u222a", tuple(map(_interval, node.args)))


def _interval(node: Node) -> Node:
    """1 <= x < 2 as [1, 2), x > 5 as (5, infinity); anything else as it is."""
    kinds, sides, end = str(node.value), node.args, Node("name", "infty")
    if node.op != "row" or set(kinds) - set("<\u2264"):
        return node
    if len(sides) == 2 and sides[0].op == "name":
        kinds, sides = "<" + kinds, (Node("neg", None, (end,)), *sides)
    elif len(sides) == 2:
        kinds, sides = kinds + "<", (*sides, end)
    if len(sides) != 3 or sides[1].op != "name":
        return node
    return Node("row", ("(" if kinds[0] == "<" else "[") + (")" if kinds[1] == "<" else "]"), sides[::2])


def _point(node: Node) -> Node:
    """x=1, y=2 as (1, 2), where the names are in order; anything else as it is."""
    names = [str(item.args[0].value) for item in node.args if item.value == "named"]
    if node.op != "bag" or len(names) < 2 or len(names) < len(node.args) or names != sorted(set(names)):
        return node
    return Node("row", "()", tuple(item.args[1] for item in node.args))


def _same_equation(given: Node, wanted: Node) -> bool:
    """Whether the sides differ by the same, but for a factor: y=x+1 and 2y-2x=2. Not where one is solved: x=5."""
    if any(side.op in _PARTS for side in given.args + wanted.args):
        return False
    if any(node.value == "named" and not names_of(node.args[1]) for node in (given, wanted)):
        return False
    a, b = (Node("-", None, node.args) for node in (given, wanted))
    try:
        values = [(evaluate(a, point), evaluate(b, point)) for point in range(3)]
        first, other = values[0]
        return bool(first and other) and all(agree(x * other, y * first) for x, y in values[1:])
    except (ExpressionError, ArithmeticError, ValueError):
        return False


def _same_value(given: Node, wanted: Node) -> bool:
    try:
        if _is_number(wanted, True) and _is_calculation(given):
            if not _is_number(given, fractions=evaluate(wanted).denominator != 1):
                return False
        constant = not (names_of(given) | names_of(wanted))
        if constant and _is_calculation(given) and _is_calculation(wanted):
            try:
                return evaluate(given) == evaluate(wanted)
            except ExpressionError:
                pass  # a power too large for exact numbers
        return all(agree(evaluate(given, point), evaluate(wanted, point)) for point in range(1 if constant else 3))
    except (ExpressionError, ArithmeticError, ValueError):
        return False


def _is_number(node: Node, fractions: bool) -> bool:
    """Whether the tree is a way of writing one number, and no calculation; `fractions`: whether 3/4 is one."""
    if node.op == "neg":
        return _is_number(node.args[0], fractions)
    if node.op == "/":
        return fractions and all((part.args[0] if part.op == "neg" else part).op == "number" for part in node.args)
    if node.op == "*" and node.args[1].op == "^" and node.args[1].args[0].value == 10:  # 2.5 times 10^6
        return all(_is_number(part, False) for part in (node.args[0], node.args[1].args[1]))
    return node.op in ("number", "mixed") or (node.op == "!" and node.args[0].op == "number")


def _is_calculation(node: Node) -> bool:
    return node.op not in ("name", "root", "call") and all(map(_is_calculation, node.args))
