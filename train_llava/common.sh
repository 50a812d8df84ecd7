# shellcheck shell=bash
# What pretrain.sh, finetune.sh, finetune_lora.sh and finetune_qlora.sh do: they source this file with their stage and
# arguments.
#
# Every setting is an environment variable with a default; whatever follows the script's name goes to LLaVA's trainer
# behind our own flags, so that its parser takes the later one. `main` checks, builds the array COMMAND and runs it.

((BASH_VERSINFO[0] >= 4)) || { echo "error: bash 4 or newer is needed (this is $BASH_VERSION)." >&2; exit 2; }
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
COMMAND=()
DRY_RUN=${DRY_RUN:-0}

# Flags that the checks and the batch arithmetic must know: given on the command line, they set the variable.
declare -A VARIABLE_OF=(
    [--model_name_or_path]=MODEL [--vision_tower]=VISION_TOWER [--data_path]=DATA [--image_folder]=IMAGES
    [--output_dir]=OUTPUT [--pretrain_mm_mlp_adapter]=PROJECTOR [--deepspeed]=DEEPSPEED
    [--per_device_train_batch_size]=PER_DEVICE_BATCH
    [--mm_tune_vision_tower]=TUNE_TOWER [--mm_vision_tower_lr]=TOWER_LR [--version]=CONVERSATION
)

fail() { # a message, perhaps of several lines
    echo "error: $1" >&2
    exit 2
}

problem() { # an error, which a dry run only reports
    [[ $DRY_RUN == 1 ]] || fail "$1"
    echo "warning: $1" >&2
}

flags() { COMMAND+=("$@"); }

# ------------------------------------------------------------------------------------------------------------ settings

stage_defaults() { # pretrain, finetune, lora or qlora
    STAGE=$1
    # LLaVA-1.5's global batch and learning rate; a GPU's batch; DeepSpeed's engine; the file that upstream writes last
    case $STAGE in
        pretrain) set -- 256 1e-3 32 zero2 mm_projector.bin ;;
        finetune) set -- 128 2e-5 16 zero3 training_args.bin ;;
        lora) set -- 128 2e-4 16 zero3 non_lora_trainables.bin ;;
        qlora) set -- 128 2e-4 16 zero2 non_lora_trainables.bin ;;
    esac
    GLOBAL_BATCH=${GLOBAL_BATCH:-$1}
    LR=${LR:-$2}
    BATCH_GIVEN=${PER_DEVICE_BATCH:-}
    PER_DEVICE_BATCH=${PER_DEVICE_BATCH:-$3} # a default is lowered to what fits the number of GPUs
    STAGE_ZERO=$4
    FINISHED=$5
    if [[ $STAGE == pretrain ]]; then
        DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
        IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
        unset 'VARIABLE_OF[--version]' # captions have no turns: "plain" whatever CONVERSATION says
    else
        DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
        IMAGES=${IMAGES:-playground/data}
    fi
    : "${MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=clipmoe-336}" "${OUTPUT:=}" "${PROJECTOR:=}"
    : "${CONVERSATION:=auto}" "${TUNE_TOWER:=}" "${TOWER_LR:=}"
    : "${EPOCHS:=1}" "${SAVE_STEPS:=500}" "${WORKERS:=4}" "${REPORT_TO:=none}"
    : "${DEVICE:=auto}" "${GPUS:=}" "${LAUNCHER:=auto}" "${DEEPSPEED:=auto}"
    : "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}" "${MASTER_PORT:=29500}"
    PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}
}

