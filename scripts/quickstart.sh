#!/usr/bin/env bash
# From a fresh checkout to recorded attention: sets up, makes a demo policy, evaluates it on LIBERO, looks at the result.
#
#   bash scripts/quickstart.sh
#
# Needs Linux, Python 3.12 or newer and a network; no GPU. Can be run twice.
# POLICY=smolvla_tiny                another demo policy, also pi0_tiny: random weights, so their maps mean nothing.
# LIBERO_ASSETS=<archive or folder>  LIBERO's assets on a machine that cannot reach the Hub.
# MUJOCO_GL=osmesa                   renders with OSMesa instead of EGL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind="${POLICY:-pi05_tiny}"
policy="outputs/quickstart/$kind"
results=outputs/quickstart/eval

# Sourced for its `say` and `run`, and for the environment that it makes.
source scripts/setup.sh eval
export MUJOCO_GL="${MUJOCO_GL:-egl}"

if [ "$kind" = pi05_tiny ]; then
    what="trained in simulation to fetch what is named"
    length=280 # LeRobot's own for this suite
    about="What the demo policy can do, how it was trained and which of its layers look: $policy/README.md. It is small and
knows one suite; for your own maps give --policy.path a Pi0.5, pi0 or SmolVLA checkpoint, or another that
lerobot-attn policies lists."
else
    what="with random weights: it solves nothing, and its maps mean nothing"
    length=60
    about="This policy's weights are random. For maps that mean something leave POLICY out, or give --policy.path your own
checkpoint: Pi0.5, pi0, SmolVLA, or another that lerobot-attn policies lists."
fi
say "A demo policy: LeRobot's own code with small towers ($kind), $what"
run lerobot-attn demo-policy "$policy" --type "$kind" --overwrite </dev/null

device="$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' </dev/null)"
echo "+ export MUJOCO_GL=$MUJOCO_GL"
# A folder that holds recorded episodes is refused.
run rm -rf "$results"
# Evaluate the policy on a task of the suite, with attention recorded: number of the task, episodes.
evaluate() {
    run lerobot-eval \
        --policy.path="$policy" \
        --policy.device="$device" \
        --env.type=libero \
        --env.task=libero_object \
        --env.task_ids="[$1]" \
        --env.episode_length="$length" \
        --eval.n_episodes="$2" \
        --eval.batch_size=1 \
        --eval.save_attention_maps=true \
        --output_dir="$results/task_$1" </dev/null
}
say "Fetching the alphabet soup, twice (device: $device; about a minute on a CPU)"
evaluate 0 2
say "Another task of the suite, another word: fetching the milk"
evaluate 7 1

say "What was recorded"
run lerobot-attn inspect "$results/task_0" </dev/null

episode() { find "$results/task_$1/attention" -maxdepth 2 -name 'episode_*.zarr' | sort | head -n 1 || true; }
store="$(episode 0)"
other="$(episode 7)"
[ -n "$store" ] && [ -n "$other" ] || { echo "error: $results holds no episode store" >&2; exit 1; }
say "Do maps, frames and videos belong together?"
run lerobot-attn verify "$store" -o "$results/look/contact-sheet.png" </dev/null

say "Where and at what it looked"
run lerobot-attn plot "$store" --kind image --frames 0,20 -o "$results/look/soup.png" </dev/null
run lerobot-attn plot "$other" --kind image --frames 0,20 -o "$results/look/milk.png" </dev/null
run lerobot-attn plot "$store" --kind combined -o "$results/look/combined.png" </dev/null
run lerobot-attn overlay "$store" -o "$results/look/overlay.mp4" </dev/null

say "Where to look next"
cat <<TEXT
Pictures and a video:
$(find "$results/look" -type f | sort | sed 's/^/    /')

One Zarr store per episode, one MP4 per camera beside it:
$(find "$results" -maxdepth 4 \( -name 'episode_*.zarr' -o -name '*.mp4' \) -path '*attention*' | sort | sed 's/^/    /')

Activate the environment, and explore it in the browser:

    source .venv/bin/activate
    lerobot-attn view $results/task_0

Three ways to load a store, in Python:

    from lerobot_attn import open_episode
    episode = open_episode("$store")

    import xarray as xr
    dataset = xr.open_zarr("$store")

    import zarr
    group = zarr.open_group("$store", mode="r")

A walk through all of it: examples/walkthrough.ipynb

$about
TEXT
