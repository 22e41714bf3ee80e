"""Retired names stay away: the field's words replaced those of a private dialect in code, messages, flags and docs.

`violations(root)` reads source text alone, so it can check any tree: python tests/names_test.py [ROOT]
"""

import ast
import collections
import io
import pathlib
import re
import sys
import tokenize

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FOLDERS = ('uni_moe_jax', 'configs', 'launch', 'tests', 'docs')
_SUFFIXES = ('.py', '.md', '.sh', '.sbatch', '.yaml')
_EXEMPT = ('tests/names_test.py', 'tests/golden')

# Words that no identifier has as a part (split at underscores and capitals), and what replaced them.
_IDENTIFIER_WORDS = {
    'floor': 'baseline', 'floors': 'baselines', 'room': 'module, package, capacity', 'rooms': 'modules, packages',
    'ask': 'evaluate, query', 'asks': 'evaluate, query', 'asked': 'evaluated, requested', 'tell': 'report, raise',
    'tells': 'reports', 'told': 'reported', 'said': 'message, output', 'says': 'reports, prints', 'way': 'route, path',
    'ways': 'routing', 'travel': 'all-to-all, expert_parallel', 'touched': 'used', 'apart': 'extra_kv',
    'picture': 'image', 'pictures': 'images', 'regime': 'recipe', 'regimes': 'recipes', 'befall': 'happen',
    'befell': 'happened', 'mend': 'fix', 'alike': 'the noun of what it is', 'clips': 'videos', 'kinds': 'types',
    'lies': 'the noun of what it is', 'holds': 'contents, contains',
}
# Whole identifiers that are too vague to keep, or that have another name now.
_IDENTIFIERS = {
    'here': 'the noun of what it is', 'whole': 'the noun of what it is', 'place': 'offset, index, position',
    'places': 'indices', 'found': 'matches, the noun of what it is',
    'clip': 'video (clip is gradient clipping, CLIP the tokenizer)', 'kind': 'type, task_type', 'speaks': 'is_primary',
    'first_says': 'broadcast_from_primary', 'over_batch': 'shard_batch', 'everywhere': 'replicate', 'past': 'kv_cache',
    'completed': '(no old configs)',
}
# Words that no comment, docstring, message or page has.
_PROSE_WORDS = {
    r'floors?': 'baseline', r'rooms?': 'module, capacity', r'asks|asked': 'evaluates, requests',
    r'tells|told': 'reports', r'travels?': 'moves', r'touched': 'used', r'pictures?': 'image', r'regimes?': 'recipe',
    r'befalls?|befell|befallen': 'happens', r'mend|mends|mended': 'fix', r'seldom': 'rarely', r'beforehand': 'before',
    r'alike': 'the same way', r'in effect': 'plain words', r'see to it': 'make sure', r'learnt': 'learned',
    r'colours?': 'color', r'normalis\w+': 'normalize', r'neighbours?': 'neighbor',
}
# Strings that were names of config fields, flags, metrics and values.
_STRINGS = {
    'gate_entropy': 'router/entropy', 'row_overlap': 'router/condition_overlap', 'bad_examples': 'corrupt_examples',
    'dropped_words': 'sampled_softmax/dropped_labels', 'used_per_token': 'active parameters',
    'fixed_sets': 'bake_targets', 'accept_versions': 'allow_version_mismatch', 'holdout': 'test_fraction',
    'query_key_init': 'word_neighbors', 'mimetic_init': 'word_neighbors', 'without_gradient': 'unused_params',
    'gate_factor': 'router_lr_multiplier', 'layer_decay': 'layerwise_lr_decay', 'max_bad_steps': 'max_nonfinite_steps',
    'max_bad_fraction': 'max_corrupt_fraction', 'keep_best': 'best_metric', 'save_every': 'checkpoint_every',
    'mask_specials': 'random_special_tokens', 'per_class': 'shots', 'visual_type=': 'modality_embedding',
    'position_init': 'word_neighbors', 'text_posemb': 'word_neighbors', 'prompt_sides': 'prompt_sharing',
    'max_text=': 'max_text_len', 'max_frames=': 'max_num_frames', 'config.sets': 'config.target_sets',
    'config.kinds': 'config.task_types',
    'config.families': 'config.target_families', 'config.declared': 'config.preflight', '→ text': 'i2t_R@1',
    '← text': 't2i_R@1',
}
_MODULES = {
    'ways', 'travel', 'experts', 'touched', 'streams', 'inputs', 'decisions', 'agreement', 'floors', 'slots', 'parts',
    'setup', 'measure', 'remedy', 'changes', 'fit', 'planted', 'moves', 'stops', 'kills', 'cells', 'regimes',
    'look_alikes', 'harvest', 'prose', 'stored', 'stored_rows', 'stored_examples', 'card', 'failures', 'resolve',
    'recipes',
}
# The authors' and libraries' own words, and where the paper's or English has no other.
_ALLOWED_NAMES = {'dtype.kind', 'tf.floor', 'np.floor'}
_ALLOWED_METHODS = {'clip', 'tell'}  # of arrays, of files
# Lines of other words than ours: names of libraries and of characters, texts and answers of tests, a misspelled column.
_ALLOWED_LINES = re.compile(
    r"kind='stable'|bracket\|parenthesis|math\.floor|a picture of the small shape|\('yes', 'alike'\)|"
    r"label_column='colour'")
