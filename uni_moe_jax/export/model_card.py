"""The model card of an exported model: what it is, what it does, how well, where it comes from, and what lies in its folder."""

from typing import Any

from uni_moe_jax.eval.metrics import evaluation_table
from uni_moe_jax.moe import routers

_MOST_SHOWN = 8  # entries of a set

_LEFT = {
    'never': 'A dense model: it never had experts.',
    'dense': 'Its experts are merged for good: what is left is a plain dense model, without routers and experts.',
    'kernels': 'Its experts are merged for good: no routers and experts are left. A projection that had experts has {n} kernels; '
               'kinds of tokens that took the same of every expert share one. Which one an array takes is fixed in the programs '
               '("conditions" below).',
    'router': 'Its router ({router}) looks at tokens, so that experts cannot be merged: **router and experts are in these '
              'programs**, and every token costs what it cost in training.',
}

_CLIP = (' `texts.py` reads captions and makes no ids: make those of your texts yourself, by the merges of `{file}`, each '
         'text ended by {eot}.')
_PRODUCTS = {
    'float32': 'Their float32 products are whole float32 on every platform; exported with `--dtype=bfloat16`, they are faster.',
    'bfloat16': 'Products of layers are bfloat16, the fast choice; the few that stay float32 may be rounded by the platform. '
                "Where two words are nearly as likely, captions may differ from those of training's evaluator; exported with "
                '`--dtype=float32`, they are those of the trained model in float32, token for token.',
}


def card(manifest: dict[str, Any], evaluation: list[dict[str, Any]], sums: dict[str, tuple[str, int]]) -> str:
  """README.md of the folder.

  Args:
    manifest: see `artifact`. evaluation: rows of evaluation.json, or [].
    sums: {file: (sha256, bytes)} of all other files.
  """
  model, origin, words = manifest['model'], manifest['provenance'], manifest['tokenizer']
  return '\n'.join([
      f'# {origin["name"]}',
      '',
      'A generalist model (Uni-Perceiver-MoE: arXiv 2206.04674), exported by uni_moe_jax. It runs without that package:',
      '',
      f'    pip install jax flatbuffers{" sentencepiece" * (words["kind"] == "sentencepiece")}',
      '    python example.py',
      '',
      '`load.py` is the loader, `texts.py` knows its texts; their first lines say how they are used. `load.py` '
      'checks every file of this folder against `SHA256SUMS`. Each program takes any batch, and is lowered for CPU, NVIDIA GPU '
      'and TPU; its answers were compared with those of the trained model on CPU alone. '
      f'JAX reads programs of its own version for at least six months; these are by {origin["jax"]}. ' + _PRODUCTS[model['dtype']],
      '',
      '## Architecture',
      '',
      _left(model, manifest['trained']),
      '',
      f'Transformer encoder, {model["num_layers"]} layers, width {model["width"]}, {model["num_heads"]} heads, MLP {model["mlp_dim"]}; '
      f'{model["parameters"]:,} parameters (float32); products in {model["dtype"]}. Pictures: uint8, {model["image_size"]} × '
      f'{model["image_size"]} × {model["channels"]}, patches of {model["patch_size"]}; the programs divide by 255 and normalise (mean '
      f'{_numbers(model["pixel_mean"])}, deviation {_numbers(model["pixel_std"])}; clips: '
      f'{_numbers(model["video_mean"]) or "the same"}, {_numbers(model["video_std"]) or "the same"}). Texts: '
      f'{words["kind"]}, {words["size"]:,} pieces, at most {model["max_text_len"]} tokens.'
      + (_CLIP.format(**words) if words['kind'] == 'clip' else ''),
      '',
      '## Tasks',
      '',
      *[line for name, task in manifest['tasks'].items() for line in _task(name, task, manifest['sets'])],
      '## Metrics',
      '',
      *_metrics(manifest, evaluation),
      '',
      '## Provenance',
      '',
      *[f'* {key}: {value}' for key, value in origin.items() if not isinstance(value, dict)],
      *[f'* {key}: ' + ', '.join(f'{k} {v}' for k, v in value.items())
        for key, value in origin.items() if isinstance(value, dict) and key != 'config'],
      '* config: in `manifest.json`',
      '',
      '## Files',
      '',
      '`params.safetensors` and `orbax/` hold the same parameters, for programs and for JAX code; `sets.safetensors` the features '
      'of the target sets, normalised.',
      '',
      '| file | bytes | sha256 |',
      '| --- | --- | --- |',
      *[f'| {name} | {size} | {digest} |' for name, (digest, size) in sums.items()],
      ''])


