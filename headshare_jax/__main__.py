"""`python -m headshare_jax` is the command `headshare`."""

from headshare_jax.cli import main

main()
