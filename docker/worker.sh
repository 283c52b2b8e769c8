#!/bin/sh
# Starts vLLM in one of WORKERS equal containers, each on GPUs of its own: container number n of those named
# $WORKER_HOST-1, -2, … takes GPUs (n-1) × GPUS_PER_WORKER and up. Arguments are passed on to vLLM.
set -eu
own=" $(hostname -I) "
index=0
number=1
while [ "$number" -le "${WORKERS:-1}" ]; do
  # (Empty while a container that starts later has no name yet.)
  address=$(getent hosts "$WORKER_HOST-$number" | cut -d ' ' -f 1)
  case "$own" in *" ${address:-none} "*) index=$((number - 1)) ;; esac
  number=$((number + 1))
done
count=${GPUS_PER_WORKER:-1}
devices=$((index * count))
number=1
while [ "$number" -lt "$count" ]; do
  devices="$devices,$((index * count + number))"
  number=$((number + 1))
done
export CUDA_VISIBLE_DEVICES="$devices"
echo "worker $((index + 1)) of ${WORKERS:-1}: GPUs $devices" >&2
# The plugin is mounted below /opt/helium; it needs vLLM and nothing else.
export PYTHONPATH="/opt/helium${PYTHONPATH:+:$PYTHONPATH}"
exec vllm serve "$MODEL" \
  --host 0.0.0.0 --port 8000 \
  --tensor-parallel-size "$count" \
  --enable-prompt-tokens-details \
  --scheduling-policy priority \
  --kv-transfer-config '{"kv_connector":"HeliumConnector","kv_connector_module_path":"helium_proxy.vllm_plugin","kv_role":"kv_producer"}' \
  --kv-events-config '{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558","topic":"kv-events"}' \
  "$@"
