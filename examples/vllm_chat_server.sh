#!/bin/sh
# A chat server with KVortex: vLLM's own, with one flag more. Ctrl-C ends it.
#
#     examples/vllm_chat_server.sh MODEL [options of `vllm serve`]
#
#     KVORTEX_POOL=16GiB    pinned host memory for KV
#     KVORTEX_PORT=8000     where it listens, on this machine only
#
# --enable-prompt-tokens-details lets answers say how much of their prompt was cached. Talk to it with
# `python examples/vllm_chat_client.py`, or any client of the OpenAI API.
set -eu
if [ $# -lt 1 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1
shift
exec vllm serve "$model" --host 127.0.0.1 --port "${KVORTEX_PORT:-8000}" --enable-prompt-tokens-details \
    --kv-transfer-config "{\"kv_connector\": \"KVortexConnector\", \"kv_connector_module_path\": \"kvortex.vllm\",
        \"kv_role\": \"kv_both\", \"kv_connector_extra_config\": {\"pool\": \"${KVORTEX_POOL:-16GiB}\"}}" "$@"
