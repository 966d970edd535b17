"""A stand-in for SLURM on this machine: the commands that submitit calls, as scripts in a folder on the PATH.

A job script that is handed to `sbatch` runs at once in the background, each task of its array as a process. A
task that asks `scontrol` to be queued again runs once more when it has ended.
"""

JOB_ID = "4242"

_COMMANDS = {
    "sbatch": f"""
script=$(mktemp "$home/script.XXXXXX")
cp "$1" "$script"  # whoever submits it moves it away
echo "Submitted batch job {JOB_ID}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
    (
        export SLURM_ARRAY_JOB_ID={JOB_ID} SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$(({JOB_ID} + task))
        while true; do
            bash "$script" || true
            rm "$home/again.{JOB_ID}_$task" || break
        done
        touch "$home/ended.{JOB_ID}_$task"
    ) </dev/null >/dev/null 2>&1 &
done
""",
    "srun": """
while [[ $1 == --* ]]; do
    [ "$1" = --output ] && output=$2 && shift
    shift
done
job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
output=${output//%A_%a/$job}
output=${output//%t/0}
mkdir -p "$(dirname "$output")"
echo $$ >"$home/pid.$job"
exec "$@" >>"$output" 2>&1
""",
    "scontrol": """
[ "$1" = requeue ]
touch "$home/again.$2"
""",
    "sacct": """
echo "JobID|State|NodeList"
for pid in "$home"/pid.*; do
    job=${pid##*/pid.}
    state=RUNNING
    [ -e "$home/ended.$job" ] && state=COMPLETED
    echo "$job|$state|here"
done
""",
}


def install(folder):
    """Write the commands into a folder that shall be on the PATH; return it."""
    folder.mkdir()
    for name, text in _COMMANDS.items():
        file = folder / name
        file.write_text(f'#!/bin/bash\nset -eu\nhome=$(dirname "$0")\n{text}')
        file.chmod(0o755)
    return folder
