"""The model card of an exported model: metadata for the Hub, architecture, tasks, metrics, provenance and files."""

import collections
from typing import Any

from uni_moe_jax.eval import metrics
from uni_moe_jax.moe import routers

_MOST_SHOWN = 8  # entries of a set
# Task types that the Hub has pages for, by its names, the most telling first.
_PIPELINES = {
    'image_caption': 'image-to-text', 'vqa': 'visual-question-answering',
    'image_retrieval': 'zero-shot-image-classification', 'video_classification': 'video-classification',
    'image_classification': 'image-classification',
    'text_classification': 'text-classification', 'text_mlm': 'fill-mask'}

_EXPERTS = {
    'never': 'A dense model: it never had experts.',
    'dense': 'Its experts are merged permanently: the result is a plain dense model without routers or experts.',
    'kernels': 'Its experts are merged permanently: it has no routers or experts. A projection that had experts '
               'has {num_experts} kernels; conditions with equal routing coefficients share one. The programs fix '
               'which kernel a condition uses (see "conditions" below).',
    'router': 'Its router ({router}) routes each token, so its experts cannot be merged: **these programs contain the '
              'router and the experts**, and a token costs as much as in training.',
}

# What a file that is not always there is for.
_ADDED = {
    'config.json': ' `config.json`, the tokenizer and `checkpoints/` (parameters with all experts) are a run that '
                   "another run can start from: set `config.train.init` to this folder's address.",
    'onnx_model.py': ' `onnx_model.py` runs the ONNX models, which read `params.safetensors` beside them.',
    'index.html': ' `index.html` runs them in a browser; any static web server can serve this folder.'}
_CLIP = (' `texts.py` decodes captions but does not tokenize: tokenize your texts with the merges of `{file}` and end '
         'each with id {eot}.')
_PRODUCTS = {
    'float32': 'Matrix products are full float32 on every platform; an export with `--dtype=bfloat16` is faster.',
    'bfloat16': 'Matrix products of layers are bfloat16; all others are full float32 on every platform. If two words '
                "are almost equally likely, captions may differ from the training evaluator's; with "
                "`--dtype=float32`, they equal the float32 trained model's, token for token.",
}


def card(manifest: dict[str, Any], evaluation: list[dict[str, Any]], sums: dict[str, tuple[str, int]]) -> str:
  """Returns README.md of the folder. evaluation: rows of evaluation.json. sums: {other file: (sha256, bytes)}."""
  model, origin, tokenizer = manifest['model'], manifest['provenance'], manifest['tokenizer']
  return '\n'.join([
      *_metadata(manifest),
      f'# {origin["name"]}',
      '',
      'A generalist model (Uni-Perceiver-MoE: arXiv 2206.04674), exported by uni_moe_jax. It runs without that '
      'package:',
      '',
      f'    pip install jax flatbuffers{" sentencepiece" * (tokenizer["type"] == "sentencepiece")}',
      '    python example.py',
      '',
      '`load.py` loads and runs the model; `texts.py` tokenizes and detokenizes. Their first lines show how to use '
      'them. `load.py` verifies every other file of this folder against `SHA256SUMS`. Each program takes any batch '
      'size and is lowered for CPU, NVIDIA GPU and TPU; its outputs were compared with the trained model on '
      f'CPU only. JAX supports serialized programs for at least six months; JAX {origin["jax"]} wrote these. '
      + _PRODUCTS[model['dtype']],
      '',
      '## Architecture',
      '',
      _architecture(model, manifest['trained']),
      '',
      f'Transformer encoder, {model["num_layers"]} layers, width {model["width"]}, {model["num_heads"]} heads, MLP '
      f'{model["mlp_dim"]}; {model["parameters"]:,} parameters (float32); products in {model["dtype"]}. Images: uint8, '
      f'{model["image_size"]} × {model["image_size"]} × {model["channels"]}, patches of {model["patch_size"]}; the '
      f'programs divide by 255 and normalize (mean {_numbers(model["pixel_mean"])}, standard deviation '
      f'{_numbers(model["pixel_std"])}; videos: {_numbers(model["video_mean"]) or "the same"}, '
      f'{_numbers(model["video_std"]) or "the same"}). Texts: {tokenizer["type"]}, {tokenizer["size"]:,} pieces, at '
      f'most {model["max_text_len"]} tokens.'
      + (_CLIP.format(**tokenizer) if tokenizer['type'] == 'clip' else ''),
      '',
      '## Tasks',
      '',
      *[line for name, task in manifest['tasks'].items() for line in _task(name, task, manifest['target_sets'])],
      '## Metrics',
      '',
      *_metrics(manifest, evaluation),
      '',
      '## Provenance',
      '',
      *[f'* {key}: {value}' for key, value in origin.items() if not isinstance(value, dict)],
      *[f'* {key}: ' + ', '.join(f'{k} {v}' for k, v in value.items())
        for key, value in origin.items() if isinstance(value, dict) and key != 'config'],
      '* config: see `manifest.json`',
      '',
      '## Files',
      '',
      '`params.safetensors` (for the programs) and `orbax/` (for JAX code) contain the same parameters; '
      '`target_sets.safetensors` contains the normalized features of the target sets.'
      + ''.join(text for file, text in _ADDED.items() if file in sums),
      '',
      f'Weights: {weights(sums)}.',
      '',
      '| file | bytes | sha256 |',
      '| --- | --- | --- |',
      *[f'| {name} | {size} | {digest} |' for name, (digest, size) in sums.items()],
      ''])


