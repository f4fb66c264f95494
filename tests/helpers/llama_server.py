"""llama.cpp's HTTP server, in the package xllamacpp: python llama_server.py PORT FILE TOKENS [NAME=VALUE ...].

TOKENS is the context (-c of llama-server), and the names are those of its options (--yarn-beta-fast: yarn_beta_fast).
The KV cache is in float32, as in transformers.
"""

import sys

import xllamacpp

port, file, context, *options = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.port = file, int(context), int(port)
params.n_parallel = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
for option in options:
    name, value = option.split("=")
    setattr(params, name, float(value))
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the test has enough
