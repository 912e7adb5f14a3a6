"""A Keras 3 model as a policy, as it is: on its torch backend a Keras model is a torch module.

    python -m skyrl.control plugins=[examples.keras_policy] env=CartPole-v1 control.policy=keras_mlp

The model gives action parameters alone, so `control.critic` gives it a critic of its own. A model with two outputs,
parameters and values, brings its own.
"""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it once, when it is imported

import keras

from skyrl.api import UserError, register_policy
from skyrl.trainers.control.distributions import parameters_of


@register_policy("keras_mlp")
def make(observation_space: Any, action_space: Any, *, units: int = 64) -> Any:
    """Two layers of `units`. Another program part may have imported Keras first, with another backend."""
    if keras.backend.backend() != "torch":
        raise UserError(
            f"KERAS_BACKEND={keras.backend.backend()}: a policy needs torch; set it before Keras is imported"
        )
    return keras.Sequential(
        [
            keras.Input(observation_space.shape),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.Dense(parameters_of(action_space), kernel_initializer=keras.initializers.Orthogonal(0.01)),
        ]
    )