usage() {
    cat <<HELP
usage: [SETTING=VALUE ...] $(basename "$0") [--dry-run] [LLAVA_TRAINER_FLAG VALUE ...]

$(sed -n '2s/^# //p' "$0")

settings (environment variables)                                   now
  MODEL             language model: directory or hub id            $MODEL
  VISION_TOWER      registered name, directory or hub id           $VISION_TOWER
  DATA              LLaVA conversation JSON                        $DATA
  IMAGES            folder that the JSON's image paths start from  $IMAGES
  OUTPUT            where checkpoints and the result go            $OUTPUT
  PROJECTOR         stage 2: mm_projector.bin of stage 1, or
                    "none" when MODEL is a LLaVA already           ${PROJECTOR:--}
  CONVERSATION      stage 2: conversation template (--version);
                    auto: what MODEL's directory says, else a
                    guess by its name                              $(conversation_now)
  TUNE_TOWER        stage 2: train of the tower, too, its routers,
                    experts or lora (--mm_tune_vision_tower)       ${TUNE_TOWER:-nothing}
  TOWER_LR          their learning rate (--mm_vision_tower_lr)     ${TOWER_LR:-LR}
  GLOBAL_BATCH      samples per optimiser step, over all GPUs      $GLOBAL_BATCH
  PER_DEVICE_BATCH  samples a GPU holds at once; less needs less
                    memory, and gradients are accumulated          $PER_DEVICE_BATCH
  LR  EPOCHS  SAVE_STEPS  WORKERS  REPORT_TO                       $LR  $EPOCHS  $SAVE_STEPS  $WORKERS  $REPORT_TO
  DEVICE            auto (a GPU if there is one), cuda, cpu        $DEVICE
  GPUS              processes on this node; default: its GPUs      ${GPUS:-auto}
  NNODES NODE_RANK MASTER_ADDR MASTER_PORT                         $NNODES $NODE_RANK ${MASTER_ADDR:-127.0.0.1} $MASTER_PORT
                    many nodes: start the same command on each one with its NODE_RANK
  DEEPSPEED         auto, zero2, zero3, a JSON file, none          $DEEPSPEED
                    auto: $STAGE_ZERO on GPUs where DeepSpeed is installed (one GPU too: it keeps fp32 master
                    weights), else none
  LAUNCHER          auto, torchrun, deepspeed, accelerate, python  $LAUNCHER
                    auto: python for one process without DeepSpeed, else torchrun
  PYTHON            interpreter that has LLaVA                     $PYTHON
  DRY_RUN=1         print the command and stop, like --dry-run

Everything else on the command line goes to LLaVA's trainer as it is, after the flags above, and wins over them:
    MODEL=models/vicuna-7b-v1.5 $(basename "$0") --model_max_length 1024 --logging_steps 10

LLaVA picks the model's class by the folder's name, so OUTPUT's last part must hold "llava" (and "lora" for adapters).
A run that was stopped goes on from its last checkpoint when the same command is given again.
Where these scripts are in an installed package:
    $PYTHON -c 'import train_llava; print(train_llava.__path__[0])'
HELP
}

