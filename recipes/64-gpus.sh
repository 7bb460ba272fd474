#!/usr/bin/env bash
# Stable Diffusion 1 on 64 GPUs: the same file on each of eight machines, FIRST=host0 NODES=8. 2,048 pictures a step, 32 on each GPU.
#
#   recipes/64-gpus.sh RUN LATENTS [FLAGS]
#
# Begin with the networks that stay as they are, and with latents that they have made:
#   sd-nb convert stable-diffusion-v1-5/stable-diffusion-v1-5 RUN/model
#   torchrun --standalone --nproc_per_node=8 -m sd_nb.data.encode SHARDS LATENTS --model RUN/model --size 512
# The same command again goes on where the run was. Add --dry-run to see memory and time first.
set -euo pipefail
run=${1:?usage: recipes/64-gpus.sh RUN LATENTS [FLAGS]}
latents=${2:?usage: recipes/64-gpus.sh RUN LATENTS [FLAGS]}
shift 2
nodes=${NODES:-8}            # machines of eight GPUs each; run this file on every one of them
first=${FIRST:?FIRST: the name of the machine where the others meet}
exec torchrun --nnodes="$nodes" --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_id=sd_nb --rdzv_endpoint="$first:29500" \
  -m sd_nb.train -- sd1 --batch 2048 --precision bf16 --channels-last --compile --warmup 10000 \
  --run "$run" --data "$latents" "$@"
