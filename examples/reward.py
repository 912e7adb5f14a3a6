"""A reward of your own on data of your own: the right answer, and short.

    python -m skyrl.train experiment=custom model=tiny plugins=[examples.reward] env.name=single_turn \
        env.options.reward=short_and_right env.options.correct_reward=0.5 \
        data.path=examples/data/capitals_train.jsonl sampler.max_new_tokens=16

Each row is {"prompt": "...", "answer": "..."}; the held-out rows lie beside it in capitals_test.jsonl. Every other
field of a row is in `prompt.extra` too.
"""

from skyrl.api import Prompt, register_reward


@register_reward("short_and_right", answer=True)
def short_and_right(text: str, prompt: Prompt) -> float:
    """1 for a text with the answer in it, less 0.01 for every character that is too many."""
    answer = prompt.extra["answer"]
    return float(answer in text) - 0.01 * max(0, len(text) - len(answer))
