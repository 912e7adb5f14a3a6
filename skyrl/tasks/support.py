"""Customer support: the model talks to a customer, who is scripted or played by another model, and acts in the end."""

from __future__ import annotations

import functools
import itertools
import os
import re
from typing import Any

from skyrl.envs.base import RetryableError, StepResult, register_environment
from skyrl.envs.single_turn import require
from skyrl.tasks.base import Tasks, TurnedTask, field_of, require_counts, require_weights, wrong_field
from skyrl.types import Message, Metrics, Prompt, UserError

ACTION = re.compile(r"^[ \t]*action[ \t]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces, of which each sign is a word
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
NOT_UNDERSTOOD = "I do not understand what you need from me."
PERSONA = (
    "You play a customer who writes to the support of a shop. Answer the last message in one or two short sentences, "
    "in the customer's voice. Tell a fact only when you are asked for it, exactly as it stands here, and invent none. "
    "What you know:\n"
)


@register_environment("support")
class Support(TurnedTask):
    """A customer writes in; the model asks for what it needs, in words, and ends with a line "action: <name> <argument>
    ..." that must be the right one.

    Rows of data.path have "prompt" or "messages" (the shop's rules and what the customer wants), "facts" (an object:
    fact -> the words that tell it), "action" (the right one, "refund 4821"), and may have "asks" (an object: fact ->
    list of words that ask for it; else its name does). Without data.path: made customers of a small shop.

    The customer is a state machine: asked for facts they tell the first two that are new; a message that asks for none
    makes them impatient, and after `patience` of these they leave. Reward: 1 for the right action; `wrong` is taken off
    for another one.
    """

    in_process = True

    def __init__(self, *, wrong: float = 0.0, patience: int = 3, max_turns: int = 8) -> None:
        super().__init__(max_turns)
        require_weights(wrong=wrong)
        require_counts(patience=patience)
        self.wrong, self.patience = wrong, patience

    def made(self) -> Tasks:
        """Customers who want their money back, in time or too late, or ask where their order is."""
        return _made()

    def check(self, prompt: Prompt) -> None:
        """There are facts, words that ask for them, and an action."""
        facts = field_of(prompt, "facts", dict, "an object: fact -> the words that tell it")
        if not all(isinstance(words, str) and words for words in facts.values()):
            raise wrong_field(prompt, "facts", "a text for each fact")
        field_of(prompt, "action", str, "the right action, such as 'refund 4821'")
        asks = prompt.extra.get("asks", {})
        words = [*asks.values()] if isinstance(asks, dict) and asks.keys() <= facts.keys() else [asks]
        words += [[name] for name in facts if not isinstance(asks, dict) or name not in asks]
        if not all(isinstance(one, list) and one and all(map(_words, one)) for one in words):
            raise wrong_field(prompt, "asks", "an object: one of the facts -> list of words that ask for it")

    def reset(self, prompt: Prompt) -> list[Message]:
        """The customer's first message."""
        self.told: list[str] = []
        self.idle, self.action = 0, ""
        return super().reset(prompt)

    def turn(self, text: str) -> str | None:
        """What the customer answers."""
        if actions := ACTION.findall(text):
            self.action = actions[-1]
            return None
        facts, asks = self.prompt.extra["facts"], self.prompt.extra.get("asks", {})
        words = _words(text)
        asked = [name for name in facts if any(_words(one) in words for one in asks.get(name, [name]))]
        new = [name for name in asked if name not in self.told][:2]
        self.told += new
        self.idle += not new
        if self.idle >= self.patience:
            return None
        return (" ".join(facts[name] for name in new or asked[:2]) or NOT_UNDERSTOOD) + "\n"

    def score(self) -> tuple[float, Metrics]:
        """Reward, and how the conversation has ended."""
        right = self.action.lower().split() == str(self.prompt.extra["action"]).lower().split()
        wrong = bool(self.action) and not right
        left = self.idle >= self.patience
        metrics = {"wrong_action:mean": float(wrong), "customer_left:mean": float(left), "correct:mean": float(right)}
        return right - self.wrong * wrong, metrics


@register_environment("support_model")
class SupportModel(Support):
    """The same with a customer who is played by a model behind an OpenAI-style endpoint; the action is judged as there.

    base_url: such as http://host:8000/v1; model: its name there; key_variable: the environment variable that holds the
    key, "" = none. A row's "persona" is told to the model beside the facts. temperature: of its words. An endpoint that
    is busy or away is asked again, and then the episode is masked.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        key_variable: str = "",
        temperature: float = 1.0,
        wrong: float = 0.0,
        max_turns: int = 8,
    ) -> None:
        super().__init__(wrong=wrong, patience=max(1, max_turns) + 1, max_turns=max_turns)
        require(base_url.startswith(("http://", "https://")), "base_url", base_url, "http://... or https://...")
        require(temperature >= 0.0, "temperature", temperature, "0 or more")
        require(not key_variable or key_variable in os.environ, "key_variable", key_variable, "a variable that is set")
        self.url, self.model, self.temperature = f"{base_url.rstrip('/')}/chat/completions", model, temperature
        self.headers = {"Authorization": f"Bearer {os.environ[key_variable]}"} if key_variable else {}

    def reset(self, prompt: Prompt, seed: int = 0) -> list[Message]:
        """The customer's first message; `seed` is handed to the endpoint."""
        opening = super().reset(prompt)
        facts = "".join(f"- {name}: {words}\n" for name, words in prompt.extra["facts"].items())
        system = f"{PERSONA}{facts}{prompt.extra.get('persona', '')}"
        first = {"role": "assistant", "content": opening[-1]["content"]}
        self.said: list[Message] = [{"role": "system", "content": system}, first]  # the customer is the assistant here
        self.seed = seed
        self.pending: StepResult | None = None
        return opening

    async def step(self, text: str) -> StepResult:  # type: ignore[override]  # both kinds are allowed
        """One turn; the customer's words are the model's. Called again after a failure, it only asks again."""
        if self.pending is None:
            self.pending = super().step(text)
            self.said.append({"role": "user", "content": text})
        result = self.pending
        if not result.done:
            words = await self._ask()
            self.said.append({"role": "assistant", "content": words})
            result.observation = [{"role": self.role, "content": f"{words}\n"}]
        self.pending = None
        return result

    async def _ask(self) -> str:
        import httpx

        body = {"model": self.model, "messages": self.said, "temperature": self.temperature, "max_tokens": 200}
        body["seed"] = (self.seed + self.turns) % 2**31
        try:
            async with httpx.AsyncClient(timeout=None) as client:  # the deadline is env.timeout_seconds
                answer = await client.post(self.url, json=body, headers=self.headers)
            refused = 400 <= answer.status_code < 500 and answer.status_code not in (408, 429)
            if not refused:
                words = answer.raise_for_status().json()["choices"][0]["message"]["content"].strip()
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RetryableError(f"{self.url}: {type(error).__name__} {error}") from error
        if refused:
            raise UserError(f"env.options.base_url: {self.url} answers {answer.status_code}: {answer.text[:200]}")
        if not words:
            raise RetryableError(f"{self.url} answers without words")
        return words


def _words(text: Any) -> str:
    """The words of a text in any script, in lower case, each between spaces; "" for what has none, or is no text."""
    found = WORD.findall(text.casefold()) if isinstance(text, str) else []
    return f" {' '.join(found)} " if found else ""


RULES = (
    "You are the support of a shop. Ask the customer for the order and for the date, then write one line:\n"
    "action: refund <order> if it was bought 30 days ago or less, action: decline <order> if more,\n"
    "action: track <order> if it has not come.\nCustomer: "
)
ASKS = {"order": ["order", "number"], "date": ["date", "when", "days"], "place": ["address", "where", "city"]}


@functools.cache
def _made() -> list[tuple[str, dict[str, Any]]]:
    tasks = []
    for order, days, goods in itertools.product(range(1007, 9999, 317), (3, 17, 30, 31, 44, 90), ("lamp", "coat", "")):
        wish = f"I want my money back for the {goods}." if goods else "My order has not come."
        action = ("refund" if days <= 30 else "decline") if goods else "track"
        facts = {"order": f"It is {order}.", "date": f"{days} days ago.", "place": "I live in Rome."}
        extra = {"facts": facts, "asks": ASKS, "action": f"{action} {order}", "solution": "order number, date?"}
        tasks.append((f"{RULES}{wish}\n", extra))
    return tasks
