#!/usr/bin/env bash
# From a fresh checkout to recorded attention: sets up, makes a demo policy, evaluates it on LIBERO, looks at the result.
#
#   bash scripts/quickstart.sh
#
# Needs Linux, Python 3.12 or newer and a network; no GPU. Can be run twice.
# LIBERO_ASSETS=<archive or folder>  LIBERO's assets on a machine that cannot reach the Hub.
# MUJOCO_GL=osmesa                   renders with OSMesa instead of EGL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

policy=outputs/quickstart/pi05_tiny
results=outputs/quickstart/eval

# Sourced for its `say` and `run`, and for the environment that it makes.
source scripts/setup.sh eval
export MUJOCO_GL="${MUJOCO_GL:-egl}"

say "A demo policy: the real Pi0.5 code with small towers and random weights"
run lerobot-attn demo-policy "$policy" --overwrite </dev/null

device="$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' </dev/null)"
say "Evaluating it on LIBERO, with attention recorded (device: $device; some minutes on a CPU)"
# A folder that holds recorded episodes is refused.
run rm -rf "$results"
echo "+ export MUJOCO_GL=$MUJOCO_GL"
run lerobot-eval \
    --policy.path="$policy" \
    --policy.device="$device" \
    --env.type=libero \
    --env.task=libero_object \
    --env.task_ids='[0]' \
    --env.episode_length=40 \
    --eval.n_episodes=2 \
    --eval.batch_size=1 \
    --eval.save_attention_maps=true \
    --output_dir="$results" </dev/null

say "What was recorded"
run lerobot-attn inspect "$results" </dev/null

store="$(find "$results/attention" -maxdepth 2 -name 'episode_*.zarr' | sort | head -n 1 || true)"
[ -n "$store" ] || { echo "error: $results/attention holds no episode store" >&2; exit 1; }
say "Do maps, frames and videos belong together?"
run lerobot-attn verify "$store" -o "$results/look/contact-sheet.png" </dev/null

say "Where and at what it looked"
run lerobot-attn plot "$store" --kind image -o "$results/look/image.png" </dev/null
run lerobot-attn plot "$store" --kind combined -o "$results/look/combined.png" </dev/null
run lerobot-attn overlay "$store" -o "$results/look/overlay.mp4" </dev/null

say "Where to look next"
cat <<TEXT
Pictures and a video:
$(find "$results/look" -type f | sort | sed 's/^/    /')

One Zarr store per episode, one MP4 per camera beside it:
$(find "$results/attention" -maxdepth 2 \( -name 'episode_*.zarr' -o -name '*.mp4' \) | sort | sed 's/^/    /')

Activate the environment, and explore it in the browser:

    source .venv/bin/activate
    lerobot-attn view $results

Three ways to load a store, in Python:

    from lerobot_attn import open_episode
    episode = open_episode("$store")

    import xarray as xr
    dataset = xr.open_zarr("$store")

    import zarr
    group = zarr.open_group("$store", mode="r")

A walk through all of it: examples/walkthrough.ipynb

The demo policy's weights are random: it solves no task and its attention means nothing. It shows that everything
works. For real maps give --policy.path a trained Pi0.5.
TEXT
