#!/usr/bin/env bash
# Everything that is to be measured on one GPU, in at most 14 minutes on an H100.
#
#     bash benchmarks/gpu.sh [--force] [--only PARTS] [OUTPUT_DIR]     (default: $OUT, else benchmarks/results-gpu)
#     bash benchmarks/gpu.sh --tiny OUTPUT_DIR          (without a GPU, tiny sizes: does the script work?)
#
# From a plain checkout, with the packages of the `train` extra; PYTHON= chooses the interpreter (python3). With pytest
# (and pytest-xdist, which is faster) the kernels' own tests run too. What the kernels compute is checked first, and
# nothing is timed when it is wrong; --force goes on all the same. A part that fails or takes longer than it may is
# named at the end, the others still run, and the exit status is 1. --only towers,training measures these alone, after the
# checks: checks, towers, first_token, training, chunks, tiles.
#
# OUTPUT_DIR gets PART.md and PART.log of every part, as soon as it ends, and gpu.md with all tables.

set -uo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }

tiny='' force='' only='' out=${OUT:-}
while (($#)); do
  case $1 in
    --tiny) tiny=yes ;;
    --force) force=yes ;;
    --only)
      (($# > 1)) || { echo "--only needs the names of parts" >&2; exit 2; }
      only=,$2,
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "unknown flag $1" >&2; usage >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
root=$(dirname "$here")
python=${PYTHON:-python3}
out=${out:-$here/results-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd) || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset LLAVA_CLIPMOE_FAST TRITON_INTERPRET # the parts choose for themselves
cd "$root" || exit 2

# ------------------------------------------------------------------------------------------------ the card, versions

if [[ -z $tiny ]]; then
  "$python" - << 'PYTHON' || exit 2
import importlib.util
import sys

needed = ("torch", "transformers", "accelerate", "tyro", "sklearn")
missing = [name for name in needed if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"{', '.join(missing)}: not installed for {sys.executable}. pip install '.[train]', or PYTHON= another one.")
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU here. Without one: bash benchmarks/gpu.sh --tiny OUTPUT_DIR")
PYTHON
fi

describe() { # the lines above the tables
  echo "# Measured by \`benchmarks/gpu.sh\`"
  echo
  if card=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null); then
    echo "- card, memory, driver: $card"
  else
    echo "- card: none that nvidia-smi knows"
  fi
  "$python" - << 'PYTHON'
import importlib.metadata
import platform

import torch

found = [f"Python {platform.python_version()}", f"CUDA {torch.version.cuda}"]
for name in ("torch", "triton", "transformers", "accelerate"):
    try:
        found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        found.append(f"{name}: not installed")
print("- " + ", ".join(found))
PYTHON
  commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
  if [[ $commit != unknown && -n $(git status --porcelain --untracked-files=no 2> /dev/null) ]]; then
    commit="$commit, with changes"
  fi
  echo "- commit $commit, $(date -u '+%Y-%m-%d %H:%M UTC')"
  if [[ -n $tiny ]]; then echo "- TINY sizes: these figures say nothing"; fi
}

# ------------------------------------------------------------------------------------------------------- the parts

LIMIT=840    # seconds, of all parts
if [[ -n $tiny ]]; then LIMIT=7200; fi # nobody is judged by a busy machine
UNFINISHED=3 # exit status of kernel_checks.py: nothing is wrong, but not all tests could run
started=$SECONDS planned=0
parts=() titles=() results=() failed=()

# part NAME TITLE SECONDS ARGUMENTS...: one part, within SECONDS and what those before it left of theirs. PART.log gets
# what it says, PART.md its tables.
part() {
  local name=$1 title=$2 budget begin=$SECONDS status result
  if [[ -n $only && $only != *,$name,* && $name != checks ]]; then return 0; fi
  planned=$((planned + $3))
  budget=$((planned - SECONDS + started))
  shift 3
  rm -f "$out/$name.md" "$out/$name.log"
  printf '\n== %s (at most %s s)\n' "$title" "$budget" >&2
  timeout --kill-after=10 "$budget" "$python" "$@" --output "$out/$name.md" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    0) result="done" ;;
    124 | 137) result="stopped after $budget s" ;;
    "$UNFINISHED") result="not finished (exit status 3)" ;;
    *) result="failed, exit status $status" ;;
  esac
  if ((status)); then
    failed+=("$title: $result")
    tail -n 15 "$out/$name.log" >&2
  fi
  if [[ ! -s $out/$name.md ]]; then
    printf 'No table. The end of %s.log:\n\n' "$name" > "$out/$name.md"
    tail -n 5 "$out/$name.log" | sed 's/^/    /' >> "$out/$name.md"
  fi
  if ((status)); then printf '\n**This part: %s** (%s.log)\n' "$result" "$name" >> "$out/$name.md"; fi
  cat "$out/$name.md"
  parts+=("$name") titles+=("$title") results+=("$title|$budget|$((SECONDS - begin))|$result")
  write_all
  return "$status"
}

