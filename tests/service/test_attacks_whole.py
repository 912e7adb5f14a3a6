"""Training of all parameters that goes wrong: the base of all draws itself is not finite."""

from __future__ import annotations

import pytest
from inprocess import draw, drawn, open_client, prompt, refused_beside
from tinker import AdamParams, RequestFailedError


def test_a_whole_model_that_is_not_finite_ends_its_own_samples(tmp_path):
    """The next weights draw as if nothing had been."""
    with open_client(tmp_path, "service.full_parameters=true") as client:
        base = client.create_sampling_client(base_model="tiny").result()
        alone = drawn(base.sample(prompt(5, 6), 3, draw(10)).result())
        model = client.create_lora_training_client("tiny", rank=0).result()
        wild = AdamParams(learning_rate=1e6, weight_decay=1e6)
        for _ in range(2):  # a zero gradient is finite; the decay multiplies every weight by -10^12
            model.optim_step(wild).result()
        with pytest.raises(RequestFailedError, match="the update is not finite .*; no weight was changed"):
            for _ in range(3):
                model.optim_step(wild).result()
        bad = model.save_weights_and_get_sampling_client().result()
        futures = [bad.sample(prompt(5, 6), 3, draw(10)), base.sample(prompt(5, 6), 3, draw(10))]
        futures += [bad.compute_logprobs(prompt(5, 6)), base.sample(prompt(5, 6), 3, draw(10))]
        refused_beside(futures, alone)
