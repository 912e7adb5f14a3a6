"""Rewards that are models of their own, held beside the policy on each rank's device: reward models and sentence
embeddings. Folders in Hugging Face format; torch is imported when the first answers are scored."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.envs.data_files import read_examples
from skyrl.envs.rewards.base import reference, register_reward
from skyrl.judges.batch import DIGITS, BatchReward, RankTools, Score, conversation
from skyrl.types import Episode, Message, Prompt, UserError


class HeldModel(BatchReward):
    """A reward with a frozen model of transformers and its tokenizer. Subclasses say which class of it, and what `read`
    takes from its outputs for each row of a batch."""

    auto_class = ""

    def __init__(self, path: str, batch_tokens: int) -> None:
        self.path, self.batch_tokens = str(Path(path).expanduser()), batch_tokens
        self.model: Any = None

    def read(self, outputs: Any, mask: Any) -> Any:
        raise NotImplementedError

    def load(self, device: Any) -> None:
        """Loads it, the first time. Raises UserError, also for a folder that lacks weights of this class."""
        import torch
        import transformers

        if self.model is not None:
            return
        transformers.utils.logging.disable_progress_bar()
        fast = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if fast else torch.float32  # on ROCm the numbers are 9 and above
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
            load = getattr(transformers, self.auto_class).from_pretrained
            model, info = load(self.path, dtype=dtype, output_loading_info=True)
        except Exception as error:  # as in text.tokenizer
            said = " ".join(str(error).split())[:200]
            raise UserError(f"reward model={self.path}: no {self.auto_class} ({said}); give its folder") from error
        if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
            raise UserError(f"reward model={self.path}: no weights for {missing[0]}, which {self.auto_class} needs")
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self.longest = int(min(self.tokenizer.model_max_length, positions))

    def each(self, rows: Sequence[dict[str, list[int]]]) -> list[Any]:
        """What `read` takes from each row. Equal rows are computed once, so that they have the very same result,
        whatever they are padded with."""
        import torch

        keys = [tuple(row["input_ids"]) for row in rows]
        first, found = dict(zip(keys, rows, strict=True)), dict[tuple[int, ...], Any]()
        order = sorted(first, key=lambda key: (len(key), key))
        while order:
            longest = len(order[-1])
            part = [order.pop() for _ in range(min(max(1, self.batch_tokens // longest), len(order)))]
            fills = {"input_ids": self._padding(part), "attention_mask": 0, "token_type_ids": 0}
            batch = {
                name: torch.tensor([first[key][name] + [fills[name]] * (longest - len(key)) for key in part])
                for name in fills.keys() & first[part[0]].keys()
            }
            batch = {name: values.to(self.device) for name, values in batch.items()}
            with torch.no_grad():
                found.update(zip(part, self.read(self.model(**batch), batch["attention_mask"]), strict=True))
        return [found[key] for key in keys]

    def _padding(self, rows: Sequence[tuple[int, ...]]) -> int:
        """The token to pad with. A classifier of a causal model reads its last token that is no padding, so one that a
        row itself holds, as its end token often is, would move that place: then any other one."""
        used, pad = {token for row in rows for token in row}, self.tokenizer.pad_token_id
        if pad is None or pad in used:
            pad = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.pad_token_id = pad
        return pad


def conversation_ids(tokenizer: Any, messages: Sequence[Message]) -> dict[str, list[int]]:
    """Ids of a conversation that ends with an answer, and what else its model is given: by the chat template, or
    without one the prompt and the answer as a pair of texts."""
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids)}
    before = "\n".join(message["content"] for message in messages[:-1])
    return dict(tokenizer(before, messages[-1]["content"], verbose=False))


@register_reward("reward_model", batch=True, objectives=["reward_model"])
class RewardModel(HeldModel):
    """What a trained reward model says of a conversation: the logit of a model for sequence classification.

    model: its folder. label: which of its outputs. batch_tokens: padded tokens in one forward pass. The conversation is
    written with the chat template of its own tokenizer; without one, prompt and answer are a pair of texts.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, *, model: str, label: int = 0, batch_tokens: int = 16384) -> None:
        super().__init__(model, batch_tokens)
        if label < 0:
            raise UserError(f"reward reward_model: label={label}: wanted 0 or more, one of the model's outputs")
        self.label = label

    def score(self, episodes: Sequence[Episode], tools: RankTools) -> list[Score]:
        self.load(tools.device)
        if not 0 <= self.label < self.model.config.num_labels:
            raise UserError(f"reward reward_model: label={self.label}: it has {self.model.config.num_labels}, from 0")
        rows = [self.row(episode) for episode in episodes]
        logits = iter(self.each([row for row in rows if len(row["input_ids"]) <= self.longest]))
        return [
            round(next(logits), DIGITS)
            if len(row["input_ids"]) <= self.longest
            else ValueError(f"{len(row['input_ids'])} tokens, and the reward model {self.path} takes {self.longest}")
            for row in rows
        ]

    def read(self, outputs: Any, mask: Any) -> Any:
        return outputs.logits[:, self.label].float().tolist()

    def row(self, episode: Episode) -> dict[str, list[int]]:
        """An episode as the model reads it."""
        return conversation_ids(self.tokenizer, conversation(episode))


