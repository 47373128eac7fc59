"""MaxText's own training step, compiled by its `train_compile` and written down as JSON: what bench/pods.py runs.

Runs in an environment of its own, with Python 3.12:

    python3.12 -m venv .venv-maxtext
    .venv-maxtext/bin/pip install 'maxtext[tpu]==0.2.5' libtpu==0.0.52
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What libtpu would else ask the machine's metadata server.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import maxtext
from absl import app
from maxtext.trainers.pre_train import train_compile

# AdamW, float32 parameters and bfloat16 products are its defaults.
SETTINGS = {
    "run_name": "pods",
    "base_output_directory": "output",
    "enable_checkpointing": "false",
    "dataset_type": "synthetic",
    "compile_topology_num_slices": 1,
    "per_device_batch_size": 1,
    "attention": "flash",
    # What is compiled for absent chips cannot be read back.
    "jax_cache_dir": "",
}

if __name__ == "__main__":
    path, *asked = sys.argv[1:]
    compile_step = train_compile.jit_and_compile

    def keep(*args: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        compiled = compile_step(*args, **settings)
        memory = compiled.memory_analysis()
        found = {
            "seconds": time.perf_counter() - start,
            "memory": {name: getattr(memory, name) for name in dir(memory) if name.endswith("_in_bytes")},
            "text": compiled.as_text(),
            "versions": {name: version(name) for name in ("maxtext", "jax", "libtpu")},
        }
        Path(path).write_text(json.dumps(found))
        return compiled

    train_compile.jit_and_compile = keep
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    app.run(train_compile.main, [sys.argv[0], str(base), *settings, *asked])
