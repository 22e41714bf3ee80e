#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/tpu_pod.sh --name NAME --zone ZONE [OPTION...] -- ARGUMENT...
       ./launch/tpu_pod.sh --name NAME --zone ZONE --stop

Trains on a Cloud TPU slice with gcloud, one process per host: copies the committed files of this
repository to every host, installs them, starts launch/train.py on all hosts and shows its output. The
run continues without the connection; the same command shows its output again, and installs nothing meanwhile.
On each host ~/run.log has the output, and ~/run.log.1 that of the start before.
ARGUMENTs go to launch/train.py:
  ./launch/tpu_pod.sh --name pod --zone us-west4-a --create v5litepod-256 --version v2-alpha-tpuv5-lite \
      -- --config=pretrain:size=base,router=attribute,stage=1 --workdir=gs://BUCKET/base \
      --config.data.dir=gs://BUCKET/data --config.tokenizer.merges_path=gs://BUCKET/bpe_simple_vocab_16e6.txt.gz

  --project P        Google Cloud project (default: gcloud's)
  --create TYPE      create the slice if it does not exist; TYPE as gcloud's --accelerator-type
  --version V        software of the slice, as gcloud's --version (with --create)
  --spot             create a spot slice, and if it was preempted, delete it and create it again (with --create)
  --service_account A  service account of the slice (with --create; default: the project's)
  --before COMMAND   run this on every host before training, in the repository and its environment: prepare data with
                     uni-moe prepare-data, for example
  --skip_install     copy and install nothing, because an earlier command did
  --evaluate         ARGUMENTs go to launch/evaluate.py
  --stop             stop the run after it has saved
  --dry_run          print the commands without running them

--workdir is in a bucket, or a folder that all hosts share (Filestore): every host writes its share of a
checkpoint, and the start checks it. The service account of the slice needs the roles in
docs/guides/buckets.md. The same command continues a stopped run; exit codes are those of launch/train.py.
uv installs Python 3.11, because hosts may have an older one. To delete the slice, run:
gcloud compute tpus tpu-vm delete NAME.
HELP
}

# shellcheck source=launch/options.sh
. "$(dirname "${BASH_SOURCE[0]}")/options.sh"

name='' zone='' project='' create='' version='' spot='' account='' before='' install=yes script=train.py stop=''
dry_run=''
while (($#)); do
  case "$1" in
    --name) check_value "$@"; name="$2"; shift 2 ;;
    --zone) check_value "$@"; zone="$2"; shift 2 ;;
    --project) check_value "$@"; project="$2"; shift 2 ;;
    --create) check_value "$@"; create="$2"; shift 2 ;;
    --version) check_value "$@"; version="$2"; shift 2 ;;
    --spot) spot=yes; shift ;;
    --service_account) check_value "$@"; account="$2"; shift 2 ;;
    --before) check_value "$@"; before="$2"; shift 2 ;;
    --skip_install) install=''; shift ;;
    --evaluate) script=evaluate.py; shift ;;
    --stop) stop=yes; shift ;;
    --dry_run) dry_run=yes; shift ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) echo "tpu_pod.sh: unknown option $1; give the arguments of $script after --. See --help." >&2; exit 2 ;;
  esac
done
if [[ -z "$name" || -z "$zone" ]] || { (($# == 0)) && [[ -z "$stop" ]]; }; then
  echo "tpu_pod.sh: give --name, --zone and, after --, arguments of $script. See --help." >&2
  exit 2
fi
if [[ -n "$create" && -z "$version" ]]; then
  echo "tpu_pod.sh: --create $create needs --version, the software of the hosts. See --help." >&2
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu_vm=(gcloud compute tpus tpu-vm) where=(--zone "$zone" ${project:+--project "$project"})
on_all() { run "${tpu_vm[@]}" ssh "$name" "${where[@]}" --worker=all --command "$1"; }

if [[ -n "$stop" ]]; then
  # shellcheck disable=SC2016  # the hosts expand it
  on_all 'pkill -TERM -P "$(cat ~/run.pid)"'
  exit
fi
if [[ -n "$create" ]]; then
  state=''
  if [[ -z "$dry_run" ]]; then
    state=$("${tpu_vm[@]}" describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null) || state=''
  fi
  if [[ "$state" == PREEMPTED ]]; then  # it exists, and cannot be started again
    if [[ -z "$spot" ]]; then
      echo "tpu_pod.sh: $name was preempted: it was a spot slice. Add --spot to delete it and create another one. For" \
        "one on demand, which costs more, delete it first: ${tpu_vm[*]} delete $name ${where[*]}" >&2
      exit 2
    fi
    echo "tpu_pod.sh: $name was preempted; it is deleted and created again." >&2
    "${tpu_vm[@]}" delete "$name" "${where[@]}" --quiet
    state=''
  fi
  if [[ -z "$state" ]]; then
    run "${tpu_vm[@]}" create "$name" "${where[@]}" --accelerator-type "$create" --version "$version" \
      ${spot:+--spot} ${account:+--service-account "$account"}
  fi
fi
# shellcheck disable=SC2016  # the hosts expand it
running='kill -0 "$(cat ~/run.pid)" 2>/dev/null'
unless_running="! $running || exit 0;"  # a run keeps its code and packages
failed() {
  echo "tpu_pod.sh: $1 failed. The slice is not deleted and costs money: repeat the command, or delete it with" \
    "${tpu_vm[*]} delete $name ${where[*]}" >&2
  exit 1
}
if [[ -n "$install" ]]; then
  # Of this process alone: another may start another commit, or another user a pod.
  archive="${TMPDIR:-/tmp}/uni_moe_jax.$$.tar.gz"
  trap 'rm -f "$archive"' EXIT
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${tpu_vm[@]}" scp "$archive" "$name:uni_moe_jax.tar.gz" "${where[@]}" --worker=all || failed copying
  # The python3 of a host may lack venv, so uv is not installed in such an environment.
  on_all "$unless_running mkdir -p ~/uni_moe_jax && tar -xzf ~/uni_moe_jax.tar.gz -C ~/uni_moe_jax && \
cd ~/uni_moe_jax && { [ -x ~/uv/bin/uv ] || python3 -m pip install -q --target ~/uv uv; } && \
~/uv/bin/uv venv -q --allow-existing --python 3.11 .venv && \
~/uv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[tpu,gcs,clip,video]'" || failed installing
fi
if [[ -n "$before" ]]; then
  on_all "$unless_running cd ~/uni_moe_jax && PATH=\$PWD/.venv/bin:\$PATH && $before" || failed --before
fi
printf -v arguments '%q ' "$@"
# The run is detached, because the connection may end. Its output and exit code are written to files.
on_all "cd ~/uni_moe_jax || exit; { $running || { \
rm -f ~/run.code; mv -f ~/run.log ~/run.log.1 2>/dev/null; : >~/run.log; \
setsid nohup bash -c '\"\$@\"; echo \$? >~/run.code' run .venv/bin/python launch/$script \
${arguments}--distributed=auto </dev/null >>~/run.log 2>&1 & echo \$! >~/run.pid; }; }; \
tail --pid=\"\$(cat ~/run.pid)\" -n +1 -f ~/run.log; exit \"\$(cat ~/run.code)\""