_ALLOWED_CLIP = 'tests/data/text/clip_tokenizer_test.py'  # tests of CLIP's tokenizer
_PROSE = [
    *((re.compile(rf'(?<![\w/-])(?:{words})(?![\w/=-])', re.IGNORECASE), instead)
      for words, instead in _PROSE_WORDS.items()),
    *((re.compile(rf'(?<!\w){re.escape(string)}' + r'(?!\w)' * string[-1].isalnum()), instead)
      for string, instead in _STRINGS.items())]
# Matches wherever one of them does, and is faster: most lines have none.
_ANY_PROSE = re.compile(rf'(?<!\w)(?:{"|".join([*_PROSE_WORDS, *map(re.escape, _STRINGS)])})', re.IGNORECASE)
_TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, 'FSTRING_MIDDLE', tokenize.STRING)}


def _parts(identifier: str) -> list[str]:
  return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', identifier).lower().split('_')


def _of_code(source: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
  """Return (line, identifier) pairs and (line, comment or string) pairs of Python source."""
  names, prose = [], []
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  for i, token in enumerate(tokens):
    if token.type == tokenize.NAME:
      owner = tokens[i - 2].string if i > 1 and tokens[i - 1].string == '.' else ''
      method = owner and token.string in _ALLOWED_METHODS and tokens[i + 1].string == '('
      if not method and f'{owner}.{token.string}' not in _ALLOWED_NAMES:
        names.append((token.start[0], token.string))
    elif token.type in _TEXT_TOKENS:
      prose += [(token.start[0] + n, line) for n, line in enumerate(token.string.split('\n'))]
    if token.type == tokenize.STRING:
      names += [(token.start[0], name) for field in _fields(token.string) for _, name in _of_code(field)[0]]
  return names, prose


def _fields(string: str) -> list[str]:
  """Return the source of the replacement fields of an f-string, which is one token before Python 3.12."""
  if not re.match(r'(?i)r?fr?[\'"]', string):
    return []
  return [ast.unparse(f.value) for f in ast.walk(ast.parse(string)) if isinstance(f, ast.FormattedValue)]


def _of_path(name: str) -> list[str]:
  """Return the retired names among the folders and the file of a path."""
  stems = [part.partition('.')[0].removesuffix('_test') for part in name.split('/')]
  modules = _MODULES if stems[0] in ('uni_moe_jax', 'tests') else ()
  return [stem for stem in stems if stem in modules or any(part in _IDENTIFIER_WORDS for part in _parts(stem))]


def violations(root: pathlib.Path) -> list[str]:
  """Return 'file:line: retired name → replacement' for every retired name below `root`."""
  matches = []
  pages = [p for p in (root / 'README.md', root / 'CONTRIBUTING.md') if p.exists()]
  files = sorted(p for folder in _FOLDERS for p in (root / folder).rglob('*') if p.suffix in _SUFFIXES)
  for path in [*pages, *files]:
    name = str(path.relative_to(root))
    if name.startswith(_EXEMPT):
      continue
    source = path.read_text()
    lines = source.split('\n')
    names, prose = _of_code(source) if path.suffix == '.py' else ([], list(enumerate(lines, 1)))
    allowed = {i for i, line in enumerate(lines, 1) if _ALLOWED_LINES.search(line)}
    matches += [f'{name}:1: file or folder {stem}' for stem in _of_path(name)]
    for line, identifier in names:
      if line in allowed or identifier == 'clip' and name == _ALLOWED_CLIP:
        continue
      instead = [_IDENTIFIER_WORDS[part] for part in _parts(identifier) if part in _IDENTIFIER_WORDS]
      instead += [_IDENTIFIERS[identifier]] if identifier in _IDENTIFIERS else []
      matches += [f'{name}:{line}: {identifier} → {i}' for i in instead]
    for line, text in prose:
      for pattern, instead in _PROSE if line not in allowed and _ANY_PROSE.search(text) else ():
        if match := pattern.search(text):
          matches.append(f'{name}:{line}: {match.group()!r} → {instead}')
  return matches


def test_no_retired_name_is_left():
  matches = violations(_ROOT)
  assert not matches, f'{len(matches)} retired names:\n' + '\n'.join(matches[:200])


_BAD = 'uni_moe_jax/eval/bad.py'


@pytest.mark.parametrize('file, source, count', [
    # Identifiers: whole ones, their parts, and those in f-strings.
    (_BAD, 'floors = 1', 1), (_BAD, 'def read_pictures(): pass', 1), (_BAD, 'class TokenWays: pass', 1),
    (_BAD, 'x.kind = 1', 1), (_BAD, "f'{x.kind}'", 1), (_BAD, 'f"""\n{x!r:{token_ways}}"""', 1),
    # The first word and others of docstrings, comments and messages.
    (_BAD, '"""Asks a model."""', 1), (_BAD, "def f():\n  '''Touched parameters.'''", 1), (_BAD, '# It asks.', 1),
    (_BAD, "raise ValueError('asks too much')", 1), (_BAD, 'print("a room")', 1),
    (_BAD, "print(f'asks {x}', 'in effect')", 2), (_BAD, "f'{x} asks'", 1),
    # Names of config fields, flags and metrics.
    (_BAD, "print('gate_entropy')", 1), ('docs/bad.md', '--config.model.max_text=20', 1),
    # Files and folders.
    ('uni_moe_jax/eval/floors.py', '', 1), ('uni_moe_jax/ways/good.py', '', 1), ('tests/eval/slots_test.py', '', 1),
    ('launch/mend_run.py', '', 1), ('docs/regimes.md', '', 1),
    # Pages and scripts.
    ('docs/bad.md', 'What befalls a run.', 1), ('README.md', 'normalised', 1), ('launch/bad.sh', '# tells who asks', 2),
    # What is allowed.
    ('uni_moe_jax/eval/good.py', 'x = np.clip(x, 0, 1)\nbaselines = [x.dtype.kind]  # the image of a video', 0),
    ('launch/experts.py', "f'{x.dtype.kind} {np.clip(x, 0, 1)}'", 0), (_BAD, "'{kind}'", 0),
    ('docs/good.md', 'CLIP, gradient clipping and a kind word.', 0)])
def test_a_planted_name_is_found_and_a_good_one_is_not(tmp_path, file, source, count):
  (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / file).write_text(source)
  assert len(violations(tmp_path)) == count


if __name__ == '__main__':
  matches = violations(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else _ROOT)
  counts = collections.Counter('/'.join(m.split(':')[0].split('/')[:-1]) for m in matches)
  print('\n'.join(matches))
  print(*(f'{count:5} {folder}' for folder, count in counts.most_common()), f'{len(matches)} retired names', sep='\n')