read_arguments() { # sets EXTRA, DRY_RUN and the variables of VARIABLE_OF
    EXTRA=()
    while (($#)); do
        local name=${1%%=*}
        if [[ $1 == --dry-run ]]; then
            DRY_RUN=1
        elif [[ $1 == -h || $1 == --help ]]; then
            HELP=1
        elif [[ -n $name && -n ${VARIABLE_OF[$name]:-} ]]; then
            if [[ $1 == *=* ]]; then
                printf -v "${VARIABLE_OF[$name]}" %s "${1#*=}"
            else
                (($# > 1)) || fail "$1 needs a value."
                printf -v "${VARIABLE_OF[$name]}" %s "$2"
                shift
            fi
        else
            EXTRA+=("$1")
        fi
        [[ $name != --per_device_train_batch_size ]] || BATCH_GIVEN=1
        shift
    done
}

path_defaults() { # what depends on MODEL and the tower
    local model=${MODEL%/} tower=${VISION_TOWER%/}
    local stem="checkpoints/llava-${model##*/}-${tower##*/}"
    [[ $STAGE == finetune ]] || OUTPUT=${OUTPUT:-$stem-$STAGE}
    OUTPUT=${OUTPUT:-$stem}
    OUTPUT=${OUTPUT%/} # upstream splits at "/" and would see an empty name
    [[ $STAGE == pretrain ]] || PROJECTOR=${PROJECTOR:-$stem-pretrain/mm_projector.bin}
}

# -------------------------------------------------------------------------------------------------------------- checks

check_numbers() {
    local name
    for name in GLOBAL_BATCH PER_DEVICE_BATCH NNODES SAVE_STEPS ${GPUS:+GPUS}; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name is '${!name}'; it must be a whole number above 0."
    done
    [[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NNODES ]] ||
        fail "NODE_RANK is '$NODE_RANK'; with NNODES=$NNODES it runs from 0 to $((NNODES - 1))."
    ((NNODES == 1)) || [[ -n $MASTER_ADDR ]] ||
        fail "NNODES=$NNODES needs MASTER_ADDR, the address of node 0, the same on every node."
    MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
    [[ $DEVICE =~ ^(auto|cuda|cpu)$ ]] || fail "DEVICE is '$DEVICE'; it may be auto, cuda or cpu."
    [[ -z $TUNE_TOWER || $STAGE != pretrain ]] ||
        fail "TUNE_TOWER=$TUNE_TOWER belongs to stage 2; stage 1 trains the projector alone."
    [[ $TUNE_TOWER =~ ^(|routers|experts|lora)$ ]] ||
        fail "TUNE_TOWER is '$TUNE_TOWER'; it may be routers, experts or lora, or empty: the tower stays frozen."
    [[ -z $TOWER_LR || -n $TUNE_TOWER ]] || fail "TOWER_LR=$TOWER_LR needs TUNE_TOWER: without it the tower is frozen."
    [[ $LAUNCHER =~ ^(auto|torchrun|deepspeed|accelerate|python)$ ]] ||
        fail "LAUNCHER is '$LAUNCHER'; it may be auto, torchrun, deepspeed, accelerate or python."
}

probe() { # DEVICE GPUS: what probe.py says of this interpreter and MODEL
    "$PYTHON" - "$1" "$2" "$MODEL" "$CONVERSATION" <"$HERE/probe.py"
}

ask_python() { # sets HAS_LLAVA, HAS_DEEPSPEED, HAS_FLASH, DEVICE, GPUS, TEMPLATE and UNFIT
    [[ -n $PYTHON ]] || fail "there is no python on the PATH. Activate LLaVA's environment, or set PYTHON=."
    local answer
    answer=$(probe "$DEVICE" "${GPUS:-0}" 2>/dev/null) ||
        fail "$PYTHON: $(probe "$DEVICE" "${GPUS:-0}" 2>&1 | tail -n 1)
If a package is missing, activate LLaVA's environment, or set PYTHON= to its interpreter."
    read -r HAS_LLAVA HAS_DEEPSPEED HAS_FLASH DEVICE GPUS TEMPLATE UNFIT <<<"$answer"
    ((GPUS > 0)) || fail "DEVICE=cuda, but torch sees no GPU on this node. Give GPUS= for a dry run, or DEVICE=cpu."
    ((HAS_LLAVA)) || problem "upstream LLaVA is not installed for $PYTHON. Install it without its pins
    pip install --no-deps llava-torch==1.2.2.post1
or run this in a LLaVA checkout. (The package called llava on the index is another project.)"
}

conversation_now() { # for the help: "auto: llama_3"
    local -a found=()
    [[ $CONVERSATION != auto || -z $PYTHON ]] || read -ra found <<<"$(probe cpu 1 2>/dev/null)"
    echo "$CONVERSATION${found[5]:+: ${found[5]}}"
}

check_conversation() {
    [[ $STAGE != pretrain ]] || return 0
    [[ -z $UNFIT ]] || fail "CONVERSATION=$TEMPLATE does not fit MODEL=$MODEL: $UNFIT."
    [[ $CONVERSATION == auto && $TEMPLATE != v1 ]] || return 0
    local why="MODEL's directory says so"
    [[ -d $MODEL ]] || why="a guess by MODEL's name"
    echo "note: the conversation template is $TEMPLATE ($why; CONVERSATION= sets another)." >&2
}

check_batch() { # sets ACCUMULATION, so that the global batch is held whatever the number of GPUs
    local world=$((GPUS * NNODES)) fits
    ((GLOBAL_BATCH % world == 0)) || fail "GLOBAL_BATCH=$GLOBAL_BATCH cannot be shared evenly by $world processes \
(GPUS=$GPUS x NNODES=$NNODES). Use another number of GPUs, or GLOBAL_BATCH=$((GLOBAL_BATCH / world * world + world))."
    for ((fits = PER_DEVICE_BATCH; (GLOBAL_BATCH / world) % fits; fits--)); do :; done
    [[ -z $BATCH_GIVEN || $fits == "$PER_DEVICE_BATCH" ]] || fail "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of $world \
processes x PER_DEVICE_BATCH=$PER_DEVICE_BATCH. PER_DEVICE_BATCH=$fits fits."
    PER_DEVICE_BATCH=$fits
    ACCUMULATION=$((GLOBAL_BATCH / world / fits))
}

choose_engine() { # sets ENGINE (a JSON file, or nothing) and LAUNCHER
    [[ $DEEPSPEED != auto ]] || { ((HAS_DEEPSPEED)) && [[ $DEVICE == cuda ]] && DEEPSPEED=$STAGE_ZERO || DEEPSPEED=none; }
    case $DEEPSPEED in
        none) ENGINE= ;;
        zero2 | zero3) ENGINE=$HERE/$DEEPSPEED.json ;;
        *) ENGINE=$DEEPSPEED && { [[ -f $ENGINE ]] || fail "DEEPSPEED=$DEEPSPEED is neither zero2, zero3, none nor a file."; } ;;
    esac
    if [[ -n $ENGINE ]]; then
        ((HAS_DEEPSPEED)) || problem "DEEPSPEED=$DEEPSPEED, but DeepSpeed is not installed for $PYTHON: pip install deepspeed"
        [[ $STAGE != qlora || $DEEPSPEED != zero3 ]] ||
            fail "a model in 4 bits cannot be sharded by ZeRO-3 (transformers refuses it). Use DEEPSPEED=zero2."
    elif [[ $STAGE == finetune ]]; then
        echo "warning: without DeepSpeed LLaVA's trainer updates the language model's bf16 weights themselves, and steps \
of LR=$LR are mostly rounded away. Install DeepSpeed (DEEPSPEED=zero3), use finetune_lora.sh, or add --bf16 False." >&2
    fi
    local world=$((GPUS * NNODES))
    if [[ $LAUNCHER == auto ]]; then
        ((world == 1)) && [[ -z $ENGINE ]] && LAUNCHER=python || LAUNCHER=torchrun
    fi
    [[ $LAUNCHER != python || $world == 1 ]] ||
        fail "LAUNCHER=python starts one process, but GPUS=$GPUS x NNODES=$NNODES. Use LAUNCHER=torchrun."
    [[ $LAUNCHER != deepspeed || $NNODES == 1 ]] ||
        fail "LAUNCHER=deepspeed reaches other nodes by ssh; with NNODES=$NNODES use LAUNCHER=torchrun (the DeepSpeed \
engine is used all the same) and start this command on every node."
}

looks_like_hub_id() { [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$ ]]; }

