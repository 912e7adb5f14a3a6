"""A TensorFlow model as a policy: tensors cross by DLPack, the gradient is TensorFlow's own tape.

    python -m skyrl.control plugins=[examples.tensorflow_policy] env=CartPole-v1 control.policy=tensorflow_mlp

The torch parameters are the weights: optimizer, ranks and checkpoints see them alone. Each forward pass writes them
into the TensorFlow variables. Needs tensorflow-cpu; `TensorFlowPolicy` takes any callable with `trainable_variables`.
"""

from typing import Any

import tensorflow as tf
import torch
from torch import Tensor, nn

from skyrl.api import register_policy
from skyrl.trainers.control.distributions import parameters_of


def to_tensorflow(tensor: Tensor) -> Any:
    """A copy as TensorFlow's: its variables may keep the memory they are given, and the optimizer writes to ours."""
    return tf.experimental.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.detach().contiguous().clone()))


def to_torch(tensor: Any) -> Tensor:
    """The same memory as a torch tensor; TensorFlow never writes to a tensor again."""
    return torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(tensor))


class TensorFlowCall(torch.autograd.Function):
    """A TensorFlow model within torch's graph; the gradient reaches the weights, not the observations."""

    @staticmethod
    def forward(ctx: Any, model: Any, observations: Tensor, *weights: Tensor) -> Tensor:
        """[B, *shape] to [B, P]."""
        for variable, weight in zip(model.trainable_variables, weights, strict=True):
            variable.assign(to_tensorflow(weight))
        with tf.GradientTape() as tape:
            outputs = model(to_tensorflow(observations))
        ctx.tape, ctx.outputs, ctx.variables = tape, outputs, list(model.trainable_variables)
        return to_torch(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """From the gradient of the outputs [B, P] to those of the weights; 0 for one that the outputs do not use."""
        found = ctx.tape.gradient(
            ctx.outputs,
            ctx.variables,
            output_gradients=to_tensorflow(gradients[0]),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return (None, None, *(to_torch(tf.convert_to_tensor(one)) for one in found))


class TensorFlowPolicy(nn.Module):
    """A built TensorFlow model as a torch module, whose parameters are the model's trainable variables."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(one.numpy().copy())) for one in model.trainable_variables
        )

    def forward(self, observations: Tensor) -> Tensor:
        """[B, *shape] to [B, P]."""
        return TensorFlowCall.apply(self.model, observations, *self.weights)


class MLP(tf.Module):
    """Two layers of `units`, in plain TensorFlow."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = [
            (tf.Variable(tf.random.normal((a, b), stddev=a**-0.5)), tf.Variable(tf.zeros(b)))
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]

    def __call__(self, inputs: Any) -> Any:
        """[B, *shape] to [B, P]."""
        inputs = tf.reshape(inputs, (tf.shape(inputs)[0], -1))
        for number, (weight, bias) in enumerate(self.layers):
            inputs = tf.matmul(inputs, weight) + bias
            inputs = tf.tanh(inputs) if number + 1 < len(self.layers) else inputs
        return inputs


@register_policy("tensorflow_mlp")
def make(observation_space: Any, action_space: Any, *, units: int = 64) -> nn.Module:
    """The policy for these spaces. TensorFlow draws the first weights: seed it to have the same on all ranks."""
    size = int(torch.Size(observation_space.shape).numel())
    tf.random.set_seed(0)
    return TensorFlowPolicy(MLP([size, units, units, parameters_of(action_space)]))