def _left(model: dict[str, Any], trained: dict[str, Any]) -> str:
  if not trained['layers']:
    return _LEFT['never']
  if routers.routes_tokens(model['router']):
    left = _LEFT['router'].format(router=model['router'])
  else:
    left = _LEFT['dense'] if model['router'] == routers.DENSE else _LEFT['kernels'].format(n=model['num_experts'])
  every = len(trained['layers']) == model['layers']
  layers = 'all layers' if every else f'layers {", ".join(map(str, trained["layers"]))} (of 0…{model["num_layers"] - 1})'
  return (f'Trained with router {trained["router"]}, {trained["num_experts"]} experts, {trained["top_k"]} per token, in {layers}: '
          f'{" and ".join(trained["sublayers"])}. {left}')


def _metrics(manifest: dict[str, Any], evaluation: list[dict[str, Any]]) -> list[str]:
  """What training's evaluators found, of those that ask the exported tasks."""
  if not evaluation:
    return ['This step was not evaluated.']
  rows = [row for row in evaluation if row['evaluator'] in manifest['evaluators']]
  if not rows:
    return ['No evaluator asks these tasks.']
  then, now = manifest['trained']['dtype'], manifest['model']['dtype']
  other = '' if then == now else f' with products in {then} (here {now}, so that answers may differ)'
  asked = [line for name, e in manifest['evaluators'].items() for line in _asked_otherwise(name, e, manifest['tasks'][e['task']])]
  return [f"Of the trained model at this step{other}, by training's evaluators:", '', '```', evaluation_table(rows), '```',
          *(['', *asked] if asked else [])]


def _asked_otherwise(name: str, evaluator: dict[str, Any], task: dict[str, Any]) -> list[str]:
  """Where an evaluator asks its task for something that the task's programs do not do, so that its metrics are not theirs."""
  said = []
  if evaluator['constrain_to']:
    said.append(f'`{name}` lets the model give only captions that are texts of set `{evaluator["constrain_to"]}`; these programs give '
                'any words.')
  ways = [f'beam size {way["beam_size"]} and length penalty {way["length_penalty"]}' for way in (evaluator, task)]
  if evaluator['type'] == 'caption' and ways[0] != ways[1]:
    said.append(f'`{name}` searches captions with {ways[0]}; `caption` of `{evaluator["task"]}` with {ways[1]}.')
  if evaluator['num_views'] * evaluator['num_crops'] > 1:
    said.append(f'`{name}` averages the probabilities of {evaluator["num_views"]} views × {evaluator["num_crops"]} crops of a clip; '
                '`classify` is given one.')
  return said


def _numbers(values: tuple[float, ...]) -> str:
  return ' '.join(map(str, values))


def _task(name: str, task: dict[str, Any], sets: dict[str, Any]) -> list[str]:
  lines = [f'### {name}', '', f'* task type: {task["type"]}; conditions and their kernels: '
           + ', '.join(f'{c}: {k}' for c, k in task['conditions'].items())]
  if task['set']:
    texts = sets[task['set']]['texts']
    shown = ', '.join(texts[:_MOST_SHOWN]) + (', …' if len(texts) > _MOST_SHOWN else '')
    lines.append(f'* answers: set `{task["set"]}`, {sets[task["set"]]["size"]} entries' + (f': {shown}' if texts else ''))
  if task['template']:
    lines.append(f'* template of its texts: `{task["template"]}`; `position` is the place of `<spe>`')
  if task['max_len']:
    lines.append(f'* text tokens in training: {task["max_len"]}')
  lines += [f'* `{program}`: {", ".join(f"{k} {v}" for k, v in p["inputs"].items())}' for program, p in task['programs'].items()]
  return [*lines, '']
