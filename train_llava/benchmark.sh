# shellcheck shell=bash
# What eval/NAME.sh do: they source this file with the benchmark, its folder in playground/data/eval and their arguments.
set -euo pipefail
NAME=$1
DATA=${DATA:-playground/data/eval/$2}
shift 2

for word in "$@"; do
    [[ $word == -h || $word == --help ]] || continue
    cat <<HELP
usage: MODEL=LLAVA [DATA=FOLDER] $(basename "$0") [FLAG VALUE ...]

$(sed -n '2s/^# //p' "$0")

settings (environment variables)
  MODEL   the LLaVA to evaluate: a directory with "llava" in its name, or a hub id
  DATA    the benchmark's folder; now $DATA
  CUDA_VISIBLE_DEVICES   the GPUs that share the questions

FLAGs go to llava-clipmoe eval-llava, whose --help lists them:
    MODEL=llava-v1.5-7b-clipmoe $(basename "$0") --batch-size 16 --limit 100
HELP
    exit 0
done
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava "$NAME" --model-path "$MODEL" --data "$DATA" "$@"