def _compared_with(prompt: Prompt, *, corpus: str = "", context: str = "", **others: Any) -> Sequence[str]:
    """The texts that `similarity` holds an answer against. Raises UserError where there is none."""
    if context and not _sentences(prompt.extra.get(context)):
        raise UserError(f"{prompt.place}: field {context!r} holds no text, and reward similarity needs it")
    return _sentences(prompt.extra.get(context)) if context else references(prompt, corpus)


@register_reward("similarity", batch=True, objectives=["similarity"], check=_compared_with)
class Similarity(HeldModel):
    """How near an answer is in meaning to reference texts: the largest cosine of sentence embeddings, -1 to 1; 0 for an
    empty one.

    model: the folder of a sentence model (mean of the last layer, or the first token where the folder says so).
    corpus: a file of reference texts; "" = the row's `references` or `answer`. context: a field of the row with a text;
    then the score is the mean over the answer's sentences of the largest cosine with a sentence of that text: low where
    the answer says what the context does not.
    """

    auto_class = "AutoModel"

    def __init__(self, *, model: str, corpus: str = "", context: str = "", batch_tokens: int = 16384) -> None:
        super().__init__(model, batch_tokens)
        self.corpus, self.context = corpus, context
        self.known: dict[str, Any] = {}  # text -> embedding, of references
        pooling = Path(self.path) / "1_Pooling" / "config.json"  # as sentence-transformers writes it
        self.first = pooling.is_file() and bool(json.loads(pooling.read_text()).get("pooling_mode_cls_token"))

    def score(self, episodes: Sequence[Episode], tools: RankTools) -> list[Score]:
        self.load(tools.device)
        given, wanted = [], []
        for episode in episodes:
            text, row = episode.turns[-1].text, episode.prompt
            given.append(_sentences(text) if self.context else [text] * bool(text.strip()))
            wanted.append(_compared_with(row, corpus=self.corpus, context=self.context))
        self.known |= self.embed({text for texts in wanted for text in texts} - self.known.keys())
        said = self.embed({text for texts in given for text in texts})
        return [
            self.nearest([said[t] for t in texts], [self.known[t] for t in o])
            for texts, o in zip(given, wanted, strict=True)
        ]

    def nearest(self, given: list[Any], others: list[Any]) -> float:
        """The mean of the largest cosine of each with any of the others."""
        cosines = np.stack(given) @ np.stack(others).T if given else np.zeros((1, 1))
        return round(float(cosines.max(axis=1).mean(dtype=float)), DIGITS)

    def embed(self, texts: set[str]) -> dict[str, Any]:
        """The embedding of each, of length 1. What is too long for the model is cut."""
        order = sorted(texts)
        rows = [dict(self.tokenizer(text, truncation=True, max_length=self.longest)) for text in order]
        return dict(zip(order, self.each(rows), strict=True))

    def read(self, outputs: Any, mask: Any) -> Any:
        hidden, weights = outputs.last_hidden_state.float(), mask.unsqueeze(-1).float()
        vectors = hidden[:, 0] if self.first else (hidden * weights).sum(1) / weights.sum(1)
        return (vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).cpu().numpy()


def references(prompt: Prompt, corpus: str = "") -> tuple[str, ...]:
    """The field `text` of each row of the data file `corpus`, else the row's `references`, a list of texts, else its
    `answer`. Raises UserError where there is none."""
    if corpus:
        return _read(corpus)
    several = prompt.extra.get("references")
    if several is None:
        return (reference(prompt),)
    if not (isinstance(several, list) and several and all(isinstance(one, str) and one.strip() for one in several)):
        raise UserError(f"{prompt.place}: field 'references' is {str(several)[:60]!r}, wanted a list of texts")
    return tuple(several)


@functools.lru_cache(maxsize=8)
def _read(path: str) -> tuple[str, ...]:
    return tuple(row.text("text") for row in read_examples(Path(path).expanduser()))


def _sentences(text: Any) -> list[str]:
    return re.findall(r"\S.*?(?:[.!?](?=\s|$)|$)", text if isinstance(text, str) else "", re.MULTILINE)
