"""Reinforcement learning in Gymnasium environments; see README.md here."""

from skyrl.trainers.control import cnn, recurrent  # noqa: F401  they register policies
from skyrl.trainers.control.distributions import parameters_of
from skyrl.trainers.control.engine import load_policy
from skyrl.trainers.control.train import control, train_control

__all__ = ["control", "load_policy", "parameters_of", "train_control"]
