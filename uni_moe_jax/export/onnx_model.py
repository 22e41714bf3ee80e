"""Runs the ONNX models of this folder with onnxruntime and numpy, without jax.

  model = onnx_model.Model()                             # as load.Model
  model.run(TASK, 'classify', pixels=pixels)['log_p']
  texts.Texts(model).captions(TASK, pixels)

The models read params.safetensors beside them. Captions are searched here, word by word.
"""

import functools

import load
import numpy as np
import onnxruntime

_FULL_FLOAT32 = {'CUDAExecutionProvider': {'use_tf32': '0'}, 'CPUExecutionProvider': {}}


class Model(load.Model):
  """An exported model; see `load.Model`.

  Attributes:
    providers: of onnxruntime, before the first `run`. By default those that multiply in full float32.
  """

  @functools.cached_property
  def providers(self):
    available = onnxruntime.get_available_providers()  # CoreML and TensorRT may round to less than float32
    return [(name, options) for name, options in _FULL_FLOAT32.items() if name in available]

  @functools.cached_property
  def target_sets(self):
    return load.tensors(self.folder / 'target_sets.safetensors')

  def run(self, task, program, **inputs):
    """Returns the outputs of a program by name. `targets` defaults to the entries of the task's target set."""
    reason = self.manifest['tasks'][task]['programs'][program].get('onnx', {}).get('reason')
    if reason and program == 'caption':
      return self._search(task, **inputs)
    if reason:
      raise ValueError(f'{task}, {program} has no ONNX model: {reason}')
    return super().run(task, program, **inputs)

  def _call(self, entry, inputs):
    entry = entry['onnx']
    if entry['file'] not in self._programs:
      options = onnxruntime.SessionOptions()
      options.log_severity_level = 3  # without a line for every constant that is not used
      self._programs[entry['file']] = onnxruntime.InferenceSession(
          self.folder / entry['file'], options, providers=self.providers)
    session = self._programs[entry['file']]
    given = {name: x for name, x in inputs.items() if name != 'cache'}
    given |= {f'cache_{i}': x for i, x in enumerate(inputs.get('cache', ()))}
    if empty := [name for name, x in given.items() if not np.size(x)]:  # onnxruntime would end this process
      raise ValueError(f'{", ".join(sorted(empty))} of {entry["file"]} is empty; give a batch of at least one.')
    taken = {x.name for x in session.get_inputs()}
    outputs = dict(zip(entry['outputs'], session.run(None, {k: np.asarray(x) for k, x in given.items() if k in taken})))
    cache = [outputs.pop(name) for name in entry['outputs'] if name.startswith('cache_')]
    return {**outputs, 'cache': cache} if cache else outputs

  def _search(self, task, pixels, **targets):
    """Beam search as in the program `caption`: tokens int32 [B, n] and score f32 [B]."""
    entry, eot = self.manifest['tasks'][task], self.manifest['tokenizer']['eot']
    axes = entry['programs']['step']['onnx']['cache_axes']
    B, k, n = len(pixels), entry['beam_size'], entry['max_len']
    choose = lambda cache, rows: [np.take(x, rows.reshape(-1), axis) for x, axis in zip(cache, axes)]
    of_image = np.arange(B)[:, None]
    cache = choose(self.run(task, 'prefill', pixels=pixels)['cache'], np.repeat(of_image, k, axis=1))
    score = np.where(np.arange(k) == 0, np.float32(0), np.float32(-np.inf))[None].repeat(B, axis=0)
    done, word, tokens = np.zeros((B, k), bool), np.full((B, k), eot), np.full((B, k, n), eot, np.int32)
    for t in range(n):
      out = self.run(task, 'step', cache=cache, word=word.reshape(-1).astype(np.int32), t=np.int32(t), **targets)
      log_p = out['log_p'].reshape(B, k, -1)
      log_p[done] = np.where(np.arange(log_p.shape[-1]) == eot, 0, -np.inf)
      sums = (score[..., None] + log_p).reshape(B, -1)
      best = np.argsort(-sums, axis=1, kind='stable')[:, :k]
      parent, word = np.divmod(best, log_p.shape[-1])
      score = np.take_along_axis(sums, best, axis=1)
      done = done[of_image, parent] | (word == eot) | np.isneginf(score)
      tokens = tokens[of_image, parent]
      tokens[:, :, t] = word
      cache = choose(out['cache'], parent + k * of_image)
      if done.all():
        break
    scores = score / ((tokens != eot).sum(-1) + 1.0) ** entry['length_penalty']
    best = scores.argmax(1)
    return {'tokens': tokens[of_image[:, 0], best], 'score': scores[of_image[:, 0], best].astype(np.float32)}
