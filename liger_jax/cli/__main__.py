"""`python -m liger_jax.cli`, the same commands as `liger-jax`."""

from liger_jax.cli import main

if __name__ == "__main__":
    main()
