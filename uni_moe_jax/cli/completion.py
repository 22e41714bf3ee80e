"""Completion of uni-moe in shells: commands, flags, their choices, and names of configs."""

import sys

from uni_moe_jax.cli import command, shipped
from uni_moe_jax.utils import exit_codes
from uni_moe_jax.utils.suggest import nearest

# Each calls `uni-moe completion -- WORD…` for the candidates of the last word; without any, files are completed.
_SHELLS = {
    'bash': r'''
_uni_moe() {
  local line="${COMP_LINE:0:COMP_POINT}" words
  read -ra words <<<"$line"
  [[ "$line" == *' ' ]] && words+=('')
  local choice word="${words[${#words[@]}-1]}"  # as bash 3.2 of macOS knows it
  COMPREPLY=()
  while IFS= read -r choice; do
    COMPREPLY+=("$choice")
  done < <(uni-moe completion -- "${words[@]:1}" 2>/dev/null)
  [[ "${COMPREPLY[0]}" == *= ]] && type compopt >/dev/null 2>&1 && compopt -o nospace
  [[ "$word" == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")  # bash completes what follows the last =
}
complete -o default -F _uni_moe uni-moe''',
    'zsh': r'''
_uni_moe() {
  local -a found
  found=("${(@f)$(uni-moe completion -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "$found[1]" ]]; then
    compadd -S '' -- ${(M)found:#*=}
    compadd -- ${found:#*=}
  else
    compset -P '*='
    _files
  fi
}
compdef _uni_moe uni-moe''',
    'fish': r'''
function __uni_moe
  set -l words (commandline -opc) (commandline -ct)
  uni-moe completion -- $words[2..-1] 2>/dev/null
end
complete -c uni-moe -n 'test (count (commandline -opc)) -eq 1' -f
complete -c uni-moe -a '(__uni_moe)' '''}


def main(arguments: list[str]) -> int:
  """Print the script of a shell, or after '--' the candidates for the last word. Return the exit code."""
  if arguments[:1] == ['--']:
    print(''.join(f'{choice}\n' for choice in candidates(arguments[1:])), end='')
  elif arguments and arguments[0] in _SHELLS:
    print(_SHELLS[arguments[0]].strip())
  else:
    given = ' '.join(arguments) or 'nothing'
    print(f'error: uni-moe completion: {given} is no shell; {nearest(given, _SHELLS)}.', file=sys.stderr)
    return exit_codes.USAGE
  return exit_codes.FINISHED


def candidates(words: list[str]) -> list[str]:
  """Return what the last of the words after `uni-moe` may become."""
  *before, word = words or ['']
  if not before:
    choices = [*shipped.scripts(), 'help', 'completion']
  elif before[0] == 'help':
    choices = [*shipped.scripts(), *shipped.configs()]
  elif before[0] == 'completion':
    choices = _SHELLS
  elif before[0] in shipped.scripts() and word.startswith('-'):
    choices = _flags(before[0], values='=' in word)
  else:
    choices = ()
  return [choice for choice in choices if choice.startswith(word)]


def _flags(name: str, values: bool) -> list[str]:
  """Return --FLAG of every switch of a command and --FLAG= of its other flags, or with `values` --FLAG=CHOICE."""
  from absl import flags
  command.run(name, [], 'completed')
  matches = []
  for flag in flags.FLAGS.get_key_flags_for_module('completed'):
    if values:
      choices = shipped.configs() if flag.name == 'config' else getattr(flag.parser, 'enum_values', ())
      matches += [f'--{flag.name}={choice}' for choice in choices]
    else:
      matches += [f'--{flag.name}', f'--no{flag.name}'] if flag.boolean else [f'--{flag.name}=']
  return matches
