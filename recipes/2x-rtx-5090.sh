#!/usr/bin/env bash
# SD-From-Scratch's run on two RTX 5090 (32 GB each): its network, pieces of 24 pictures on each card, two of them a step.
#
#   recipes/2x-rtx-5090.sh RUN LATENTS [FLAGS]
#
# Begin with the networks that stay as they are, and with latents that they have made:
#   sd-nb convert stable-diffusion-v1-5/stable-diffusion-v1-5 RUN/model
#   torchrun --standalone --nproc_per_node=2 -m sd_nb.data.encode SHARDS LATENTS --model RUN/model --size 512
# The same command again goes on where the run was. Add --dry-run to see memory and time first.
set -euo pipefail
run=${1:?usage: recipes/2x-rtx-5090.sh RUN LATENTS [FLAGS]}
latents=${2:?usage: recipes/2x-rtx-5090.sh RUN LATENTS [FLAGS]}
shift 2
exec torchrun --standalone --nproc_per_node=2 --max-restarts=3 \
  -m sd_nb.train -- seed --batch 96 --accumulate 2 --precision bf16 --checkpointing --channels-last --decay 1 --fall cosine \
  --run "$run" --data "$latents" "$@"
