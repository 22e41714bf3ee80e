#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/gke.sh --name NAME --image IMAGE [OPTION...] -- ARGUMENT...

Trains on a TPU slice of a GKE cluster, one pod per host: fills in launch/gke_jobset.yaml and applies it
with kubectl. ARGUMENTs go to launch/train.py; the pods need no shared disk if --workdir is in a bucket:
  ./launch/gke.sh --name base --image REGISTRY/uni_moe_jax --service_account trainer --topology 16x16 \
      -- --config=pretrain:size=base,router=attribute,stage=1 --workdir=gs://BUCKET/base \
      --config.data.dir=gs://BUCKET/data --config.tokenizer.merges_path=gs://BUCKET/bpe_simple_vocab_16e6.txt.gz

  --image IMAGE        image that was built from launch/Dockerfile with EXTRAS=tpu,gcs,clip,video
  --service_account S  Kubernetes service account of the pods, which may write the bucket (default: default)
  --claim CLAIM        PersistentVolumeClaim that many pods can write (Filestore), mounted as /runs
  --accelerator A      GKE's name of the TPU (default tpu-v5-lite-podslice)
  --topology T         topology of the slice in chips (default 4x4)
  --chips C            chips per host (default 4)
  --max_restarts R     restarts after failures (default 20); preemptions do not count
  --evaluate           ARGUMENTs go to launch/evaluate.py
  --dry_run            print the JobSet without applying it

Follow the output of process 0 with: kubectl logs -f -l \
  jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
To continue a run, repeat the command after `kubectl delete jobset NAME`.
HELP
}

# shellcheck source=launch/options.sh
. "$(dirname "${BASH_SOURCE[0]}")/options.sh"

name='' image='' claim='' account=default dry_run='' script=train.py
accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 restarts=20
while (($#)); do
  case "$1" in
    --name) check_value "$@"; name="$2"; shift 2 ;;
    --image) check_value "$@"; image="$2"; shift 2 ;;
    --claim) check_value "$@"; claim="$2"; shift 2 ;;
    --service_account) check_value "$@"; account="$2"; shift 2 ;;
    --accelerator) check_value "$@"; accelerator="$2"; shift 2 ;;
    --topology) check_value "$@"; topology="$2"; shift 2 ;;
    --chips) check_value "$@"; chips="$2"; shift 2 ;;
    --max_restarts) check_value "$@"; restarts="$2"; shift 2 ;;
    --evaluate) script=evaluate.py; shift ;;
    --dry_run) dry_run=yes; shift ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gke.sh: unknown option $1; give the arguments of $script after --. See --help." >&2; exit 2 ;;
  esac
done
if [[ -z "$name" || -z "$image" ]] || (($# == 0)); then
  echo "gke.sh: give --name, --image and, after --, arguments of $script. See --help." >&2
  exit 2
fi
if ! [[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ && "$chips" =~ ^[1-9][0-9]*$ ]]; then
  echo "gke.sh: --topology $topology must look like 4x4 or 2x2x4, and --chips $chips must be a positive number." >&2
  exit 2
fi
hosts=$((${topology//x/*} / chips))
if ((hosts * chips != ${topology//x/*})) || ((hosts == 0)); then
  echo "gke.sh: --topology $topology has $((${topology//x/*})) chips, which is not a multiple of --chips $chips." >&2
  exit 2
fi

# quoted TEXT: TEXT as a YAML string. In a replacement, bash 3.2 to 5.2 treat quotes, backslashes and & differently.
quoted() {
  local quote="'"
  printf "'%s'" "${1//$quote/$quote$quote}"
}

arguments=''
for argument in "$@" --distributed=auto; do arguments+="${arguments:+, }$(quoted "$argument")"; done
manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
fill() { # fill NAME VALUE
  local rest="$manifest" key="\${$1}"
  manifest=''
  while [[ "$rest" == *"$key"* ]]; do
    manifest+="${rest%%"$key"*}$2"
    rest="${rest#*"$key"}"
  done
  manifest+="$rest"
}
fill NAME "$(quoted "$name")"
fill IMAGE "$(quoted "$image")"
fill ACCOUNT "$(quoted "$account")"
mounts='' volumes=''
if [[ -n "$claim" ]]; then
  mounts='{name: runs, mountPath: /runs}'
  volumes="{name: runs, persistentVolumeClaim: {claimName: $(quoted "$claim")}}"
fi
fill MOUNTS "$mounts"
fill VOLUMES "$volumes"
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
