#!/bin/bash
# PostShare on a TPU VM slice, from your own machine:  bash tpu-vm.sh
# Makes the slice, installs headshare-jax on its hosts, trains there, and makes the slice anew when it is preempted.
# Needs: gcloud, logged in. Ctrl-C here stops nothing there; run this again to follow it. Delete the slice when done.
set -u

# Fill in.
export CLOUDSDK_CORE_PROJECT=my-project CLOUDSDK_COMPUTE_ZONE=us-west4-a
TPU=headshare
TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
BUCKET=gs://my-bucket                 # in the slice's region; the hosts' service account may write there
RECIPE=llama-3.1-8b-v5e-256           # one that comes along, or a file
RUN=$BUCKET/runs/llama-3.1-8b

# All hosts share one cache for texts; JAX keeps compiled programs there too, for the next start.
SETTINGS="HEADSHARE_CACHE=$BUCKET/headshare-cache"
# A model or a data set that needs an account of the Hugging Face hub: SETTINGS="$SETTINGS HF_TOKEN=..."
HERE=$(dirname "$0")

tpu() { gcloud compute tpus tpu-vm "$@"; }
on_all() { tpu ssh "$TPU" --worker=all --command "$1"; }
state() { tpu describe "$TPU" --format='value(state)' 2>/dev/null; }

make_slice() {
  # Leave --spot out for a slice that is not preempted.
  [ "$(state)" = READY ] || tpu create "$TPU" --accelerator-type="$TYPE" --version="$RUNTIME" --spot || return
  # The hosts' own Python may be too old.
  on_all "python3 -m pip install -q uv && python3 -m uv venv -q --python 3.12 --allow-existing headshare && \
    python3 -m uv pip install -q --python headshare 'headshare-jax[tpu,gcs,eval]'" || return
  tpu scp "$HERE/until-done.sh" "$TPU:" --worker=all || return
  [ ! -f "$RECIPE" ] || tpu scp "$RECIPE" "$TPU:recipe.yaml" --worker=all
}

train() {
  local recipe=$RECIPE
  [ ! -f "$RECIPE" ] || recipe=recipe.yaml
  # It goes on when the connection is lost. Where it runs already, the lock is taken and nothing is begun.
  on_all ". headshare/bin/activate; export $SETTINGS; nohup flock -n headshare.lock sh -c 'rm -f headshare.code; \
    sh until-done.sh $recipe $RUN --distributed; echo \$? >headshare.code' >>headshare.log 2>&1 </dev/null &"
}

while :; do
  until make_slice && train; do sleep 60; done
  while sleep 60 && [ "$(state)" = READY ]; do
    tpu ssh "$TPU" --worker=0 --command 'tail -n 2 headshare.log'
    code=$(tpu ssh "$TPU" --worker=0 --command 'cat headshare.code 2>/dev/null' 2>/dev/null)
    [ -z "$code" ] || exit "$code"
  done
  echo "the slice is $(state); it is made anew"
  tpu delete "$TPU" --quiet
done
