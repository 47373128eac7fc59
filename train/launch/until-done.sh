#!/bin/sh
# Trains on this host until the run is done:  sh until-done.sh RECIPE RUN [OPTIONS of headshare postshare]
#
# The run goes on after its last checkpoint when its processes were stopped (143, or 137 and 134 where they were killed)
# or lost each other, the network or a bucket (75). It ends when it is done (0), when something is wrong with it (1, 2), and
# when this script is told to stop. Of several hosts, each runs this; they wait for each other.
set -u
recipe=$1 run=$2
shift 2

child= stopped=
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child"' TERM INT HUP

starts=0
while [ "$starts" -lt "${MOST_STARTS:-100}" ] && [ -z "$stopped" ]; do
  [ "$starts" -eq 0 ] || sleep "${SECONDS_BETWEEN:-10}"
  starts=$((starts + 1))
  code=75
  resume=$(python3 -m headshare_jax.train.begun "$run") || continue
  headshare postshare --config "$recipe" --output "$run" $resume "$@" &
  child=$!
  # A signal ends `wait`, not the process.
  while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=
  case $code in 75 | 134 | 137 | 143) ;; *) break ;; esac
done
exit "$code"
