"""For launch files: prints `--resume` where a run has begun.  python3 -m headshare_jax.train.begun RUN"""

import sys

from headshare_jax.convert import storage
from headshare_jax.errors import TRY_AGAIN, TryAgain
from headshare_jax.train.run_folder import CONFIG


def option(run: str) -> str:
    """What a command must be given to go on with a run in a folder or a bucket: `--resume`, or nothing if it is new."""
    return "--resume" if storage.is_file(storage.path(run) / CONFIG) else ""


if __name__ == "__main__":
    try:
        print(option(sys.argv[1]))
    except TryAgain as error:
        print(f"headshare: {error}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
