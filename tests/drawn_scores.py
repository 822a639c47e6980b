"""Scores as they come, drawn again the same: of a judge, of ROUGE, and of two checkpoints that are compared."""

import numpy as np

RNG = np.random.default_rng(20260101)
STATE = RNG.bit_generator.state


def judge_scores(n: int, quality: float, difficulty: np.ndarray | None = None) -> np.ndarray:
    """Overall scores as a judge gives them: the mean of six whole numbers from 1 to 10, many of them at the top."""
    difficulty = RNG.normal(0, 1.2, n) if difficulty is None else difficulty
    return np.clip(np.round(quality + difficulty[:, None] + RNG.normal(0, 1, (n, 6))), 1, 10).mean(axis=1)


def rouge_scores(n: int) -> np.ndarray:
    """F1 on short texts: a fifth of the answers is the reference itself."""
    return np.where(RNG.random(n) < 0.2, 1.0, RNG.beta(0.8, 0.6, n))


def paired_differences(n: int) -> np.ndarray:
    """Two checkpoints of one run: two fifths of the answers are the same."""
    difficulty = RNG.normal(0, 1.2, n)
    differences = judge_scores(n, 7, difficulty) - judge_scores(n, 6.7, difficulty)
    return np.where(RNG.random(n) < 0.4, 0.0, differences)