check_inputs() {
    if [[ -d $MODEL ]]; then
        [[ -f $MODEL/config.json ]] || problem "MODEL=$MODEL has no config.json: it is no model directory."
    elif ! looks_like_hub_id "$MODEL"; then
        problem "MODEL=$MODEL is neither a model directory nor a hub id (org/name)."
    fi
    [[ $MODEL != *mpt* ]] || problem "upstream LLaVA takes every path with 'mpt' in it for an MPT model, and MODEL=$MODEL \
has it: rename the folder, or link to it under another name."
    [[ -f $DATA ]] || problem "DATA=$DATA does not exist. It is LLaVA's conversation JSON; see docs/train-llava.md."
    [[ -d $IMAGES ]] || problem "IMAGES=$IMAGES is no folder. It is where the image paths in DATA start from."
    [[ ! -f $DATA || ! -d $IMAGES ]] || check_first_image
    local reason
    reason=$("$PYTHON" -m llava_clipmoe.cli towers "$VISION_TOWER" 2>&1 >/dev/null) ||
        problem "VISION_TOWER=$VISION_TOWER: ${reason#error: }"
    [[ $STAGE == pretrain || $PROJECTOR == none || -f $PROJECTOR ]] || problem "stage 2 needs the projector of stage 1, \
and PROJECTOR=$PROJECTOR does not exist.
Run pretrain.sh with the same MODEL and VISION_TOWER first, or give PROJECTOR=.../mm_projector.bin
(PROJECTOR=none if MODEL is a LLaVA already)."
}

check_first_image() { # a wrong folder is the commonest mistake, and LLaVA finds it only after loading 7 billion weights
    local image first=
    while read -r image; do
        [[ ! -f $IMAGES/$image ]] || return 0
        first=${first:-$image}
    done < <(head -c 65536 "$DATA" | grep -oE '"image": *"[^"\\]+"' | sed -E 's/^"image": *"(.*)"$/\1/')
    [[ -z $first ]] || problem "none of the first images of DATA=$DATA is in IMAGES=$IMAGES (looked for \
$IMAGES/$first). IMAGES must be the folder that the JSON's paths start from."
}

