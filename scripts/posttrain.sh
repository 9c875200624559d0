#!/usr/bin/env bash
# Fine-tune from a menu, or from a cluster script.   usage: scripts/posttrain.sh [COMMAND] [--dry-run] [WORD ...]
#
#   sft      all weights            MODEL, DATA, FORMAT=alpaca, TEMPLATE=alpaca
#   hf       all weights of a Hugging Face directory or hub id, with its own chat template   MODEL (needed), DATA
#   lora     a LoRA adapter         MODEL, DATA, FORMAT=alpaca, TEMPLATE=alpaca
#   chat     a LoRA adapter on conversations   MODEL, DATA, FORMAT=messages, TEMPLATE=chatml
#   sweep    lora for each pair of LRS=1e-4,2e-4 and RANKS=8,16
#   export   a finished run (RUN) as a Hugging Face directory (OUT); an adapter is merged unless MERGE is 0, false, no, off or empty
#   menu     asks for all of this; also without a command, in a terminal
#
# MODEL         a file of conf/model (llama3_8b), a Hugging Face directory, or a hub id. Unset: the demo's small model
# DATA          file, folder or hf://owner/name. Unset: the demo's data
# FORMAT        alpaca, dolly, oasst, sharegpt, messages, prompt_completion: a file of conf/data
# TEMPLATE      alpaca, chatml, llama3, ..., or model for the tokenizer's own: a file of conf/template
# OUT           run directory, or the target of an export
# GPUS          processes on each machine, one per GPU. Unset: all visible GPUs
# NNODES NODE_RANK MASTER_ADDR MASTER_PORT   a run on several machines: the same command on each (docs/slurm.md)
# PYTHON        interpreter. Unset: the project's .venv, else python3
#
# In a task of srun (one per node) the machines are Slurm's own; under torchrun they are torchrun's. Further words go to
# posttrain as they are: trainer.epochs=2 optimizer.lr=1e-5 parallelism=tp2. --dry-run prints the command and ends.
# As a Slurm job: launch.submit=true hydra.launcher.partition=...; its script, unsubmitted: hydra.launcher.dry_run=true as well
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "posttrain.sh: $*" >&2
    exit 2
}

