#!/bin/sh
# PostShare on one host with 8 GPUs:  sh gpu-host.sh
# Needs: pip install headshare-jax 'jax[cuda12]'
set -eu

# Fill in.
RECIPE=llama-2-7b                # one that comes along, or a file; its mesh is {fsdp: -1} unless it says otherwise
RUN=$HOME/runs/llama-2-7b        # folder of the run, or gs://... or s3://...

# Without it a layer's weights are gathered only when they are needed, and nothing is computed meanwhile.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
# JAX takes 75 % of a GPU's memory by default; the rest of this is for NCCL's buffers and CUDA itself.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# NCCL says why a link between GPUs cannot be used.
export NCCL_DEBUG=WARN

# One process sees all GPUs of a host, so there is nothing to join.
exec sh "$(dirname "$0")/until-done.sh" "$RECIPE" "$RUN"