def weights(sums: dict[str, tuple[str, int]]) -> str:
  """'params.safetensors 4.1 MB, programs 0.6 MB, …': files at the top and folders, the heaviest first.

  Those with less than 1 % of all bytes are 'others'.

  sums: {file: (sha256, bytes)}.
  """
  parts = collections.Counter()
  for name, (_, size) in sums.items():
    parts[name.partition('/')[0]] += size
  total = parts.total()
  large = {name: size for name, size in parts.most_common() if 100 * size >= total}
  rows = {**large, 'others': total - sum(large.values()), 'total': total}
  return ', '.join(f'{name} {size / 1e6:.2f} MB' for name, size in rows.items() if size)


def _metadata(manifest: dict[str, Any]) -> list[str]:
  """YAML between lines of dashes, which the Hugging Face Hub reads."""
  types = {task['type'] for task in manifest['tasks'].values()}
  pipeline = next((name for task_type, name in _PIPELINES.items() if task_type in types), None)
  tags = ['jax', 'stablehlo', 'mixture-of-experts', 'uni-perceiver-moe', 'arxiv:2206.04674',
          *sorted({_PIPELINES[t] for t in types if t in _PIPELINES})]
  return ['---', 'library_name: uni_moe_jax', *([f'pipeline_tag: {pipeline}'] if pipeline else []), 'tags:',
          *[f'- {tag}' for tag in tags], '---', '']


def _architecture(model: dict[str, Any], trained: dict[str, Any]) -> str:
  moe_layers, router = trained['moe_layers'], model['router']
  if not moe_layers:
    return _EXPERTS['never']
  name = 'router' if routers.routes_tokens(router) else 'dense' if router == routers.DENSE else 'kernels'
  layers = f'layers {", ".join(map(str, moe_layers))} (of 0…{model["num_layers"] - 1})'
  return (f'Trained with router {trained["router"]}, {trained["num_experts"]} experts, {trained["top_k"]} per token, '
          f'in {"all layers" if len(moe_layers) == model["num_layers"] else layers}: '
          f'{" and ".join(trained["sublayers"])}. {_EXPERTS[name].format_map(model)}')


