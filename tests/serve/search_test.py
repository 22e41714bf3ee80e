"""Searches among stored texts, with a batcher that answers at once."""

import asyncio
import collections
import types

import numpy as np

from uni_moe_jax.serve.limits import Limits, Refused
from uni_moe_jax.serve.service import Service
from uni_moe_jax.serve.worker import Item


class _Encoder:
  """Features of a text are its length and 1, those of the example 1 and 1. A text of four characters is too long."""

  def __init__(self):
    self.encoded = collections.Counter()

  async def submit(self, task, program, item):
    if program == 'encode':
      return {'features': np.ones(2, np.float32)}
    self.encoded[item.text] += 1
    if len(item.text) > 3:
      raise Refused(422, f'{item.text} has too many tokens')
    if item.text == '503':
      raise Refused(503, 'busy')
    return {'features': np.array([len(item.text), 1], np.float32)}


def _search(sets, *requests):
  """Returns the texts and scores, or the refusal, of every search for an example among sets; and the encoder."""
  entry = {'num_frames': 1, 'target': 'pair', 'target_set': '', 'max_len': 3, 'text_condition': 'text',
           'input_conditions': ['image'], 'template_parts': [],
           'programs': {'encode': {'inputs': {'pixels': ''}}, 'encode_text': {}}}
  sets = {name: {'texts': texts} for name, texts in sets.items()}
  facts = types.SimpleNamespace(examples=[{'num_frames': 1}], manifest={'tasks': {'pair': entry}, 'target_sets': sets})
  encoder = _Encoder()
  searched = Service(types.SimpleNamespace(facts=facts), encoder, types.SimpleNamespace(items=[]), Limits())

  async def search(names, candidates):
    try:
      matches = await searched.search('pair', Item(example=0), '', names, candidates)
      return {r['text']: r['score'] for r in matches['results']}
    except Refused as e:
      return str(e)

  return [asyncio.run(search(*request)) for request in requests], encoder.encoded


def test_a_stored_text_that_is_too_long_for_a_task_is_left_out_of_a_search_and_a_given_one_is_refused():
  answers, encoded = _search({'set': ['a', 'long', 'bcd'], 'long': ['longer', 'longest'], 'busy': ['a', '503']},
                             ([], 'set'), ([], 'set'), (['a', 'long'], ''), ([], 'long'), ([], 'busy'))
  assert answers[:2] == [{'bcd': 4.0, 'a': 2.0}] * 2
  assert encoded['a'] == encoded['bcd'] == 1  # kept beside one that is refused
  assert answers[2:] == ['long has too many tokens', 'longer has too many tokens', 'busy']
