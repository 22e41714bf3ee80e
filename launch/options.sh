# shellcheck shell=bash
# Sourced by scripts that read options.

# check_value OPTION [VALUE...]: ends the script if the option has no value.
check_value() {
  if (($# < 2)) || [[ "$2" == --* ]]; then
    echo "${0##*/}: $1 needs a value. See --help." >&2
    exit 2
  fi
}
