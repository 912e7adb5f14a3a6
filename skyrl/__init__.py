"""Reinforcement learning for language models: one program on every process, no controller."""

__version__ = "0.1.0"
