"""`liger-jax tune`."""


def tune(*only: str) -> None:
    """Time candidate block sizes of the kernels on this GPU, and save the fastest.

    Args:
        only: Names of kernels to tune; by default all.
    """
    from pallas_kernels.tune import main as tune_kernels

    tune_kernels(only)
