#!/bin/sh
# Starts the proxy with one --worker for each engine container: WORKERS of them, named $WORKER_HOST-1, -2, …
set -eu
set -- serve --config "${HELIUM_CONFIG:-/etc/helium/helium.yaml}" --host 0.0.0.0 --port 8000
number=1
while [ "$number" -le "${WORKERS:-1}" ]; do
  set -- "$@" --worker "http://$WORKER_HOST-$number:8000"
  number=$((number + 1))
done
exec helium-proxy "$@"
