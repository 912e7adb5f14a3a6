"""Evaluation of named sets: their prompts, what overlaps with training, and scores with intervals. No torch."""
