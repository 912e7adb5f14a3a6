"""A reward given by another model: any server that speaks OpenAI's chat completions (vLLM, SGLang, skyrl.serve).

    export JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=judge
    python -m skyrl.train experiment=custom model=tiny plugins=[examples.judge] env.name=single_turn \
        env.options.reward=judged env.options.correct_reward=0.5 \
        data.path=examples/data/capitals_train.jsonl sampler.max_new_tokens=16 env.timeout_seconds=60

The judge sees question, reference and answer, and writes a number from 0 to 10. An answer that is no number is an
error and not a reward of 0: env.on_error=stop ends the run with one line, env.on_error=mask leaves the episode out.
"""

import functools
import json
import os
import re
import urllib.request

from skyrl.api import Prompt, UserError, register_reward

ASK = """Question: {question}
Reference answer: {reference}
Answer to judge: {answer}
How right is the answer, from 0 (wrong) to 10 (right)? Write the number alone."""


@functools.lru_cache(maxsize=100_000)
def ask(text: str) -> str:
    """The judge's answer. Cached: equal answers of a group are judged once, and alike."""
    url, body = os.environ.get("JUDGE_URL"), {"model": os.environ.get("JUDGE_MODEL", "judge"), "temperature": 0}
    if not url:
        raise UserError("JUDGE_URL: set it to the judge's address, such as http://127.0.0.1:8000/v1")
    body |= {"max_tokens": 8, "messages": [{"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', 'none')}"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@register_reward("judged", answer=True)
def judged(text: str, prompt: Prompt) -> float:
    """The judge's number as 0 to 1."""
    question = prompt.messages[-1]["content"]
    said = ask(ASK.format(question=question, reference=prompt.extra["answer"], answer=text[:4000]))
    found = re.fullmatch(r"\s*(10|\d(?:\.\d+)?)\s*", said)
    if found is None:
        raise ValueError(f"the judge wrote {said!r}, which is no number from 0 to 10")
    return float(found[1]) / 10