write_all() { # gpu.md, with the parts so far
  local i line title budget took result
  {
    echo "$about"
    for i in "${!parts[@]}"; do
      printf '\n## %s\n\n' "${titles[i]}"
      cat "$out/${parts[i]}.md"
    done
    printf '\n## Seconds of each part\n\n| part | at most | took | result |\n|---|---:|---:|---|\n'
    for line in "${results[@]}"; do
      IFS='|' read -r title budget took result <<< "$line"
      echo "| $title | $budget | $took | $result |"
    done
    echo "| all | $LIMIT | $((SECONDS - started)) | ${#failed[@]} failed |"
  } > "$out/gpu.md.partial"
  mv "$out/gpu.md.partial" "$out/gpu.md"
}

finish() { # says how it went; the exit status
  write_all
  printf '\n' && sed -n '/^## Seconds of each part/,$p' "$out/gpu.md"
  echo "All tables: $out/gpu.md"
  if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    return 1
  fi
}

about=$(describe)
echo "$about"

if [[ -n $tiny ]]; then
  place=(--device cpu --tiny)
  towers=(--processes one --dtypes fp32 --turns 1 --runs 1)
  language=(--dtype fp32 --rounds 1)
  whole=(--precision fp32)
  recipe=(--precision fp32 --chunk-size 2 auto)
  export TRITON_INTERPRET=1 # for the checks: the kernels on a CPU
  planned=$((LIMIT - 840))
else
  place=(--device cuda)
  towers=(--batches 1 8 32 --dtypes fp16 bf16 --turns 3 --runs 4)
  language=(--language vicuna-7b --dtype fp16 --prompt 64 --rounds 11)
  whole=(--images 64 --rounds 1 --steps 4)
  recipe=(--images 160 --tokens 200 --chunk-size 10 auto --rounds 1 --steps 2 --no-without-kernels)
fi

part checks "Kernels against the loop" 170 benchmarks/kernel_checks.py "${place[@]}" --seconds "$((planned + 150))"
status=$?
unset TRITON_INTERPRET
if ((status != 0 && status != UNFINISHED && status != 124 && status != 137)) && [[ -z $force ]]; then
  echo "The kernels do not compute here what the loop computes (see above): nothing was timed. --force goes on." >&2
  finish
  exit 1
fi
part towers "Vision towers" 270 benchmarks/tower_speed.py "${place[@]}" "${towers[@]}"
part first_token "First token of a LLaVA" 70 benchmarks/llava_first_token.py "${place[@]}" "${language[@]}"
part training "Training, in one piece" 120 benchmarks/encoder_training.py "${place[@]}" "${whole[@]}"
part chunks "Training, in the recipe's chunks and in the largest" 130 \
  benchmarks/encoder_training.py "${place[@]}" "${recipe[@]}"
left=$((LIMIT - SECONDS + started - 3))
if [[ -n $tiny ]]; then
  results+=("Kernels' tiles|$left|0|left out: needs a GPU")
elif [[ -n $only && $only != *,tiles,* ]]; then
  :
elif ((left < 10)); then
  results+=("Kernels' tiles|$left|0|left out: no time left")
  failed+=("Kernels' tiles: no time left")
else
  planned=$((LIMIT - 3))
  part tiles "Kernels' tiles" 0 benchmarks/kernel_tiles.py
fi
finish
