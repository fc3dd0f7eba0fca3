"""Softmax cross-entropy and its gradient in float64 numpy, with every option, as the reference of both cross-entropies."""

import numpy as np

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "class weights": {"class_weights": True},
    "token weights": {"token_weights": True},
    "normalizer": {"normalizer": 7.0},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "class_weights": True, "token_weights": True},
    "all, none": {
        "label_smoothing": 0.2,
        "z_loss": 1e-3,
        "class_weights": True,
        "token_weights": True,
        "reduction": "none",
    },
}


def filled(options, rows, vocab, seed=3):
    """Returns the options with True replaced by arrays."""
    rng = np.random.default_rng(seed)
    arrays = {"class_weights": rng.uniform(0.5, 2, vocab), "token_weights": rng.uniform(0, 2, rows)}
    return {name: arrays[name].astype(np.float32) if value is True else value for name, value in options.items()}


def reference(
    logits,
    labels,
    cotangent=1.0,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    class_weights=None,
    token_weights=None,
    reduction="mean",
    normalizer=None,
):
    """Returns the loss of logits [N, V], and the gradient [N, V] of sum(cotangent * loss)."""
    raw = np.asarray(logits, np.float64)
    rows, vocab = raw.shape
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    weights = np.ones(vocab) if class_weights is None else np.asarray(class_weights, np.float64)
    counts = np.asarray(labels) != ignore_index
    label = np.where(counts, labels, 0)
    tokens = counts * (np.ones(rows) if token_weights is None else np.asarray(token_weights, np.float64))

    largest = z.max(axis=-1, keepdims=True)
    lse = (largest + np.log(np.exp(z - largest).sum(axis=-1, keepdims=True)))[:, 0]
    p = np.exp(z - lse[:, None])
    target = np.zeros_like(z)
    target[np.arange(rows), label] = (1 - label_smoothing) * weights[label]
    target += label_smoothing / vocab * weights  # target is the weight of each class in the loss
    z_weight = z_loss * weights[label]
    loss = (target * (lse[:, None] - z)).sum(axis=-1) + z_weight * lse**2
    gradient = p * (target.sum(axis=-1) + 2 * z_weight * lse)[:, None] - target
    if softcap is not None:
        gradient *= 1 - (z / softcap) ** 2

    scale = tokens
    if reduction == "mean":
        divisor = (tokens * weights[label]).sum() if normalizer is None else normalizer
        scale = tokens / (divisor or 1)
    loss = scale * loss
    return (loss if reduction == "none" else loss.sum()), gradient * (scale * cotangent)[:, None]
