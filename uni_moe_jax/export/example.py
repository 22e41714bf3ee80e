"""Example of using this exported model: python example.py

Runs the model on the exported examples and reports whether the answers equal those at export. Without examples it lists
the programs and their inputs. `captions_word_by_word` shows how a server can stream captions.
"""

import load
import numpy as np
import texts


def captions_word_by_word(model, task, pixels):
  """Yields the token ids [B] of greedy captions, one position at a time."""
  cache = model.run(task, 'prefill', pixels=pixels)['cache']
  word, eot = np.zeros(len(pixels), np.int32), model.manifest['tokenizer']['eot']
  ended = np.zeros(len(pixels), bool)
  for t in range(model.manifest['tasks'][task]['max_len']):
    out = model.run(task, 'step', cache=cache, word=word, t=np.int32(t))
    cache, word = out['cache'], np.where(ended, eot, np.asarray(out['log_p']).argmax(-1)).astype(np.int32)
    ended |= word == eot
    yield word
    if ended.all():
      return


def answers(model, task, inputs):
  """Returns the predictions of the model: captions, or names of classes."""
  if 'caption' in model.manifest['tasks'][task]['programs']:
    return texts.Texts(model).captions(task, **inputs)
  chosen = np.asarray(model.run(task, 'classify', **inputs)['log_p']).argmax(-1)
  names = model.manifest['target_sets'][model.manifest['tasks'][task]['target_set']]['texts']
  return [names[i] for i in chosen]


def main():
  model = load.Model()
  examples = load.tensors(model.folder / 'examples.safetensors')
  for task, expected in model.manifest['examples'].items():
    inputs = {name.partition('/')[2]: x for name, x in examples.items() if name.partition('/')[0] == task}
    predicted = answers(model, task, inputs)
    print(f'{task}: {predicted}', 'as at export' if predicted == expected else f'but at export: {expected}', sep='; ')
  if not model.manifest['examples']:
    for task, entry in model.manifest['tasks'].items():
      for program, p in entry['programs'].items():
        print(task, program, p['inputs'])


if __name__ == '__main__':
  main()
