#!/bin/bash
# PostShare on TPU slices of a cluster that xpk made:  bash xpk.sh
# Needs: pip install xpk, and an image with headshare-jax[tpu,gcs,eval].
set -eu

# Fill in.
CLUSTER=my-cluster PROJECT=my-project ZONE=us-west4-a
IMAGE=my-registry/headshare:latest
TYPE=v5litepod-256 SLICES=1
BUCKET=gs://my-bucket
RECIPE=llama-3.1-8b-v5e-256
RUN=$BUCKET/runs/llama-3.1-8b

# Found out in the pod: the first start is a new run, every later one goes on with it.
RESUME="\$(python3 -m headshare_jax.train.begun $RUN)"

xpk workload create \
  --workload=headshare --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --max-restarts=100 --restart-on-exit-codes=75,134,137,143 \
  --env="HEADSHARE_CACHE=$BUCKET/headshare-cache" \
  --command="headshare postshare --config $RECIPE --output $RUN $RESUME --distributed --set mesh.dcn_data=$SLICES"
