"""A reward given by another model, with a rubric of your own: any server of OpenAI's kind (vLLM, SGLang, skyrl.serve).

    export JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=judge
    python -m skyrl.train experiment=custom model=tiny plugins=[examples.judge] env.name=single_turn \
        env.options.reward=judged env.options.correct_reward=0.5 \
        data.path=examples/data/capitals_train.jsonl sampler.max_new_tokens=16 env.timeout_seconds=60

Needs pip install 'skyrl-spmd[judges]'. Where the judge's own rubric will do, no plugin is needed: the reward is called
rubric (docs/judges.md). A judge that is down, slow or writes nonsense masks the episode; it never makes the reward 0.
"""

import os

from skyrl.api import Prompt, UserError, register_reward
from skyrl.judges.rubric import rubric_score

CRITERIA = {
    "right": "Does the answer say what the reference says?",
    "short": "Is it no longer than it must be? A single word is 10, several sentences are 0.",
}


@register_reward("judged", answer=True)
async def judged(text: str, prompt: Prompt) -> float:
    """Mostly whether it is right; a little how short. Async: one worker waits for many judgements at once."""
    url, model = os.environ.get("JUDGE_URL"), os.environ.get("JUDGE_MODEL", "judge")
    if not url:
        raise UserError("JUDGE_URL: set it to the judge's address, such as http://127.0.0.1:8000/v1")
    grades = await rubric_score(text, prompt, model=model, base_url=url, rubric=CRITERIA, key_variable="JUDGE_KEY")
    return 0.8 * grades["right"] + 0.2 * grades["short"]
