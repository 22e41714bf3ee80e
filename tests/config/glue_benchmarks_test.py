"""GLUE's benchmarks: texts, label words and token ids as the published code has them."""

import re
import runpy
import types

import pytest

from tests.helpers.processes import ROOT
from uni_moe_jax.data.text.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.text.templates import fill_template

_BENCHMARK = ROOT / 'configs/benchmark.py'


def _config(name: str):
  return runpy.run_path(str(_BENCHMARK))['get_config'](f'task={name}')


# Task → its record, what the model reads of it, and the word of every class as TFDS calls them.
_GLUE = {
    'cola': (dict(sentence='they left'), 'they left This is <spe> . <eot>',
             {'unacceptable': 'incorrect', 'acceptable': 'correct'}),
    'sst2': (dict(sentence='a joy'), 'a joy <eot> It is <spe> . <eot>', {'negative': 'bad', 'positive': 'wonderful'}),
    'mrpc': (dict(sentence1='it rained .', sentence2='rain fell .'), 'it rained . <spe> , rain fell . <eot>',
             {'not_equivalent': 'no', 'equivalent': 'yes'}),
    'qqp': (dict(question1='who ?', question2='which ?'), 'who ? <eot> <spe> , which ? <eot>',
            {'not_duplicate': 'no', 'duplicate': 'yes'}),
    'mnli': (dict(premise='it rained .', hypothesis='it is wet .'), 'it rained . <spe> , it is wet . <eot>',
             {'entailment': 'yes', 'neutral': 'maybe', 'contradiction': 'no'}),
    'qnli': (dict(question='who left ?', sentence='they left'), 'who left ? <eot> it is <spe> , they left <eot>',
             {'entailment': 'yes', 'not_entailment': 'no'}),
    'rte': (dict(sentence1='it rained', sentence2='it is wet'), 'it rained ? <eot> it is <spe> , it is wet <eot>',
            {'entailment': 'yes', 'not_entailment': 'no'}),
}


@pytest.mark.parametrize('name', list(_GLUE))
def test_glue_has_the_published_templates_and_label_words(name):
  (record, text, words), c = _GLUE[name], _config(name)
  t = c.tasks[name]
  tokenizer = types.SimpleNamespace(spe='<spe>', eot='<eot>', encode=str.split)  # its tokens are words
  tokens, slot, _ = fill_template(tokenizer, t.template, record, t.max_len)
  assert ' '.join(tokens) == text and tokens[slot] == '<spe>'
  assert dict(c.target_sets[name].entries) == words
  # Of two, F1 is of the second.
  assert len(words) == 3 or c.target_sets[name].entries[1][1] in ('correct', 'wonderful', 'yes')


@pytest.mark.parametrize('name', list(_GLUE))
@pytest.mark.parametrize('end, kept', [('', ''), ('.', ''), (' .', ''), ('...', '...'), ('?', '?'), ('.)', '.)')])
def test_the_first_text_of_a_pair_loses_its_full_stop_as_published(name, end, kept):
  record, t = dict(_GLUE[name][0]), _config(name).tasks[name]
  first = list(record)[0]
  if name in ('cola', 'sst2', 'mnli'):
    kept = end
  record[first] = 'it rained' + end
  tokenizer = types.SimpleNamespace(spe='<spe>', eot='<eot>', encode=lambda text: re.findall(r'\w+|[^\w\s]', text))
  tokens, *_ = fill_template(tokenizer, t.template, record, t.max_len)
  suffix = {'cola': 'This', 'sst2': '<eot>', 'mrpc': '.', 'qqp': '<eot>', 'mnli': '<spe>', 'qnli': '<eot>', 'rte': '?'}
  expected = ['it', 'rained', *tokenizer.encode(kept), suffix[name]]
  assert tokens[:len(expected)] == expected


# The tokens of 'a.' and 'b.' as the published code puts them together, without merges: the id of a character is its
# code - 33, and 256 more at the end of a word.
_A, _B, _STOP, _COMMA, _QUESTION, _EOT, _SPE = 64 + 256, 65 + 256, 13 + 256, 11 + 256, 30 + 256, 'eot', 'spe'
_IT_IS = [72, 83 + 256, 72, 82 + 256]
_PAIR = [_SPE, _COMMA, _B, _STOP, _EOT]


@pytest.mark.parametrize('name, ids', [
    ('cola', [_A, _STOP, 83, 71, 72, 82 + 256, 72, 82 + 256, _SPE, _STOP, _EOT]),
    ('sst2', [_A, _STOP, _EOT, *_IT_IS, _SPE, _STOP, _EOT]), ('mrpc', [_A, _STOP, *_PAIR]),
    ('qqp', [_A, _EOT, *_PAIR]), ('mnli', [_A, _STOP, *_PAIR]), ('qnli', [_A, _EOT, *_IT_IS, *_PAIR]),
    ('rte', [_A, _QUESTION, _EOT, *_IT_IS, *_PAIR])])
def test_glue_has_the_published_ids(name, ids, tmp_path):
  (tmp_path / 'merges').write_text('#version: 0.2\n')
  tokenizer = ClipTokenizer(tmp_path / 'merges')
  special = {_EOT: tokenizer.eot, _SPE: tokenizer.spe}
  record = dict(zip(_GLUE[name][0], ('a.', 'b.')))
  filled, slot, _ = fill_template(tokenizer, _config(name).tasks[name].template, record, 256)
  assert filled == [special.get(i, i) for i in ids] and filled[slot] == tokenizer.spe
