"""For launch files: prints `--resume` where a run has begun.  python3 -m headshare_jax.train.begun RUN"""

import sys

from headshare_jax.convert import storage
from headshare_jax.train.run_folder import CONFIG


def option(run: str) -> str:
    """What a command must be given to go on with a run in a folder or a bucket: `--resume`, or nothing if it is new."""
    return "--resume" if (storage.path(run) / CONFIG).is_file() else ""


if __name__ == "__main__":
    print(option(sys.argv[1]))