check_output() {
    local name=${OUTPUT##*/} other=mpt # a Mistral may be called so
    [[ ! $TEMPLATE =~ ^(llama_3|qwen_2)$ || ${name,,} != *mistral* ]] || other=mistral
    local lower=${name,,}
    [[ $name == *llava* && $lower != *$other* ]] || fail "OUTPUT=$OUTPUT: upstream LLaVA reads the model's kind from the \
folder's name, which must hold 'llava' and must not hold '$other'. For instance OUTPUT=${OUTPUT%"$name"}llava-${lower//$other/}"
    [[ $STAGE != *lora || $name == *lora* ]] ||
        fail "OUTPUT=$OUTPUT: LLaVA recognises adapters by 'lora' in the folder's name. For instance OUTPUT=$OUTPUT-lora"
    if [[ -f $OUTPUT/$FINISHED && $DRY_RUN != 1 ]]; then
        echo "$OUTPUT is finished already ($FINISHED is there). Delete the folder, or give another OUTPUT, to train anew."
        exit 0
    fi
}

set_aside_incomplete() { # checkpoints that a kill cut short: the trainer would take the newest one and fail on it
    local checkpoint
    [[ $DRY_RUN != 1 && $NODE_RANK == 0 ]] || return 0
    for checkpoint in "$OUTPUT"/checkpoint-*; do
        # the trainer writes this file last
        [[ -d $checkpoint && ! -f $checkpoint/trainer_state.json ]] || continue
        mv "$checkpoint" "$OUTPUT/incomplete-${checkpoint##*/}.$(date +%s)"
        echo "note: $checkpoint was not written to its end; it is set aside as $OUTPUT/incomplete-${checkpoint##*/}.*" >&2
    done
}

# ------------------------------------------------------------------------------------------------------------- command

stage_flags() {
    if [[ $STAGE == pretrain ]]; then
        flags --version plain --tune_mm_mlp_adapter True
        return
    fi
    flags --version "$TEMPLATE" --image_aspect_ratio pad --group_by_modality_length True
    [[ $PROJECTOR == none ]] || flags --pretrain_mm_mlp_adapter "$PROJECTOR"
    [[ $STAGE != *lora ]] || flags --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5
    [[ $STAGE != qlora ]] || flags --bits 4
    [[ -z $TUNE_TOWER ]] || flags --mm_tune_vision_tower "$TUNE_TOWER"
    [[ -z $TOWER_LR ]] || flags --mm_vision_tower_lr "$TOWER_LR"
}

build_command() {
    # Without it DeepSpeed looks for GPUs; the printed command must carry it too.
    [[ -z $ENGINE || $DEVICE != cpu ]] || flags env DS_ACCELERATOR=cpu
    case $LAUNCHER in
        python) flags "$PYTHON" -m ;;
        torchrun) flags "$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" --nnodes "$NNODES" \
            --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m ;;
        deepspeed) flags "$PYTHON" -m deepspeed.launcher.runner --num_gpus "$GPUS" --master_port "$MASTER_PORT" --module ;;
        accelerate)
            flags "$PYTHON" -m accelerate.commands.launch --num_processes $((GPUS * NNODES)) --num_machines "$NNODES" \
                --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
                --mixed_precision no --dynamo_backend no # the trainer sets both by its own flags
            [[ $DEVICE != cpu ]] || flags --cpu
            [[ $GPUS == 1 && $NNODES == 1 || $DEVICE == cpu ]] || flags --multi_gpu
            flags -m
            ;;
    esac
    local module=llava.train.train
    ((!HAS_FLASH)) || module=llava.train.train_mem # the same with flash attention
    flags llava_clipmoe.run "$module"
    [[ -z $ENGINE ]] || flags --deepspeed "$ENGINE"
    flags --model_name_or_path "$MODEL" --data_path "$DATA" --image_folder "$IMAGES" --vision_tower "$VISION_TOWER"
    stage_flags
    flags --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 \
        --mm_use_im_start_end False --mm_use_im_patch_token False \
        --output_dir "$OUTPUT" --num_train_epochs "$EPOCHS" \
        --per_device_train_batch_size "$PER_DEVICE_BATCH" --gradient_accumulation_steps "$ACCUMULATION" \
        --learning_rate "$LR" --weight_decay 0. --lr_scheduler_type cosine
    flags --warmup_ratio 0.03 --bf16 True --gradient_checkpointing True --model_max_length 2048 \
        --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1 --logging_steps 1 \
        --dataloader_num_workers "$WORKERS" --lazy_preprocess True --report_to "$REPORT_TO"
    if [[ $DEVICE == cpu ]]; then flags --use_cpu True; else flags --tf32 True; fi
    flags ${EXTRA[@]+"${EXTRA[@]}"} # bash before 4.4 calls an empty array unset
}

print_command() { # one flag a line, quoted: paste it into a shell as it is
    local word line=
    for word in "${COMMAND[@]}"; do
        [[ $word != --* || -z $line ]] || { printf '%s \\\n   ' "$line" && line=; }
        line+="${line:+ }$(printf %q "$word")"
        [[ $line == --* ]] && line=" $line"
    done
    printf '%s\n' "$line"
}

main() { # STAGE [ARGUMENT ...]
    stage_defaults "$1"
    read_arguments "${@:2}"
    path_defaults
    [[ -z ${HELP:-} ]] || { usage && exit 0; }
    check_numbers
    ask_python
    check_conversation
    check_batch
    choose_engine
    check_output
    check_inputs
    set_aside_incomplete
    build_command
    if [[ $DRY_RUN == 1 ]]; then
        print_command
    else
        exec "${COMMAND[@]}"
    fi
}

main "$@"
