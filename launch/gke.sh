#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/gke.sh --name NAME --image IMAGE --claim CLAIM [OPTION...] -- ARGUMENT...

Trains on a TPU slice of a GKE cluster, one pod per host: fills in launch/gke_jobset.yaml and gives it to
kubectl. ARGUMENTs go to launch/train.py; --workdir lies below /runs:
  ./launch/gke.sh --name base --image REGISTRY/uni_moe_jax --claim runs --topology 16x16 \
      -- --config=configs/pretrain.py:size=base,router=attribute,stage=1 --workdir=/runs/base

  --image IMAGE        with this repository as its working folder, and `pip install -e '.[tpu]'` done
  --claim CLAIM        a PersistentVolumeClaim that many pods can write (Filestore): becomes /runs
  --accelerator A      GKE's name of the TPU (default tpu-v5-lite-podslice)
  --topology T         of the slice, in chips (default 4x4)
  --chips C            of one host (default 4)
  --restarts R         how often the run may start again after failures (default 20); preemptions do not count
  --evaluate           ARGUMENTs go to launch/evaluate.py
  --dry_run            print the JobSet, apply nothing

Follow process 0, which prints, with: kubectl logs -f -l \
  jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
A second run of the same command, after `kubectl delete jobset NAME`, continues.
HELP
}

name='' image='' claim='' accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 restarts=20 script=train.py dry_run=''
while (($#)); do
  case "$1" in
    --name) name="$2"; shift 2 ;;
    --image) image="$2"; shift 2 ;;
    --claim) claim="$2"; shift 2 ;;
    --accelerator) accelerator="$2"; shift 2 ;;
    --topology) topology="$2"; shift 2 ;;
    --chips) chips="$2"; shift 2 ;;
    --restarts) restarts="$2"; shift 2 ;;
    --evaluate) script=evaluate.py; shift ;;
    --dry_run) dry_run=yes; shift ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gke.sh: $1 is no option; arguments of $script stand after --. See --help." >&2; exit 2 ;;
  esac
done
if [[ -z "$name" || -z "$image" || -z "$claim" ]] || (($# == 0)); then
  echo "gke.sh: --name, --image, --claim and, after --, arguments of $script are needed. See --help." >&2
  exit 2
fi
if ! [[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ && "$chips" =~ ^[1-9][0-9]*$ ]]; then
  echo "gke.sh: --topology $topology must be like 4x4 or 2x2x4, and --chips $chips a positive number." >&2
  exit 2
fi
hosts=$((${topology//x/*} / chips))
if ((hosts * chips != ${topology//x/*})) || ((hosts == 0)); then
  echo "gke.sh: --topology $topology has $((${topology//x/*})) chips, no multiple of --chips $chips." >&2
  exit 2
fi

# quoted TEXT: as a YAML string.
quoted() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

arguments=''
for argument in "$@" --distributed=auto; do arguments+="${arguments:+, }$(quoted "$argument")"; done
manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
fill() { manifest="${manifest//\$\{$1\}/"$2"}"; }
fill NAME "$(quoted "$name")"
fill IMAGE "$(quoted "$image")"
fill CLAIM "$(quoted "$claim")"
fill ACCELERATOR "$(quoted "$accelerator")"
fill TOPOLOGY "$(quoted "$topology")"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill RESTARTS "$restarts"
fill SCRIPT "$script"
fill ARGUMENTS "[$arguments]"

if [[ -n "$dry_run" ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
