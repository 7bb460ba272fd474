#!/usr/bin/env bash
# Stable Diffusion 1 on eight A100 of 80 GB: 2,048 pictures a step, in pieces of 32.
#
#   recipes/8x-a100.sh RUN LATENTS [FLAGS]
#
# Begin with the networks that stay as they are, and with latents that they have made:
#   sd-nb convert stable-diffusion-v1-5/stable-diffusion-v1-5 RUN/model
#   torchrun --standalone --nproc_per_node=8 -m sd_nb.data.encode SHARDS LATENTS --model RUN/model --size 512
# The same command again goes on where the run was. Add --dry-run to see memory and time first.
set -euo pipefail
run=${1:?usage: recipes/8x-a100.sh RUN LATENTS [FLAGS]}
latents=${2:?usage: recipes/8x-a100.sh RUN LATENTS [FLAGS]}
shift 2
exec torchrun --standalone --nproc_per_node=8 --max-restarts=3 \
  -m sd_nb.train -- sd1 --batch 2048 --accumulate 8 --precision bf16 --channels-last --compile --warmup 10000 \
  --run "$run" --data "$latents" "$@"