def _metrics(manifest: dict[str, Any], evaluation: list[dict[str, Any]]) -> list[str]:
  """Results of training's evaluators of the exported tasks."""
  if not evaluation:
    return ['This step was not evaluated.']
  rows = [row for row in evaluation if row['evaluator'] in manifest['evaluators']]
  if not rows:
    return ['The run has no evaluator for these tasks.']
  then, now = manifest['trained']['dtype'], manifest['model']['dtype']
  other = '' if then == now else f' with products in {then} (here {now}, so answers may differ)'
  remarks = [remark for name, e in manifest['evaluators'].items()
             for remark in _protocol_remarks(name, e, manifest['tasks'][e['task']], manifest['tokenizer'])]
  return [f"The trained model's scores at this step{other}, by the evaluators of training:", '',
          '| evaluator | metric | value | ± s.e. | examples | chance | baselines |', '| --- ' * 7 + '|',
          *map(_metric, rows), '',
          f'+: the model is better by at least {metrics.SIGNIFICANT:.0f} standard errors, =: closer than that, -: '
          'worse; without a standard error, any difference counts.', *(['', *remarks] if remarks else [])]


def _metric(row: dict[str, Any]) -> str:
  """A row of evaluation.json as one of a table."""
  marks = {metrics.BETTER: '+', metrics.LEVEL: '=', metrics.WORSE: '-'}
  marked = lambda value, name='': f'{metrics.format_number(value)} {marks[metrics.verdict(row, value, name)]}'
  direction = '' if row['higher_is_better'] else ' (lower is better)'
  cells = (row['evaluator'], row['metric'] + direction, metrics.format_number(row['value']),
           metrics.format_error(row['standard_error']), f'{row["count"]:,}',
           '—' if row['chance'] is None else marked(row['chance']),
           ', '.join(f'{name} {marked(value, name)}' for name, value in row['baselines'].items()))
  return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


def _protocol_remarks(name: str, evaluator: dict[str, Any], task: dict[str, Any], tokenizer: dict[str, Any]
                      ) -> list[str]:
  """Differences between an evaluator's protocol and the programs of its task, which make its metrics not theirs."""
  remarks = []
  evaluated, exported = (
      f'beam size {p["beam_size"]} and length penalty {p["length_penalty"]}' for p in (evaluator, task))
  if evaluator['type'] == 'caption' and evaluated != exported:
    remarks.append(f'`{name}` searches captions with {evaluated}; `caption` of `{evaluator["task"]}`, with {exported}.')
  if evaluator['rerank_by']:
    remarks.append(f'`{name}` reranks captions by task `{evaluator["rerank_by"]}`; these programs do not.')
  if evaluator['type'] == 'caption' and tokenizer['type'] == 'clip' and not evaluator['detokenize']:
    remarks.append(f"`{name}` leaves words as the vocabulary splits them (\"dog 's\"); `texts.py` joins them.")
  if evaluator['max_len'] not in (0, task['max_len']):
    remarks.append(f'`{name}` stops captions after {evaluator["max_len"]} tokens; `caption` of `{evaluator["task"]}`, '
                   f'after {task["max_len"]}.')
  if evaluator['num_views'] * evaluator['num_crops'] > 1:
    remarks.append(f'`{name}` averages the probabilities of {evaluator["num_views"]} views × {evaluator["num_crops"]} '
                   'crops of a video; `classify` uses one.')
  return remarks


def _numbers(values: tuple[float, ...]) -> str:
  return ' '.join(map(str, values))


def _task(name: str, task: dict[str, Any], target_sets: dict[str, Any]) -> list[str]:
  conditions = ', '.join(f'{condition}: {kernel}' for condition, kernel in task['conditions'].items())
  lines = [f'### {name}', '', f'* task type: {task["type"]}; conditions and their kernels: {conditions}']
  if task['target_set']:
    size, texts = (target_sets[task['target_set']][key] for key in ('size', 'texts'))
    shown = ', '.join(texts[:_MOST_SHOWN]) + (', …' if len(texts) > _MOST_SHOWN else '')
    lines.append(f'* answers: target set `{task["target_set"]}`, {size} entries' + (f': {shown}' if texts else ''))
  if task['template']:
    lines.append(f'* text template: `{task["template"]}`; `position` is the index of `<spe>`')
  if task['max_len']:
    lines.append(f'* text tokens in training: {task["max_len"]}')
  lines += [f'* `{program}`: {", ".join(f"{k} {v}" for k, v in p["inputs"].items())}'
            for program, p in task['programs'].items()]
  return [*lines, '']