quoted() { # a value in Hydra's grammar
    if [[ $1 =~ ^[A-Za-z0-9_./:@%+~-]+$ ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\\\'}"; fi
}

model_words() {
    if [[ -z ${MODEL:-} ]]; then return; fi
    if [[ $MODEL != */* && -f $root/conf/model/$MODEL.yaml ]]; then
        words+=("model=$MODEL")
    else
        words+=(model=hf "model.path=$(quoted "$MODEL")")
    fi
}

data_words() { # $1: format, $2: template where there are data
    if [[ -z ${DATA:-} ]]; then
        [[ -z ${TEMPLATE:-} ]] || words+=("template=$TEMPLATE")
        return
    fi
    words+=("data=${FORMAT:-$1}" "data.path=$(quoted "$DATA")" "template=${TEMPLATE:-$2}")
}

slurm_places() { # NNODES and the rest from the task of srun that this is
    if [[ -n ${NNODES:-} || ${SLURM_NNODES:-1} -le 1 ]]; then return; fi
    [[ ${SLURM_STEP_ID:-} =~ ^[0-9]+$ ]] ||
        fail "this job has $SLURM_NNODES nodes: start it on each with srun --ntasks-per-node=1 $0 ..."
    [[ ${SLURM_LOCALID:-0} == 0 && ${SLURM_NTASKS:-$SLURM_NNODES} == "$SLURM_NNODES" ]] ||
        fail "one task per node, please: srun --ntasks-per-node=1 $0 ..."
    NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
    OUT=${OUT:-outputs/slurm-$SLURM_JOB_ID}
}

place_words() { # $1: key of the output directory
    if [[ -z ${TORCHELASTIC_RUN_ID:-} ]]; then
        slurm_places
        [[ -z ${GPUS:-} ]] || words+=("parallelism.nproc_per_node=$GPUS")
        if [[ ${NNODES:-1} != 1 ]]; then
            [[ -n ${OUT:-} ]] || fail "NNODES=$NNODES: set OUT, a run directory that all machines see"
            [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES: set MASTER_ADDR to the name or address of the first machine"
            words+=("launch.nnodes=$NNODES" "launch.node_rank=${NODE_RANK:-0}"
                "launch.master_addr=$MASTER_ADDR" "launch.master_port=${MASTER_PORT:-29500}")
        fi
    fi
    [[ -z ${OUT:-} ]] || words+=("$1=$(quoted "$OUT")")
}

ask() { # $1: variable, $2: question, $3: what an empty answer means
    local answer
    read -r -p "$2 [${!1:-$3}]: " answer || exit 1
    if [[ -n $answer ]]; then printf -v "$1" '%s' "$answer"; fi
}

menu() {
    local answer names=(sft hf lora chat sweep export)
    printf '  1 all weights\n  2 all weights of a Hugging Face model, own chat template\n  3 LoRA\n'
    printf '  4 LoRA on conversations\n  5 LoRA, several learning rates and ranks\n  6 export a run\n'
    read -r -p 'What is to be done? (1-6, q) ' answer || exit 1
    case $answer in
    [1-6]) command=${names[answer - 1]} ;;
    q) exit 0 ;;
    *) fail "$answer: 1 to 6, or q" ;;
    esac
    if [[ $command == export ]]; then
        ask RUN 'Run directory' 'none'
        ask OUT 'Target directory' 'none'
    else
        ask MODEL 'Model: a name, a directory or a hub id' 'the demo model'
        ask DATA 'Data: a file, a folder or hf://owner/name' 'the demo data'
        if [[ -n ${DATA:-} ]]; then
            ask FORMAT 'Format of the data' 'as usual for this choice'
            ask TEMPLATE 'Template' 'as usual for this choice'
        fi
        ask OUT 'Run directory' 'outputs/DATE/TIME'
    fi
    confirm=yes
}

command='' dry='' confirm='' words=() extra=()
while [[ $# -gt 0 ]]; do
    case $1 in
    -h | --help) command=help ;;
    --dry-run) dry=yes ;;
    sft | hf | lora | chat | sweep | export | menu)
        [[ -z $command ]] || fail "$command and $1: one command, please"
        command=$1
        ;;
    --cfg | -c | --package | -p | --config-dir | -cd | --info | -i) # Hydra's, with a value of their own
        extra+=("$1" "${2:?"a value for $1"}")
        shift
        ;;
    -* | *=* | \~*) extra+=("$1") ;;
    *) fail "$1: no such command; sft, hf, lora, chat, sweep, export or menu (--help says more)" ;;
    esac
    shift
done
if [[ -z $command && -t 0 && ${#extra[@]} -eq 0 ]]; then command=menu; fi
if [[ $command == menu ]]; then menu; fi

module=posttrain
case $command in
sft)
    model_words
    words+=(peft=none)
    data_words alpaca alpaca
    place_words hydra.run.dir
    ;;
hf)
    [[ -n ${MODEL:-} ]] || fail "hf: set MODEL to a Hugging Face directory or a hub id"
    words+=(model=hf "model.path=$(quoted "$MODEL")" peft=none)
    data_words messages model
    place_words hydra.run.dir
    ;;
lora)
    model_words
    words+=(peft=lora)
    data_words alpaca alpaca
    place_words hydra.run.dir
    ;;
chat)
    model_words
    words+=(peft=lora)
    data_words messages chatml
    place_words hydra.run.dir
    ;;
sweep)
    [[ ${NNODES:-1} == 1 ]] || fail "sweep: its trials are on one machine, or Slurm jobs with hydra/launcher=slurm"
    words+=(--multirun)
    model_words
    words+=(peft=lora)
    data_words alpaca alpaca
    NNODES=1 place_words hydra.sweep.dir
    words+=("optimizer.lr=${LRS:-1e-4,2e-4}" "peft.rank=${RANKS:-8,16}")
    ;;
export)
    [[ -n ${RUN:-} && -n ${OUT:-} ]] || fail "export: set RUN to a run directory and OUT to the directory to write"
    module=posttrain.convert
    words=(export)
    case ${MERGE-true} in
    1 | [Tt]rue | TRUE | [Yy]es | YES | [Oo]n | ON) merge=yes ;;
    '' | 0 | [Ff]alse | FALSE | [Nn]o | NO | [Oo]ff | OFF) merge='' ;;
    *) fail "MERGE=$MERGE: true or false" ;;
    esac
    if [[ -d $RUN/adapter && -n $merge ]]; then words=(merge); fi
    words+=("checkpoint=$(quoted "$RUN")" "convert.out=$(quoted "$OUT")")
    ;;
help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac

python=${PYTHON:-}
if [[ -z $python && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
run=("${python:-python3}" -m "$module" "${words[@]}" "${extra[@]}")
if [[ -n $dry || -n $confirm ]]; then
    line=$(printf '%q ' "${run[@]}")
    echo "${line% }"
fi
if [[ -n $dry ]]; then exit 0; fi
if [[ -n $confirm ]]; then
    read -r -p 'Start it? [Y/n] ' answer || exit 1
    if [[ ${answer,,} == n* ]]; then exit 0; fi
fi
exec "${run[@]}"
